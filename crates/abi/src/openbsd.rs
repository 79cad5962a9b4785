//! Words of the OpenBSD vmm(4) dialect: its CPUID leaf, and the control device vmmci(4).
//!
//! The clock is KVM's by the same MSRs ([`crate::kvm`]). OpenBSD `sys/arch/amd64/amd64/vmm_machdep.c`, `sys/dev/pv/vmmci.c`,
//! `usr.sbin/vmd/virtio.c`.
//!
//! vmmci is a virtio 0.9 PCI function without queues ([`crate::virtio::pci::legacy`]). Its configuration interrupt says that
//! [`vmmci::COMMAND`] has changed. It has OpenBSD's vendor id and not virtio's, so that no other system's virtio driver takes it
//! (`sys/dev/pci/virtio_pci.c`, `virtio_pci_match`; `sys/dev/pci/pcidevs`).

/// EBX, ECX and EDX of the base leaf.
pub const SIGNATURE: [u32; 3] = crate::hypervisor::registers(crate::hypervisor::OPENBSD);

/// The control device.
pub mod vmmci {
    /// PCI vendor, and subsystem vendor: `PCI_VENDOR_OPENBSD`.
    pub const PCI_VENDOR: u16 = 0x0b5d;
    /// PCI product: `PCI_PRODUCT_OPENBSD_CONTROL`.
    pub const PCI_PRODUCT: u16 = 0x0777;
    /// PCI class: communications, miscellaneous.
    pub const PCI_CLASS: u32 = 0x07_8000;
    /// Virtio device number, which a 0.9 driver finds in the PCI subsystem id: `PCI_PRODUCT_VIRTIO_VMMCI`.
    pub const DEVICE_TYPE: u16 = 0xffff;

    /// Feature bit: the host has the time registers.
    pub const F_TIMESYNC: u32 = 1 << 0;
    /// Feature bit: the guest acknowledges commands by writing them back.
    pub const F_ACK: u32 = 1 << 1;
    /// Feature bit: the host may ask to read the real-time clock again.
    pub const F_SYNCRTC: u32 = 1 << 2;

    /// Offset in the device's configuration: command, 32 bits. The guest writes it back as acknowledgement; [`SHUTDOWN`] without a pending
    /// command means that the guest powers down.
    pub const COMMAND: u64 = 0;
    /// Offset: host's time of day in seconds since 1970, 64 bits.
    pub const TIME_SEC: u64 = 4;
    /// Offset: microseconds of that second, 64 bits.
    pub const TIME_USEC: u64 = 12;
    /// Bytes of configuration.
    pub const CONFIG_SIZE: usize = 20;

    /// Command: nothing.
    pub const NONE: u32 = 0;
    /// Command: power down.
    pub const SHUTDOWN: u32 = 1;
    /// Command: reboot.
    pub const REBOOT: u32 = 2;
    /// Command: read the real-time clock again.
    pub const SYNCRTC: u32 = 3;
}
