//! The command line.

use std::path::PathBuf;

use clap::Parser;
use xenstore::Quota;

/// Serves a XenStore to clients on a Unix socket.
#[derive(Parser)]
#[command(name = "xenstored", version, about)]
pub struct Arguments {
    /// Listen here instead of $XENSTORED_PATH, $XENSTORED_RUNDIR/socket or /var/run/xenstored/socket.
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// Write the process number here, and refuse to start while another xenstored has done so.
    #[arg(long, value_name = "FILE")]
    pub pid_file: Option<PathBuf>,
    /// Keep keys in this file, so that they outlive the server; all but those of domains.
    #[arg(long, value_name = "FILE")]
    pub persist: Option<PathBuf>,
    /// Serve the socket only, also where a Xen's kernel and domains want a store.
    #[arg(short = 'D', long)]
    pub no_domain_init: bool,
    /// Limit each domain; 0 is no limit. May be given several times.
    #[arg(long = "quota", value_name = "NAME=VALUE", value_parser = quota)]
    pub quotas: Vec<(Quota, u32)>,
    /// Append log lines to this file instead of writing them to standard error.
    #[arg(long, value_name = "FILE")]
    pub log: Option<PathBuf>,
    /// Go on in the background once the socket is there.
    #[arg(long)]
    pub daemon: bool,
    /// Take over from the program that left its state in this descriptor. For live upgrades, which add it by themselves.
    #[arg(long, value_name = "DESCRIPTOR", hide = true)]
    pub resume: Option<i32>,
    /// Only tell whether that state can be taken over.
    #[arg(long, requires = "resume", hide = true)]
    pub check: bool,
}

fn quota(text: &str) -> Result<(Quota, u32), String> {
    let (name, limit) = text.split_once('=').ok_or("expected NAME=VALUE")?;
    let known = || Quota::ALL.map(Quota::name).join(", ");
    let quota = Quota::of_name(name.as_bytes()).ok_or_else(|| format!("no quota {name:?}; there are {}", known()))?;
    let limit = limit.parse().map_err(|_| format!("{limit:?} is not a number from 0 to {}", u32::MAX))?;
    Ok((quota, limit))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quotas_are_named_and_numbered() {
        assert_eq!(quota("nodes=5"), Ok((Quota::Nodes, 5)));
        assert_eq!(quota("node-size=0"), Ok((Quota::NodeSize, 0)));
        for (bad, says) in [("nodes", "NAME=VALUE"), ("nod=5", "transaction-nodes"), ("nodes=-1", "number"), ("nodes=4294967296", "number")]
        {
            assert!(quota(bad).unwrap_err().contains(says), "{bad}");
        }
    }
}
