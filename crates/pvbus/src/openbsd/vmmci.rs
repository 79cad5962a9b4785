//! vmmci: OpenBSD's control device, by which the host asks for a shutdown and tells the time.
//!
//! A legacy virtio PCI function (virtio 1.2, 4.1.4.10) without queues: its only interrupt says that the command register has changed. The
//! guest acknowledges by writing the command back. OpenBSD `sys/dev/pv/vmmci.c`, `usr.sbin/vmd/virtio.c`.

use alloc::vec::Vec;
use core::fmt;

use abi::openbsd::vmmci as words;
use abi::pci;
use abi::virtio::pci::{ISR_CONFIG, legacy};
use abi::virtio::status;

use crate::detect::Kind;
use crate::driver::{Driver, Event, News, TimeOfDay};
use crate::hal::{Hal, HalError, Nanos, PciAddress, SECOND, Width};

/// How often the command register is looked at, for a kernel that brings no interrupts.
const PERIOD: Nanos = SECOND;
/// How often the host is asked for the time.
const TIME_PERIOD: Nanos = 15 * SECOND;
/// What this driver knows.
const FEATURES: u32 = words::F_TIMESYNC | words::F_ACK | words::F_SYNCRTC;
/// Devices and functions of a bus.
const DEVICES: u8 = 32;
const FUNCTIONS: u8 = 8;

/// The device.
pub struct Vmmci<'h> {
    hal: &'h dyn Hal,
    port: u16,
    line: Option<u8>,
    features: u32,
    next_time: Nanos,
    set_time: bool,
}

/// Looks for the device on bus 0, where vmd has it.
#[must_use]
pub fn find(hal: &dyn Hal) -> Option<PciAddress> {
    for device in 0..DEVICES {
        for function in 0..FUNCTIONS {
            let address = PciAddress { bus: 0, device, function };
            let id = hal.pci_read(address, pci::VENDOR_ID).ok()?;
            if id == u32::from(words::PCI_PRODUCT) << 16 | u32::from(words::PCI_VENDOR) {
                return Some(address);
            }
            let several =
                || hal.pci_read(address, pci::CACHE_LINE_SIZE).is_ok_and(|word| header_type(word) & pci::HEADER_MULTI_FUNCTION != 0);
            if function == 0 && (id == u32::MAX || !several()) {
                break;
            }
        }
    }
    None
}

impl<'h> Vmmci<'h> {
    /// Starts the device at `address`.
    ///
    /// # Errors
    /// [`VmmciError`].
    pub fn attach(hal: &'h dyn Hal, address: PciAddress) -> Result<Vmmci<'h>, VmmciError> {
        let command = hal.pci_read(address, pci::COMMAND)?;
        // The upper half is the status register, whose bits are cleared by ones.
        hal.pci_write(address, pci::COMMAND, command & 0xffff | u32::from(pci::COMMAND_IO))?;
        let bar = hal.pci_read(address, pci::BAR0)?;
        let port = u16::try_from(bar & !0b11).ok().filter(|port| bar & pci::BAR_IO != 0 && *port != 0).ok_or(VmmciError::NoPorts)?;
        let [line, pin, ..] = hal.pci_read(address, pci::INTERRUPT_LINE)?.to_le_bytes();
        let mut vmmci = Vmmci { hal, port, line: (pin != 0).then_some(line), features: 0, next_time: 0, set_time: true };

        vmmci.write(legacy::DEVICE_STATUS, Width::U8, 0)?;
        vmmci.write(legacy::DEVICE_STATUS, Width::U8, u32::from(status::ACKNOWLEDGE))?;
        vmmci.write(legacy::DEVICE_STATUS, Width::U8, u32::from(status::ACKNOWLEDGE | status::DRIVER))?;
        vmmci.features = vmmci.read(legacy::DEVICE_FEATURES, Width::U32)? & FEATURES;
        vmmci.write(legacy::DRIVER_FEATURES, Width::U32, vmmci.features)?;
        vmmci.write(legacy::DEVICE_STATUS, Width::U8, u32::from(status::ACKNOWLEDGE | status::DRIVER | status::DRIVER_OK))?;
        Ok(vmmci)
    }

    /// Whether the host has the time.
    #[must_use]
    pub const fn has_time(&self) -> bool {
        self.features & words::F_TIMESYNC != 0
    }

    /// Carries out the command if there is a new one.
    fn command(&mut self, events: &mut Vec<Event>) -> Result<(), HalError> {
        // Reading clears it, and with it the interrupt.
        if self.read(legacy::ISR_STATUS, Width::U8)? & u32::from(ISR_CONFIG) == 0 {
            return Ok(());
        }
        let command = self.read(legacy::DEVICE_CONFIG + words::COMMAND, Width::U32)?;
        let event = match command {
            words::SHUTDOWN => Event::Shutdown(Kind::OpenBsd),
            words::REBOOT => Event::Reboot(Kind::OpenBsd),
            words::SYNCRTC => Event::SyncRtc(Kind::OpenBsd),
            _ => return Ok(()),
        };
        if self.features & words::F_ACK != 0 {
            self.write(legacy::DEVICE_CONFIG + words::COMMAND, Width::U32, command)?;
        }
        if command == words::SYNCRTC {
            self.next_time = 0;
            self.set_time = true;
        }
        events.push(event);
        Ok(())
    }

    /// The host's time of day. The host keeps the time still from the first word of the seconds to the last of the microseconds.
    fn time(&self) -> Result<Option<(u64, u32)>, HalError> {
        let seconds = self.read_u64(legacy::DEVICE_CONFIG + words::TIME_SEC)?;
        let microseconds = self.read_u64(legacy::DEVICE_CONFIG + words::TIME_USEC)?;
        let nanoseconds = u32::try_from(microseconds).ok().filter(|us| *us < 1_000_000).map(|us| us * 1000);
        Ok(nanoseconds.filter(|_| seconds != 0).map(|nanoseconds| (seconds, nanoseconds)))
    }

    /// 64 bits of configuration, upper half first, as OpenBSD reads them.
    fn read_u64(&self, offset: u64) -> Result<u64, HalError> {
        let high = self.read(offset + 4, Width::U32)?;
        let low = self.read(offset, Width::U32)?;
        Ok(u64::from(high) << 32 | u64::from(low))
    }

    fn read(&self, offset: u64, width: Width) -> Result<u32, HalError> {
        self.hal.port_in(self.register(offset)?, width)
    }

    fn write(&self, offset: u64, width: Width, value: u32) -> Result<(), HalError> {
        self.hal.port_out(self.register(offset)?, width, value)
    }

    fn register(&self, offset: u64) -> Result<u16, HalError> {
        u16::try_from(offset).ok().and_then(|offset| self.port.checked_add(offset)).ok_or(HalError::Fault)
    }
}

impl<'h> Driver<'h> for Vmmci<'h> {
    fn poll(&mut self, now: Nanos, events: &mut Vec<Event>) -> Option<Nanos> {
        // Ports that fail once fail for ever.
        self.command(events).ok()?;
        if self.has_time() && now >= self.next_time {
            self.next_time = now.saturating_add(TIME_PERIOD);
            if let Some((seconds, nanoseconds)) = self.time().ok()? {
                let set = core::mem::take(&mut self.set_time);
                events.push(Event::Time(TimeOfDay { source: Kind::OpenBsd, seconds, nanoseconds, read_at: self.hal.now(), set }));
            }
        }
        Some(now.saturating_add(PERIOD))
    }

    fn interrupt_line(&self) -> Option<u8> {
        self.line
    }

    fn hear(&mut self, news: &News, _now: Nanos) {
        // Unasked, this is a guest that says goodbye: the host ends it after three seconds. So it must not be said before a reboot.
        if *news == (News::GoingDown { reboot: false }) {
            let _ = self.write(legacy::DEVICE_CONFIG + words::COMMAND, Width::U32, words::SHUTDOWN);
        }
    }
}

/// Header type in the word at [`pci::CACHE_LINE_SIZE`].
fn header_type(word: u32) -> u8 {
    word.to_le_bytes()[2]
}

/// Why there is no vmmci0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VmmciError {
    /// Its first base address register has no ports.
    NoPorts,
    /// This system cannot reach it.
    Hal(HalError),
}

impl From<HalError> for VmmciError {
    fn from(error: HalError) -> VmmciError {
        VmmciError::Hal(error)
    }
}

impl fmt::Display for VmmciError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            VmmciError::NoPorts => f.write_str("its registers have no ports"),
            VmmciError::Hal(error) => write!(f, "{error}"),
        }
    }
}

impl core::error::Error for VmmciError {}
