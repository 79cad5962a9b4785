//! Kinds of interfaces, their signatures and names.

use core::fmt;

use abi::hypervisor::{self as words, Signature};

/// Whose interface it is. The order of the first six is that of OpenBSD's `pvbus_types`, from which the minor numbers of `/dev/pvbusN` come;
/// those that OpenBSD does not know come behind them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// Linux KVM.
    Kvm,
    /// Microsoft Hyper-V.
    HyperV,
    /// VMware.
    Vmware,
    /// Xen.
    Xen,
    /// FreeBSD bhyve.
    Bhyve,
    /// OpenBSD vmm(4).
    OpenBsd,
    /// KVM behind Hyper-V's leaves, as cloud-hypervisor shows itself.
    LinuxKvmHv,
    /// QEMU's translator.
    QemuTcg,
    /// Oracle VirtualBox.
    VirtualBox,
    /// Parallels.
    Parallels,
    /// ACRN.
    Acrn,
    /// Jailhouse.
    Jailhouse,
    /// QNX.
    Qnx,
    /// NetBSD nvmm.
    Nvmm,
    /// One that nobody has told us of, by its signature.
    Unknown(Signature),
}

/// The signatures known.
const SIGNATURES: [(Signature, Kind); 15] = [
    (words::KVM, Kind::Kvm),
    (words::HYPERV, Kind::HyperV),
    (words::VMWARE, Kind::Vmware),
    (words::XEN, Kind::Xen),
    (words::BHYVE, Kind::Bhyve),
    (words::OPENBSD, Kind::OpenBsd),
    (words::LINUX_KVM_HV, Kind::LinuxKvmHv),
    (words::QEMU_TCG, Kind::QemuTcg),
    (words::VIRTUALBOX, Kind::VirtualBox),
    (words::PARALLELS, Kind::Parallels),
    (words::PARALLELS_PLAIN, Kind::Parallels),
    (words::ACRN, Kind::Acrn),
    (words::JAILHOUSE, Kind::Jailhouse),
    (words::QNX, Kind::Qnx),
    (words::NVMM, Kind::Nvmm),
];

impl Kind {
    /// The kind with `signature`; `None` when those bytes are no signature at all.
    #[must_use]
    pub fn of(signature: Signature) -> Option<Kind> {
        match SIGNATURES.iter().find(|(known, _)| *known == signature) {
            Some((_, kind)) => Some(*kind),
            None => signature_text(&signature).map(|_| Kind::Unknown(signature)),
        }
    }

    /// Its name: the TYPE that pvbus(4) returns. An unknown one has its signature for a name.
    #[must_use]
    pub fn name(&self) -> &str {
        match self {
            Kind::Kvm => "KVM",
            Kind::HyperV => "Hyper-V",
            Kind::Vmware => "VMware",
            Kind::Xen => "Xen",
            Kind::Bhyve => "bhyve",
            Kind::OpenBsd => "OpenBSD",
            Kind::LinuxKvmHv => "Linux KVM Hv",
            Kind::QemuTcg => "QEMU TCG",
            Kind::VirtualBox => "VirtualBox",
            Kind::Parallels => "Parallels",
            Kind::Acrn => "ACRN",
            Kind::Jailhouse => "Jailhouse",
            Kind::Qnx => "QNX",
            Kind::Nvmm => "NVMM",
            Kind::Unknown(signature) => signature_text(signature).unwrap_or("unknown"),
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(feature = "serde")]
impl serde::Serialize for Kind {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

/// A signature as text: at least four printable ASCII characters (OpenBSD's rule), and NULs only behind them.
#[must_use]
pub fn signature_text(signature: &Signature) -> Option<&str> {
    let end = signature.iter().rposition(|byte| *byte != 0)? + 1;
    let text = signature.get(..end)?;
    if text.len() < 4 || !text.iter().all(|byte| (b' '..=b'~').contains(byte)) {
        return None;
    }
    core::str::from_utf8(text).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_signature_has_its_name() {
        let names = SIGNATURES.map(|(signature, _)| Kind::of(signature).map(|kind| kind.name().len()));
        assert!(names.iter().all(|length| length.is_some_and(|length| length > 2)));
    }

    #[test]
    fn order_of_the_first_six_is_that_of_openbsd() {
        let order = [Kind::Kvm, Kind::HyperV, Kind::Vmware, Kind::Xen, Kind::Bhyve, Kind::OpenBsd];
        assert!(order.is_sorted() && order.iter().all(|kind| *kind < Kind::LinuxKvmHv));
    }

    #[test]
    fn unknown_signature_is_its_own_name() {
        assert_eq!(Kind::of(*b"FooFooFoo\0\0\0").unwrap().name(), "FooFooFoo");
    }

    #[test]
    fn registers_of_a_processor_are_no_signature() {
        assert_eq!(Kind::of([0; 12]), None);
        assert_eq!(Kind::of([0xff; 12]), None);
        assert_eq!(Kind::of(*b"abc\0\0\0\0\0\0\0\0\0"), None);
        assert_eq!(Kind::of(*b"abcd\0\0\0\0\0\0\0x"), None);
    }
}
