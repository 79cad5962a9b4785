//! Which hypervisor interfaces there are: all of them, not the first.
//!
//! A hypervisor may answer as several: KVM behind a facade of Hyper-V, OpenBSD's vmm with KVM's clock at its second base. So every base is
//! read, 0x40000000 to 0x4000ff00, also behind holes, and EAX is honoured: an interface whose highest leaf is not its own is told of, but not
//! used. Each CPUID may be an exit: one for each base, and for an interface only the leaves that it has.
//!
//! OpenBSD `sys/dev/pv/pvbus.c` is the model; it stops at the first hole, ignores EAX, and knows six names.

mod features;
mod kind;
#[cfg(test)]
mod tests;

use alloc::vec::Vec;
use core::fmt;

use abi::hypervisor::{BASE_STEP, FIRST_BASE, PRESENT, RANGE_END, Signature, hyperv, xen};
use abi::vmware;

use crate::hal::{Cpuid, Hal};
pub use kind::{Kind, signature_text};

/// Leaf of the processor's own features.
const LEAF_PROCESSOR: u32 = 1;
/// Offset of the leaf with the features of KVM and OpenBSD.
const LEAF_KVM_FEATURES: u32 = 1;

/// What detection found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct Detection {
    /// Whether the processor says at all that there is a hypervisor.
    pub hypervisor: bool,
    /// The interfaces by ascending base.
    pub interfaces: Vec<Interface>,
}

impl Detection {
    /// The interface of a kind that drivers use: the first that can be trusted.
    #[must_use]
    pub fn find(&self, kind: Kind) -> Option<&Interface> {
        self.interfaces.iter().find(|interface| interface.kind == kind && interface.trusted)
    }

    /// The interfaces on the bus, one for each kind, in OpenBSD's order of kinds: an interface's place here is the minor number of its device.
    #[must_use]
    pub fn on_bus(&self) -> Vec<&Interface> {
        let mut found: Vec<&Interface> = Vec::new();
        for interface in self.interfaces.iter().filter(|interface| interface.trusted) {
            if !found.iter().any(|other| other.kind == interface.kind) {
                found.push(interface);
            }
        }
        found.sort_by_key(|interface| interface.kind);
        found
    }
}

/// One hypervisor interface.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct Interface {
    /// Whose it is.
    pub kind: Kind,
    /// Its first leaf.
    pub base: u32,
    /// Its highest leaf as EAX of the base says.
    pub max_leaf: u32,
    /// Whether `max_leaf` is one that belongs to this base. Others are not on the bus.
    pub trusted: bool,
    /// Its version, where it tells one.
    pub version: Option<Version>,
    /// The registers with its feature bits.
    #[cfg_attr(feature = "serde", serde(skip))]
    pub features: Cpuid,
    /// Names of the bits that are set and known.
    pub feature_names: Vec<&'static str>,
    /// What one should know about it.
    pub notes: Vec<Note>,
}

impl Interface {
    /// Whether it is Hyper-V's interface, by whatever name: the name is for reports only (TLFS 6.0b, 2.4).
    #[must_use]
    pub fn is_hyperv(&self) -> bool {
        self.kind == Kind::HyperV || self.notes.contains(&Note::HyperVLeaves)
    }
}

/// Version of an interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct Version {
    /// Major.
    pub major: u16,
    /// Minor.
    pub minor: u16,
    /// Build number; 0 where there is none.
    pub build: u32,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// Something one should know about an interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Note {
    /// EAX of the base is no leaf of this base.
    MaxLeafNotOwn,
    /// EAX of the base is 0, as of old KVM and of OpenBSD: there is one more leaf.
    MaxLeafZero,
    /// The same kind stands at a lower base too; that one is used.
    Repeated,
    /// Another hypervisor that is present is known to show this interface.
    ShownBy(Kind),
    /// Hyper-V's leaves under another name.
    HyperVLeaves,
    /// Hyper-V's interface without what VMBus needs: enlightenments of KVM, Xen, bhyve or VirtualBox.
    NoVmbus,
    /// Xen's interface without hypercalls.
    NoHypercalls,
    /// Version 0.0, as of hypervisors that imitate this one.
    NoVersion,
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Note::MaxLeafNotOwn => f.write_str("its maximum leaf does not belong to its base: not used"),
            Note::MaxLeafZero => f.write_str("maximum leaf 0, taken as base + 1: old KVM and OpenBSD vmm say so"),
            Note::Repeated => f.write_str("also at a lower base, which is used"),
            Note::ShownBy(kind) => write!(f, "shown by {kind}, which is present too"),
            Note::HyperVLeaves => f.write_str("has the leaves of Hyper-V under a name of its own"),
            Note::NoVmbus => f.write_str("enlightenments only, no VMBus: KVM, Xen, bhyve and VirtualBox imitate Hyper-V so"),
            Note::NoHypercalls => f.write_str("no hypercall page: an imitation"),
            Note::NoVersion => f.write_str("version 0.0: an imitation"),
        }
    }
}

#[cfg(feature = "serde")]
impl serde::Serialize for Note {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// Looks for all interfaces.
#[must_use]
pub fn detect(hal: &dyn Hal) -> Detection {
    if hal.cpuid(LEAF_PROCESSOR, 0).ecx & PRESENT == 0 {
        return Detection::default();
    }
    let mut found: Vec<(Answer, Interface)> = Vec::new();
    for base in (FIRST_BASE..RANGE_END).step_by(BASE_STEP as usize) {
        let answer = Answer::at(hal, base);
        let Some(kind) = Kind::of(answer.signature) else { continue };
        // A hypervisor that does not decode all of the number, or a processor that answers for leaves that do not exist, says the same everywhere.
        if !answer.is_own(base) && found.iter().any(|(other, _)| *other == answer) {
            continue;
        }
        found.push((answer, examine(hal, kind, base, answer.max_leaf)));
    }
    let mut interfaces: Vec<Interface> = found.into_iter().map(|(_, interface)| interface).collect();
    compare(&mut interfaces);
    Detection { hypervisor: true, interfaces }
}

/// What a base answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Answer {
    max_leaf: u32,
    signature: Signature,
}

impl Answer {
    fn at(hal: &dyn Hal, base: u32) -> Answer {
        let Cpuid { eax, ebx, ecx, edx } = hal.cpuid(base, 0);
        let mut signature = [0; 12];
        for (bytes, register) in signature.chunks_exact_mut(4).zip([ebx, ecx, edx]) {
            bytes.copy_from_slice(&register.to_le_bytes());
        }
        Answer { max_leaf: eax, signature }
    }

    fn is_own(&self, base: u32) -> bool {
        (base..RANGE_END).contains(&self.max_leaf)
    }
}

/// Reads the leaves that an interface has beside its base.
fn examine(hal: &dyn Hal, kind: Kind, base: u32, max_leaf: u32) -> Interface {
    let zero_is_one = max_leaf == 0 && matches!(kind, Kind::Kvm | Kind::OpenBsd);
    let trusted = zero_is_one || (base..RANGE_END).contains(&max_leaf);
    let last = if zero_is_one { base + 1 } else { max_leaf };
    let leaf = |offset: u32| if trusted && base + offset <= last { hal.cpuid(base + offset, 0) } else { Cpuid::default() };

    let mut notes = Vec::new();
    if !trusted {
        notes.push(Note::MaxLeafNotOwn);
    } else if zero_is_one {
        notes.push(Note::MaxLeafZero);
    }
    let (version, features) = match kind {
        Kind::Kvm | Kind::OpenBsd => (None, leaf(LEAF_KVM_FEATURES)),
        Kind::HyperV => (Some(hyperv_version(leaf(hyperv::LEAF_VERSION))), leaf(hyperv::LEAF_FEATURES)),
        Kind::Xen => (Some(halves(leaf(xen::LEAF_VERSION).eax, 0)), leaf(xen::LEAF_HVM)),
        Kind::Vmware => (None, leaf(vmware::LEAF_FREQUENCY)),
        // VirtualBox, cloud-hypervisor and users of QEMU's hv-vendor-id rename Hyper-V's interface.
        Kind::VirtualBox | Kind::LinuxKvmHv | Kind::Unknown(_) if leaf(hyperv::LEAF_INTERFACE).eax == hyperv::INTERFACE => {
            notes.push(Note::HyperVLeaves);
            (Some(hyperv_version(leaf(hyperv::LEAF_VERSION))), leaf(hyperv::LEAF_FEATURES))
        }
        _ => (None, Cpuid::default()),
    };
    let hyperv_leaves = kind == Kind::HyperV || notes.contains(&Note::HyperVLeaves);
    let table = if hyperv_leaves { features::HYPERV } else { features::of(kind) };
    if trusted && hyperv_leaves && !crate::hyperv::has_vmbus(&features) {
        notes.push(Note::NoVmbus);
    }
    if trusted && kind == Kind::Xen && !crate::xen::has_hypercalls(&leaf(xen::LEAF_HYPERCALL)) {
        notes.push(Note::NoHypercalls);
    }
    if trusted && version.is_some_and(|version| version.major == 0 && version.minor == 0) {
        notes.push(Note::NoVersion);
    }
    let version = version.filter(|_| trusted);
    Interface { kind, base, max_leaf, trusted, version, features, feature_names: features::names(table, &features), notes }
}

/// Notes that only show when all interfaces are known.
fn compare(interfaces: &mut [Interface]) {
    let trusted: Vec<(Kind, u32)> = interfaces.iter().filter(|i| i.trusted).map(|i| (i.kind, i.base)).collect();
    let has = |kind| trusted.iter().any(|(other, _)| *other == kind);
    for interface in interfaces.iter_mut().filter(|interface| interface.trusted) {
        if trusted.iter().any(|(kind, base)| *kind == interface.kind && *base < interface.base) {
            interface.notes.push(Note::Repeated);
        }
        let shown_by: &[Kind] = match interface.kind {
            Kind::HyperV => &[Kind::Kvm, Kind::Xen],
            Kind::Kvm => &[Kind::OpenBsd],
            _ => &[],
        };
        interface.notes.extend(shown_by.iter().filter(|kind| has(**kind)).map(|kind| Note::ShownBy(*kind)));
    }
}

fn hyperv_version(leaf: Cpuid) -> Version {
    halves(leaf.ebx, leaf.eax)
}

fn halves(register: u32, build: u32) -> Version {
    let [a, b, c, d] = register.to_le_bytes();
    Version { major: u16::from_le_bytes([c, d]), minor: u16::from_le_bytes([a, b]), build }
}
