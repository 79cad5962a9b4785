//! CONTROL: what a person at the host may ask the server (xen-project/xen `docs/misc/xenstore.txt`, CONTROL). Commands are each server's own; these
//! are C xenstored's where it has the same. `log` and `logfile` are missing: log lines are `tracing` events, which the program filters.

use super::{Answer, Host};
use crate::domid::{DomId, decimal};
use crate::error::Error;
use crate::quota::Quota;
use crate::store::Store;

const HELP: &str = "check\nhelp\nmemreport\nprint <text>\nquota [<domid> | set <name> <value>]\n";

/// Answers a command.
///
/// # Errors
/// [`Error::BadRequest`] for an unknown command or wrong arguments.
pub(super) fn control(store: &mut Store, host: &mut dyn Host, arguments: &[&[u8]]) -> Result<Answer, Error> {
    let text = match arguments {
        [b"check"] => Ok(if store.is_consistent() { "OK" } else { "accounts disagree with the tree" }.into()),
        [b"help"] => Ok(HELP.into()),
        [b"memreport"] => {
            let (nodes, clients, memory) = store.totals();
            Ok(format!("nodes: {nodes}\nclients: {clients}\nbytes: {memory}\n"))
        }
        [b"print", text] => {
            tracing::info!(text = %text.escape_ascii(), "print");
            Ok("OK".into())
        }
        [b"quota"] => Ok(Quota::ALL.map(|quota| format!("{}: {}\n", quota.name(), store.quotas(None).get(quota))).concat()),
        [b"quota", domain] => {
            let domain = DomId::parse(domain).filter(|domain| host.exists(*domain)).ok_or(Error::BadRequest)?;
            Ok(domain_quotas(store, domain))
        }
        [b"quota", b"set", name, limit] => {
            let quota = Quota::of_name(name).ok_or(Error::BadRequest)?;
            store.set_quota(None, quota, decimal(limit).ok_or(Error::BadRequest)?);
            Ok("OK".into())
        }
        [command, arguments @ ..] => return host.control(command, arguments).unwrap_or(Err(Error::BadRequest)),
        [] => Err(Error::BadRequest),
    };
    text.map(Answer::Now)
}

/// What a domain uses of each quota, of how much, and how often it ran out.
fn domain_quotas(store: &Store, domain: DomId) -> String {
    let (usage, (watches, transactions)) = (store.usage(domain), store.open_counts(domain));
    let line = |quota: Quota| {
        let used = match quota {
            Quota::Nodes => usage.nodes.to_string(),
            Quota::Memory => usage.memory.to_string(),
            Quota::Watches => watches.to_string(),
            Quota::Transactions => transactions.to_string(),
            _ => "-".into(),
        };
        format!("{}: {used}/{} refused {}\n", quota.name(), store.quotas(Some(domain)).get(quota), store.quota_hits(domain, quota))
    };
    Quota::ALL.map(line).concat()
}
