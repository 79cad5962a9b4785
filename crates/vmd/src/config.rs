//! What a machine is asked to be: the options of `vmctl run` as types that cannot be wrong.
//!
//! Every option's text form is parsed by `FromStr`, here or beside its device, so that the command line and, later, a configuration file share one
//! grammar and one set of messages. A message says what was found and what would have been right.
//! [`MachineConfig::check`] compares the whole with the host before anything is opened.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

pub use devices::DeviceBus;
pub use devices::block::DiskSpec;
pub use devices::net::NicSpec;

pub use crate::fw_cfg::FwCfgSpec;
pub use crate::layout::{DialectList, DialectName};

use crate::hyperv;

/// Most processors a machine can have, as vmm(4)'s `VMM_MAX_VCPUS_PER_VM`.
pub const MAX_CPUS: u32 = 64;
/// Most memory a machine can have: 128 GiB, as vmm(4)'s `VMM_MAX_VM_MEM_SIZE`.
pub const MAX_MEMORY: u64 = 128 << 30;
/// Least memory that a PC's firmware tables and a loader fit in.
pub const MIN_MEMORY: u64 = 2 << 20;

/// Everything that makes one machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MachineConfig {
    /// Kernel in one of the formats that [`crate::boot`] recognises.
    pub kernel: Option<Kernel>,
    /// Initial RAM disk, or multiboot modules: file, then arguments.
    pub initrds: Vec<String>,
    /// Kernel command line.
    pub cmdline: String,
    /// Firmware image, started at the reset vector.
    pub bios: Option<PathBuf>,
    /// Size of RAM.
    pub memory: Size,
    /// Number of processors.
    pub cpus: u32,
    /// Disks in order of their PCI slots.
    pub disks: Vec<DiskSpec>,
    /// Network cards in order of their PCI slots.
    pub nics: Vec<NicSpec>,
    /// What executes the processors.
    pub backend: BackendChoice,
    /// Paravirtual dialects.
    pub dialects: DialectList,
    /// A socket at which the machine's store is offered to XenStore's own clients.
    pub xenstore: Option<PathBuf>,
    /// What the machine tells as its UUID; a new one for each run when nothing is given.
    pub uuid: Option<Uuid>,
    /// Files for the guest in the firmware configuration device.
    pub fw_cfg: Vec<FwCfgSpec>,
    /// Where the first serial port goes.
    pub serial: SerialTarget,
    /// Where a virtio console goes, when there is one.
    pub console: Option<SerialTarget>,
    /// Whether a reset starts the machine again; otherwise it ends it.
    pub reboot: bool,
    /// Whether port 0xf4 ends the machine with a status.
    pub debug_exit: bool,
    /// Whether the ports of QEMU's `pc-testdev` are there.
    pub testdev: bool,
    /// Whether time follows the instruction count.
    pub deterministic: bool,
}

impl Default for MachineConfig {
    fn default() -> MachineConfig {
        MachineConfig {
            kernel: None,
            initrds: Vec::new(),
            cmdline: String::new(),
            bios: None,
            memory: Size(512 << 20),
            cpus: 1,
            disks: Vec::new(),
            nics: Vec::new(),
            backend: BackendChoice::Auto,
            dialects: DialectList::default(),
            xenstore: None,
            uuid: None,
            fw_cfg: Vec::new(),
            serial: SerialTarget::Stdio,
            console: None,
            reboot: true,
            debug_exit: false,
            testdev: false,
            deterministic: false,
        }
    }
}

/// Where a kernel comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kernel {
    /// A file.
    File(PathBuf),
    /// An image that is part of the program.
    BuiltIn {
        /// Its name in messages.
        name: &'static str,
        /// The image.
        data: &'static [u8],
    },
}

/// A request that cannot be met.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// No text of that form.
    #[error("{0}")]
    Syntax(String),
    /// More than the host or the monitor has.
    #[error("{0}")]
    Limit(String),
    /// Two options that exclude or need each other.
    #[error("{0}")]
    Combination(String),
}

fn syntax<T>(text: impl Into<String>) -> Result<T, ConfigError> {
    Err(ConfigError::Syntax(text.into()))
}

impl MachineConfig {
    /// Checks what needs no file to be opened.
    ///
    /// # Errors
    /// [`ConfigError`] naming the option and its bounds.
    pub fn check(&self, host_memory: u64) -> Result<(), ConfigError> {
        let Size(memory) = self.memory;
        if memory < MIN_MEMORY {
            return Err(ConfigError::Limit(format!("--memory {}: a machine needs at least {}", self.memory, Size(MIN_MEMORY))));
        }
        if memory > host_memory {
            return Err(ConfigError::Limit(format!("--memory {}: this host has {}", self.memory, Size(host_memory))));
        }
        if memory > MAX_MEMORY {
            return Err(ConfigError::Limit(format!("--memory {}: the most is {}", self.memory, Size(MAX_MEMORY))));
        }
        if self.cpus == 0 || self.cpus > MAX_CPUS {
            return Err(ConfigError::Limit(format!("--cpus {}: from 1 to {MAX_CPUS}", self.cpus)));
        }
        if self.deterministic && self.cpus > 1 {
            return Err(ConfigError::Combination("--deterministic: only with --cpus 1; threads of the host are not repeatable".into()));
        }
        if self.deterministic && self.backend == BackendChoice::Kvm {
            return Err(ConfigError::Combination("--deterministic: only the software CPU counts instructions; use --backend soft".into()));
        }
        self.check_xen()?;
        self.check_hyperv()?;
        if self.serial == SerialTarget::Stdio && self.console == Some(SerialTarget::Stdio) {
            let text = "--console stdio: the serial port has standard input and output; give --serial null or file:PATH too";
            return Err(ConfigError::Combination(text.into()));
        }
        match (&self.kernel, &self.bios) {
            (None, None) if self.disks.is_empty() => {
                Err(ConfigError::Combination("nothing to boot: give --kernel FILE, or --disk FILE to boot it by BIOS".into()))
            }
            (Some(_), Some(_)) => Err(ConfigError::Combination("--kernel and --bios exclude each other".into())),
            (None, _) if !self.initrds.is_empty() => Err(ConfigError::Combination("--initrd needs --kernel".into())),
            _ => Ok(()),
        }
    }
}

impl MachineConfig {
    /// What the Xen dialect needs, and what needs it.
    fn check_xen(&self) -> Result<(), ConfigError> {
        let combination = |text: &str| Err(ConfigError::Combination(text.into()));
        if self.dialects.contains(DialectName::Xen) {
            return match self.backend {
                _ if self.deterministic => combination("--deterministic: not with --dialect xen, whose backends have threads of their own"),
                BackendChoice::Kvm => combination("--dialect xen: KVM answers Linux' hypercalls (VMCALL) by itself; use --backend soft"),
                _ => Ok(()),
            };
        }
        if self.disks.iter().any(|disk| disk.bus == DeviceBus::Xen) || self.nics.iter().any(|nic| nic.bus == DeviceBus::Xen) {
            return combination("bus=xen: only with --dialect xen");
        }
        Ok(())
    }
}

impl MachineConfig {
    /// What the Hyper-V dialect needs.
    fn check_hyperv(&self) -> Result<(), ConfigError> {
        let combination = |text: String| Err(ConfigError::Combination(text));
        match self.dialects.dialects().iter().position(|&dialect| dialect == DialectName::Hyperv) {
            Some(1..) => combination("--dialect: hyperv comes first; Linux and Windows look for it at the first base only".into()),
            Some(0) if self.deterministic => {
                combination("--deterministic: not with --dialect hyperv, whose devices have threads of their own".into())
            }
            Some(0) if self.backend == BackendChoice::Kvm => {
                combination(format!("--dialect hyperv: {}; use --backend soft", hyperv::NOT_ON_KVM))
            }
            None if self.disks.iter().any(|disk| disk.bus == DeviceBus::Hyperv)
                || self.nics.iter().any(|nic| nic.bus == DeviceBus::Hyperv) =>
            {
                combination("bus=hyperv: only with --dialect hyperv".into())
            }
            _ if self.disks.iter().any(|disk| disk.persistent_grants && disk.bus != DeviceBus::Xen) => {
                combination("persistent-grants: only with bus=xen".into())
            }
            _ if self.disks.iter().any(|disk| disk.dvd && disk.bus != DeviceBus::Hyperv) => combination("dvd: only with bus=hyperv".into()),
            _ => Ok(()),
        }
    }
}

/// A number of bytes, written `512M` or `1G`; a bare number means MiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size(pub u64);

impl Size {
    const UNITS: [(char, u32); 4] = [('T', 40), ('G', 30), ('M', 20), ('K', 10)];
}

impl FromStr for Size {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Size, ConfigError> {
        let upper = text.trim().to_ascii_uppercase();
        let upper = upper.strip_suffix("IB").or_else(|| upper.strip_suffix('B')).unwrap_or(&upper);
        let (digits, shift) =
            Size::UNITS.iter().find_map(|&(unit, shift)| upper.strip_suffix(unit).map(|digits| (digits, shift))).unwrap_or((upper, 20));
        let number = digits.parse::<u64>().ok().filter(|_| digits.bytes().all(|b| b.is_ascii_digit()));
        match number.and_then(|n| n.checked_mul(1 << shift)) {
            Some(bytes) => Ok(Size(bytes)),
            None => syntax(format!("'{text}' is not a size; write for example 512M or 2G")),
        }
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match Size::UNITS.iter().find(|&&(_, shift)| self.0 >= 1 << shift && self.0.trailing_zeros() >= shift) {
            Some((unit, shift)) => write!(f, "{}{unit}", self.0 >> shift),
            None if self.0 >= 1 << 20 => write!(f, "{}M", self.0 >> 20),
            None => write!(f, "{} bytes", self.0),
        }
    }
}

/// What executes the processors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BackendChoice {
    /// KVM where a probe finds it fit, else the software CPU.
    Auto,
    /// Linux KVM.
    Kvm,
    /// The software CPU.
    Soft,
}

impl FromStr for BackendChoice {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<BackendChoice, ConfigError> {
        match text {
            "auto" => Ok(BackendChoice::Auto),
            "kvm" => Ok(BackendChoice::Kvm),
            "soft" => Ok(BackendChoice::Soft),
            _ => syntax(format!("unknown backend '{text}'; one of: auto, kvm, soft")),
        }
    }
}

/// A machine's UUID.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Uuid(pub [u8; 16]);

impl FromStr for Uuid {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Uuid, ConfigError> {
        let groups: Vec<usize> = text.split('-').map(str::len).collect();
        let digits = text.replace('-', "");
        match u128::from_str_radix(&digits, 16) {
            Ok(number) if groups == [8, 4, 4, 4, 12] && !digits.starts_with('+') => Ok(Uuid(number.to_be_bytes())),
            _ => syntax(format!("'{text}' is not a UUID; write for example 564d5868-0000-4000-8000-00000000002a")),
        }
    }
}

impl fmt::Display for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let hex = format!("{:032x}", u128::from_be_bytes(self.0));
        write!(f, "{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
    }
}

/// Where the first serial port, or the virtio console, goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SerialTarget {
    /// Standard input and output.
    Stdio,
    /// Nowhere.
    Null,
    /// Output into a file, no input.
    File(PathBuf),
}

impl FromStr for SerialTarget {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<SerialTarget, ConfigError> {
        match text.strip_prefix("file:") {
            Some("") => syntax("serial target 'file:' lacks a path"),
            Some(path) => Ok(SerialTarget::File(path.into())),
            None if text == "stdio" => Ok(SerialTarget::Stdio),
            None if text == "null" => Ok(SerialTarget::Null),
            None => syntax(format!("unknown serial target '{text}'; one of: stdio, null, file:PATH")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bootable() -> MachineConfig {
        MachineConfig { kernel: Some(Kernel::File("vmlinuz".into())), ..MachineConfig::default() }
    }

    #[test]
    fn sizes_take_units() {
        for (text, bytes) in
            [("512M", 512 << 20), ("1G", 1 << 30), ("64", 64 << 20), ("2gib", 2 << 30), ("4096K", 4 << 20), ("1T", 1 << 40)]
        {
            assert_eq!(text.parse(), Ok(Size(bytes)), "{text}");
        }
        for text in ["", "M", "-1", "+1M", "1.5G", "0x10M", "99999999999999999999", "20000000000000G", "1X"] {
            assert!(text.parse::<Size>().is_err(), "{text}");
        }
        assert_eq!(Size(512 << 20).to_string(), "512M");
        assert_eq!(Size(3 << 30).to_string(), "3G");
        assert_eq!(Size(0).to_string(), "0 bytes");
    }

    #[test]
    fn impossible_machines_are_refused_with_their_bounds() {
        let check = |change: fn(&mut MachineConfig)| {
            let mut config = bootable();
            change(&mut config);
            config.check(8 << 30).unwrap_err().to_string()
        };
        assert!(check(|c| c.memory = Size(0)).contains("at least 2M"));
        assert!(check(|c| c.memory = Size(9 << 30)).contains("this host has 8G"));
        assert!(check(|c| c.cpus = 0).contains("from 1 to 64"));
        assert!(check(|c| c.cpus = 1000).contains("from 1 to 64"));
        assert!(check(|c| c.kernel = None).contains("--kernel FILE"));
        assert!(check(|c| c.bios = Some("bios".into())).contains("exclude"));
        assert!(check(|c| (c.deterministic, c.cpus) = (true, 2)).contains("--cpus 1"));
        assert!(check(|c| c.console = Some(SerialTarget::Stdio)).contains("--serial null"));
        assert!(check(|c| c.disks = vec!["disk.raw,bus=xen".parse().unwrap()]).contains("--dialect xen"));
        assert!(check(|c| c.disks = vec!["disk.raw,persistent-grants".parse().unwrap()]).contains("only with bus=xen"));
        assert!(check(|c| c.nics = vec!["user,bus=xen".parse().unwrap()]).contains("--dialect xen"));
        assert!(check(|c| c.dialects = "vmware,hyperv".parse().unwrap()).contains("hyperv comes first"));
        assert!(check(|c| (c.dialects, c.backend) = ("hyperv".parse().unwrap(), BackendChoice::Kvm)).contains("--backend soft"));
        assert!(check(|c| (c.dialects, c.deterministic) = ("hyperv".parse().unwrap(), true)).contains("threads of their own"));
        assert!(check(|c| (c.dialects, c.backend) = ("xen".parse().unwrap(), BackendChoice::Kvm)).contains("--backend soft"));
        assert_eq!(bootable().check(8 << 30), Ok(()));
    }

    #[test]
    fn uuids_are_read_as_they_are_written() {
        let text = "564d5868-0001-4002-8003-00000000002a";
        let uuid: Uuid = text.parse().unwrap();
        assert_eq!((uuid.0[0], uuid.0[15]), (0x56, 0x2a));
        assert_eq!(uuid.to_string(), text);
        for bad in [
            "",
            "564d5868",
            "564d58680001400280030000000000002a",
            "564d5868-0001-4002-8003-00000000002g",
            "+64d5868-0001-4002-8003-00000000002a",
        ] {
            assert!(bad.parse::<Uuid>().is_err(), "{bad}");
        }
    }

    #[test]
    fn unknown_values_name_the_known_ones() {
        assert!("xen".parse::<BackendChoice>().unwrap_err().to_string().contains("auto, kvm, soft"));
        assert!("pty".parse::<SerialTarget>().unwrap_err().to_string().contains("stdio, null, file:PATH"));
    }
}
