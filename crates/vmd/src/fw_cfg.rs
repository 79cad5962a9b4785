//! Files for the guest through QEMU's firmware configuration device: those of `--fw-cfg`, and a view of the store.
//!
//! A guest reads them without any paravirtual dialect; Linux' module `qemu_fw_cfg` shows them below `/sys/firmware/qemu_fw_cfg/by_name`. Each key
//! for guests is a file `opt/org.pvbus/KEY` with the value it had when power came on. QEMU `docs/specs/fw_cfg.rst` keeps `opt/` for users, with a
//! reversed domain name behind it.

use std::str::FromStr;

use abi::fw_cfg::FILE_NAME_SIZE;
use devices::block::split_options;
use dialects::store::{Store, VM_DATA};

use crate::config::ConfigError;
use crate::kv::{self, JsonValue, Source};

/// Where files of users are.
const USERS: &str = "opt/";
/// Where the keys are.
const KEYS: &str = "opt/org.pvbus/";
/// Most keys that are shown. A guest's own writes are there after a reboot, and the directory is of one piece.
const MAX_KEYS: usize = 1000;

/// `[name=]opt/NAME,file=FILE` or `[name=]opt/NAME,string=TEXT`; a comma in FILE or TEXT is written twice, as in QEMU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FwCfgSpec {
    /// Name of the file.
    pub name: String,
    /// What is in it.
    pub source: Source,
}

impl FromStr for FwCfgSpec {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<FwCfgSpec, ConfigError> {
        let wrong =
            |what: &str| ConfigError::Syntax(format!("'{text}': {what}; write name=opt/NAME,file=FILE or name=opt/NAME,string=TEXT"));
        let words = split_options(text);
        let [name, content] = words.as_slice() else { return Err(wrong("a name and a content are needed")) };
        let name = name.strip_prefix("name=").unwrap_or(name);
        if !name.strip_prefix(USERS).is_some_and(|rest| !rest.is_empty() && rest.bytes().all(|byte| byte.is_ascii_graphic())) {
            return Err(wrong("the name does not begin with opt/"));
        }
        if name.len() >= FILE_NAME_SIZE {
            return Err(wrong(&format!("a name has at most {} bytes", FILE_NAME_SIZE - 1)));
        }
        let source = match content.split_once('=') {
            Some(("file", "")) => return Err(wrong("no file")),
            Some(("file", path)) => Source::File(path.into()),
            Some(("string", text)) => Source::Given(text.into()),
            _ => return Err(wrong(&format!("unknown content '{content}'"))),
        };
        Ok(FwCfgSpec { name: name.into(), source })
    }
}

/// The store's keys for guests as files. Keys that are too long for a name, and those that are also the beginning of another's path, are
/// not shown: no file is also a directory.
pub fn keys(store: &dyn Store) -> Vec<(String, Vec<u8>)> {
    // A store without keys for guests shows none.
    let tree = kv::tree(store, VM_DATA).unwrap_or_default();
    let name = |path: &str| path.strip_prefix(VM_DATA)?.strip_prefix('/').map(|key| format!("{KEYS}{key}"));
    let is_beginning = |path: &str| {
        let below = format!("{path}/");
        tree.range(below.clone()..).next().is_some_and(|(next, _)| next.starts_with(&below))
    };
    let shown =
        tree.iter().filter(|(path, _)| !is_beginning(path)).filter_map(|(path, JsonValue(value))| Some((name(path)?, value.clone())));
    shown.filter(|(name, _)| name.len() < FILE_NAME_SIZE).take(MAX_KEYS).collect()
}

#[cfg(test)]
mod tests {
    use dialects::store::Client;

    use super::*;
    use crate::store::MachineStore;

    #[test]
    fn files_have_names_of_users_and_content() {
        let spec = |text: &str| text.parse::<FwCfgSpec>();
        let given = |name: &str, text: &str| Ok(FwCfgSpec { name: name.into(), source: Source::Given(text.into()) });
        assert_eq!(spec("name=opt/org.example/a,string=x=y"), given("opt/org.example/a", "x=y"));
        assert_eq!(spec("opt/a,string=one,,two"), given("opt/a", "one,two"));
        assert_eq!(spec("opt/a,file=/etc/motd").unwrap().source, Source::File("/etc/motd".into()));
        let long = format!("opt/{},string=", "x".repeat(52));
        for (text, word) in [
            ("", "a name and a content"),
            ("opt/a", "a name and a content"),
            ("opt/a,string", "unknown content 'string'"),
            ("etc/e820,string=x", "opt/"),
            ("opt/,string=x", "opt/"),
            ("opt/a b,string=x", "opt/"),
            ("opt/a,file=", "no file"),
            ("opt/a,hex=00", "unknown content 'hex=00'"),
            ("opt/a,string=one,two", "a name and a content"),
            (&long, "at most 55 bytes"),
        ] {
            let error = spec(text).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
    }

    #[test]
    fn keys_for_guests_are_files() {
        let store = MachineStore::new().unwrap();
        let long = "x".repeat(60);
        for path in ["vm-data/hostname", "vm-data/a", "vm-data/a/b", "data/private", &format!("vm-data/{long}")] {
            store.write(Client::Host, path, path.as_bytes()).unwrap();
        }
        let files = keys(&store);
        let names: Vec<&str> = files.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["opt/org.pvbus/a/b", "opt/org.pvbus/hostname"]);
        assert_eq!(files[1].1, b"vm-data/hostname");
        assert!(keys(&MachineStore::new().unwrap()).is_empty());
    }
}
