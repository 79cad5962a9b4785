//! Which dialects a guest finds, and at which of the hypervisor bases: `--dialect`.
//!
//! A list stands in the order of the bases: the first dialect at 0x40000000, the next at 0x40000100 and so on without a hole, since OpenBSD
//! stops at the first base without a printable signature. Presets are layouts that are known to make sense. What guests make of
//! several dialects differs, and a list from which a common guest takes less than it could is run with a [`DialectList::warnings`] line:
//!
//! ```text
//!   Linux          the highest base at which a detector answers; those of Hyper-V and VMware look at      arch/x86/kernel/cpu/hypervisor.c
//!                  the first base only
//!   Windows        Hyper-V's at the first base
//!   FreeBSD        the first signature it knows                                                          sys/x86/x86/identcpu.c
//!   OpenBSD        all of them                                                                           sys/dev/pv/pvbus.c
//!   open-vm-tools  any first base but KVM's and Xen's                                                     lib/misc/hostinfoHV.c
//! ```

use std::fmt;
use std::str::FromStr;

use crate::config::ConfigError;

/// A paravirtual dialect that can be offered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DialectName {
    /// Linux KVM's.
    Kvm,
    /// VMware's.
    Vmware,
    /// OpenBSD vmm(4)'s.
    Openbsd,
    /// Xen's.
    Xen,
    /// Hyper-V's.
    Hyperv,
}

/// Where Linux looks for a dialect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Linux {
    /// It does not know it.
    Nowhere,
    /// At 0x40000000.
    FirstBase,
    /// At every base.
    EveryBase,
}

/// What is to be known of a dialect before it is made.
struct Known {
    dialect: DialectName,
    name: &'static str,
    linux: Linux,
    /// Whether FreeBSD has a `vm_guest` for it.
    freebsd: bool,
    /// Whether open-vm-tools refuses to run with it at the first base.
    refused_by_vmtools: bool,
}

/// One line for each dialect.
const KNOWN: [Known; 5] = [
    Known { dialect: DialectName::Kvm, name: "kvm", linux: Linux::EveryBase, freebsd: true, refused_by_vmtools: true },
    Known { dialect: DialectName::Vmware, name: "vmware", linux: Linux::FirstBase, freebsd: true, refused_by_vmtools: false },
    Known { dialect: DialectName::Openbsd, name: "openbsd", linux: Linux::Nowhere, freebsd: false, refused_by_vmtools: false },
    Known { dialect: DialectName::Xen, name: "xen", linux: Linux::EveryBase, freebsd: true, refused_by_vmtools: true },
    Known { dialect: DialectName::Hyperv, name: "hyperv", linux: Linux::FirstBase, freebsd: true, refused_by_vmtools: false },
];

/// Layouts by name. OpenBSD's vmm(4) itself shows a KVM base behind its own (`sys/arch/amd64/amd64/vmm_machdep.c`). In `all`, Hyper-V
/// stands first because Linux and Windows look for it there only, and KVM last because Linux takes the last.
const PRESETS: [(&str, &[DialectName]); 9] = [
    ("none", &[]),
    ("kvm", &[DialectName::Kvm]),
    ("vmware", &[DialectName::Vmware]),
    ("vmware+kvmclock", &[DialectName::Vmware, DialectName::Kvm]),
    ("xen", &[DialectName::Xen]),
    ("hyperv", &[DialectName::Hyperv]),
    ("hyperv+vmware", &[DialectName::Hyperv, DialectName::Vmware]),
    ("openbsd", &[DialectName::Openbsd, DialectName::Kvm]),
    ("all", &[DialectName::Hyperv, DialectName::Vmware, DialectName::Openbsd, DialectName::Xen, DialectName::Kvm]),
];

impl DialectName {
    fn known(self) -> &'static Known {
        // Every variant has its line, as a test below says.
        KNOWN.iter().find(|known| known.dialect == self).unwrap_or(&KNOWN[0])
    }
}

impl fmt::Display for DialectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.known().name)
    }
}

/// Dialects in the order of their CPUID bases.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DialectList {
    dialects: Vec<DialectName>,
    /// The layout's name, when it was asked for by that.
    preset: Option<&'static str>,
}

impl Default for DialectList {
    fn default() -> DialectList {
        DialectList { dialects: vec![DialectName::Kvm], preset: Some("kvm") }
    }
}

impl DialectList {
    /// Every dialect, as the layout `all` has them.
    pub fn all() -> DialectList {
        let (name, dialects) = PRESETS[PRESETS.len() - 1];
        DialectList { dialects: dialects.to_vec(), preset: Some(name) }
    }

    /// Every dialect that all backends have, and that can be repeated exactly.
    pub fn everywhere() -> DialectList {
        DialectList { dialects: vec![DialectName::Vmware, DialectName::Openbsd, DialectName::Kvm], preset: None }
    }

    /// The dialects, first base first.
    pub fn dialects(&self) -> &[DialectName] {
        &self.dialects
    }

    /// Whether `dialect` is among them.
    pub fn contains(&self, dialect: DialectName) -> bool {
        self.dialects.contains(&dialect)
    }

    /// Lines for people about guests that will not see all they could. A preset was asked for by its name and is not commented.
    pub fn warnings(&self) -> Vec<String> {
        if self.preset.is_some() {
            return Vec::new();
        }
        let mut lines = Vec::new();
        let mut missed = |guest: &str, knows: fn(&Known) -> bool, taken: Option<DialectName>| {
            let others: Vec<String> =
                self.dialects.iter().filter(|&&d| knows(d.known()) && Some(d) != taken).map(DialectName::to_string).collect();
            match taken {
                _ if others.is_empty() => {}
                Some(taken) => lines.push(format!("{guest} will use {taken} and not {}", others.join(" or "))),
                None => lines.push(format!("{guest} will not find {}, which it looks for at the first base only", others.join(" or "))),
            }
        };
        missed("Linux", |known| known.linux != Linux::Nowhere, self.taken_by_linux());
        missed("FreeBSD", |known| known.freebsd, self.dialects.iter().copied().find(|d| d.known().freebsd));
        if let Some(first) = self.dialects.first().filter(|first| first.known().refused_by_vmtools && self.contains(DialectName::Vmware)) {
            lines.push(format!("open-vm-tools refuses to run where {first} is first; put vmware before it"));
        }
        lines
    }

    fn taken_by_linux(&self) -> Option<DialectName> {
        let finds = |(place, dialect): &(usize, DialectName)| match dialect.known().linux {
            Linux::Nowhere => false,
            Linux::FirstBase => *place == 0,
            Linux::EveryBase => true,
        };
        self.dialects.iter().copied().enumerate().rfind(finds).map(|(_, dialect)| dialect)
    }
}

impl FromStr for DialectList {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<DialectList, ConfigError> {
        if let Some(&(name, dialects)) = PRESETS.iter().find(|(name, _)| *name == text) {
            return Ok(DialectList { dialects: dialects.to_vec(), preset: Some(name) });
        }
        let mut dialects = Vec::new();
        for name in text.split(',') {
            let Some(known) = KNOWN.iter().find(|known| known.name == name) else {
                return Err(unknown(name));
            };
            if dialects.contains(&known.dialect) {
                return Err(ConfigError::Syntax(format!("dialect '{name}' is given twice")));
            }
            dialects.push(known.dialect);
        }
        Ok(DialectList { dialects, preset: None })
    }
}

fn unknown(name: &str) -> ConfigError {
    let dialects: Vec<&str> = KNOWN.iter().map(|known| known.name).collect();
    let presets: Vec<&str> = PRESETS.iter().map(|(name, _)| *name).filter(|name| !dialects.contains(name)).collect();
    let text = match PRESETS.iter().any(|(preset, _)| *preset == name) {
        true => format!("'{name}' is a layout and stands alone; a list takes {}", dialects.join(", ")),
        false => format!("unknown dialect '{name}'; a list of {}, or one of {}", dialects.join(", "), presets.join(", ")),
    };
    ConfigError::Syntax(text)
}

impl fmt::Display for DialectList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.preset {
            Some(name) => f.write_str(name),
            None => f.write_str(&self.dialects.iter().map(DialectName::to_string).collect::<Vec<_>>().join(",")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(text: &str) -> DialectList {
        text.parse().unwrap()
    }

    #[test]
    fn every_dialect_has_its_own_line() {
        for dialect in list("all").dialects() {
            assert_eq!(dialect.known().dialect, *dialect);
        }
        for known in &KNOWN {
            assert_eq!(list("all").dialects().iter().filter(|&&d| d == known.dialect).count(), 1);
        }
        assert_eq!(list("all").dialects().len(), KNOWN.len());
        assert_eq!(list("all"), DialectList::all());
    }

    #[test]
    fn lists_keep_their_order_and_presets_their_name() {
        assert_eq!(list("vmware,openbsd").dialects(), [DialectName::Vmware, DialectName::Openbsd]);
        assert_eq!(list("openbsd").dialects(), [DialectName::Openbsd, DialectName::Kvm]);
        assert_eq!(list("none").dialects(), []);
        for text in ["none", "kvm", "vmware+kvmclock", "all", "kvm,openbsd"] {
            assert_eq!(list(text).to_string(), text);
        }
        assert_eq!(DialectList::default(), list("kvm"));
    }

    #[test]
    fn bad_lists_say_what_is_there() {
        let refusal = |text: &str| text.parse::<DialectList>().unwrap_err().to_string();
        assert_eq!(
            refusal("klingon"),
            "unknown dialect 'klingon'; a list of kvm, vmware, openbsd, xen, hyperv, or one of none, vmware+kvmclock, hyperv+vmware, all"
        );
        assert_eq!(refusal("kvm,kvm"), "dialect 'kvm' is given twice");
        assert_eq!(refusal("kvm,all"), "'all' is a layout and stands alone; a list takes kvm, vmware, openbsd, xen, hyperv");
        assert!(refusal("").contains("unknown dialect ''"));
        assert!(refusal("kvm,").contains("unknown dialect ''"));
    }

    #[test]
    fn warnings_name_the_guest_and_what_it_misses() {
        assert_eq!(
            list("kvm,vmware").warnings(),
            [
                "Linux will use kvm and not vmware",
                "FreeBSD will use kvm and not vmware",
                "open-vm-tools refuses to run where kvm is first; put vmware before it"
            ]
        );
        assert_eq!(list("vmware,kvm").warnings(), ["Linux will use kvm and not vmware", "FreeBSD will use vmware and not kvm"]);
        assert_eq!(list("hyperv,kvm").warnings(), ["Linux will use kvm and not hyperv", "FreeBSD will use hyperv and not kvm"]);
        assert_eq!(list("openbsd,vmware").warnings(), ["Linux will not find vmware, which it looks for at the first base only"]);
    }

    #[test]
    fn presets_and_lists_without_rivals_are_silent() {
        for text in [
            "none",
            "kvm",
            "vmware",
            "xen",
            "hyperv",
            "hyperv+vmware",
            "hyperv,openbsd",
            "vmware+kvmclock",
            "openbsd",
            "all",
            "kvm,openbsd",
            "openbsd,kvm",
            "vmware,openbsd",
        ] {
            assert_eq!(list(text).warnings(), [""; 0], "{text}");
        }
    }
}
