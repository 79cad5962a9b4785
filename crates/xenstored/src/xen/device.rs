//! What Linux' drivers give programs in dom0: event channels, pages of other domains, and one hypercall.
//!
//! Sources: Linux `include/uapi/xen/{evtchn,gntdev,privcmd}.h`; of xen-project/xen `xen/include/public/{domctl,event_channel,grant_table,xen}.h`.
#![allow(unsafe_code)] // ioctl(2), and memory that others write too.

use std::ffi::c_void;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::ioctl::{Direction, Ioctl, IoctlOutput, Opcode, ioctl, opcode};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use xenstore::DomId;
use xenstore::ring::Page;

/// `IOCTL_EVTCHN_*`, `IOCTL_GNTDEV_*`, `IOCTL_PRIVCMD_*`: none says a direction.
const BIND_VIRQ: Opcode = opcode::from_components(Direction::None, b'E', 0, 4);
const BIND_INTERDOMAIN: Opcode = opcode::from_components(Direction::None, b'E', 1, 8);
const UNBIND: Opcode = opcode::from_components(Direction::None, b'E', 3, 4);
const NOTIFY: Opcode = opcode::from_components(Direction::None, b'E', 4, 4);
const MAP_GRANT_REF: Opcode = opcode::from_components(Direction::None, b'G', 0, size_of::<MapGrantRef>());
const HYPERCALL: Opcode = opcode::from_components(Direction::None, b'P', 0, size_of::<Hypercall>());

/// Bytes of a page.
const PAGE: usize = 4096;
/// Where grants of the toolstack have the page of the ring: `GNTTAB_RESERVED_XENSTORE`.
const GRANT_OF_RING: u32 = 1;
/// A domain has shut down, is dying or gone: `VIRQ_DOM_EXC`.
const VIRQ_DOM_EXC: u32 = 3;

/// Calls whose answer is the result of ioctl(2) itself, or is put into `T`.
struct Call<'a, T, const OPCODE: Opcode>(&'a mut T);

// SAFETY: users of the type, all below, pair each code with the structure that the driver reads and writes for it.
unsafe impl<T, const OPCODE: Opcode> Ioctl for Call<'_, T, OPCODE> {
    type Output = u32;
    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        OPCODE
    }

    fn as_ptr(&mut self) -> *mut c_void {
        std::ptr::from_mut(self.0).cast()
    }

    unsafe fn output_from_ptr(result: IoctlOutput, _: *mut c_void) -> rustix::io::Result<u32> {
        // It is not negative, or it would be an error.
        Ok(result as u32)
    }
}

fn call<T, const OPCODE: Opcode>(device: impl AsFd, argument: &mut T) -> io::Result<u32> {
    // SAFETY: see `Call`.
    Ok(unsafe { ioctl(device, Call::<T, OPCODE>(argument)) }?)
}

fn open(path: &str) -> io::Result<OwnedFd> {
    let opened = rustix::fs::open(path, OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK, Mode::empty());
    opened.map_err(|error| io::Error::new(io::Error::from(error).kind(), format!("{path}: {error}")))
}

/// One event channel, which has `/dev/xen/evtchn` to itself: the descriptor is readable after an event, which is not sent again before it was taken.
pub struct EventChannel {
    device: File,
    /// 0 when it is not bound.
    port: AtomicU32,
}

impl EventChannel {
    /// One that is not bound.
    ///
    /// # Errors
    /// When there is no such device, or no descriptor left.
    pub fn new() -> io::Result<EventChannel> {
        Ok(EventChannel { device: open("/dev/xen/evtchn")?.into(), port: AtomicU32::new(0) })
    }

    /// Goes on with one that another program has bound.
    pub fn adopt(device: OwnedFd, port: u32) -> EventChannel {
        EventChannel { device: device.into(), port: AtomicU32::new(port) }
    }

    /// Hears of domains that shut down, die, or are gone.
    ///
    /// # Errors
    /// When another program does.
    pub fn bind_exceptions(&self) -> io::Result<()> {
        self.port.store(call::<u32, BIND_VIRQ>(&self.device, &mut { VIRQ_DOM_EXC })?, Ordering::SeqCst);
        Ok(())
    }

    /// Binds it to a domain's `port`, instead of what it was bound to.
    ///
    /// # Errors
    /// When the domain has not offered that port to this one.
    pub fn bind(&self, domain: DomId, port: u32) -> io::Result<()> {
        self.unbind();
        self.port.store(call::<[u32; 2], BIND_INTERDOMAIN>(&self.device, &mut [domain.0.into(), port])?, Ordering::SeqCst);
        Ok(())
    }

    /// Gives the domain its port back.
    pub fn unbind(&self) {
        let mut port = self.port.swap(0, Ordering::SeqCst);
        if port != 0 {
            // It is bound, and that is all that could be wrong with it.
            let _ = call::<u32, UNBIND>(&self.device, &mut port);
        }
    }

    /// This side's port.
    pub fn port(&self) -> u32 {
        self.port.load(Ordering::SeqCst)
    }

    /// Sends an event.
    pub fn notify(&self) {
        // A domain that has closed its end does not hear.
        let _ = call::<u32, NOTIFY>(&self.device, &mut self.port());
    }

    /// Takes the event, so that another can come.
    pub fn take(&self) {
        // There may be none, and some of ports that are not bound any more, which nobody would tell of a second time.
        let mut ports = [0; 64 * size_of::<u32>()];
        if let Ok(count) = (&self.device).read(&mut ports) {
            let _ = (&self.device).write(ports.get(..count).unwrap_or_default());
        }
    }
}

impl AsFd for EventChannel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.device.as_fd()
    }
}

/// `struct ioctl_gntdev_map_grant_ref` with one reference.
#[repr(C)]
struct MapGrantRef {
    count: u32,
    pad: u32,
    /// Answer: where to map the device.
    index: u64,
    domid: u32,
    reference: u32,
}

/// A page that is shared with others.
pub struct SharedPage(NonNull<c_void>);

// SAFETY: the page is mapped as long as this lives, and all accesses are atomic.
unsafe impl Send for SharedPage {}
// SAFETY: as above.
unsafe impl Sync for SharedPage {}

impl SharedPage {
    /// The page of the ring of dom0's kernel.
    ///
    /// # Errors
    /// When this is not the domain whose kernel looks for a store here.
    pub fn of_kernel() -> io::Result<SharedPage> {
        SharedPage::map(&open("/proc/xen/xsd_kva")?, 0)
    }

    /// The page of a domain's ring, by the grant that the toolstack made for it.
    ///
    /// # Errors
    /// When there is no such grant.
    pub fn of_domain(domain: DomId) -> io::Result<SharedPage> {
        // The page keeps the device open.
        let device = open("/dev/xen/gntdev")?;
        let mut grant = MapGrantRef { count: 1, pad: 0, index: 0, domid: domain.0.into(), reference: GRANT_OF_RING };
        call::<_, MAP_GRANT_REF>(&device, &mut grant)?;
        SharedPage::map(&device, grant.index)
    }

    fn map(device: &OwnedFd, offset: u64) -> io::Result<SharedPage> {
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the kernel chooses an address where nothing is.
        let page = unsafe { mmap(std::ptr::null_mut(), PAGE, access, MapFlags::SHARED, device, offset) }?;
        NonNull::new(page).map(SharedPage).ok_or_else(|| Errno::INVAL.into())
    }

    fn word(&self, at: usize) -> &AtomicU32 {
        assert!(at.is_multiple_of(4) && at < PAGE, "not a word of the page");
        // SAFETY: it is within the page, aligned, and accessed atomically by everyone.
        unsafe { AtomicU32::from_ptr(self.0.as_ptr().cast::<u32>().byte_add(at)) }
    }

    fn bytes(&self, at: usize, count: usize) -> &[AtomicU8] {
        assert!(at <= PAGE && count <= PAGE - at, "not within the page");
        // SAFETY: they are within the page and accessed atomically.
        unsafe { std::slice::from_raw_parts(self.0.as_ptr().cast::<AtomicU8>().add(at), count) }
    }
}

impl Drop for SharedPage {
    fn drop(&mut self) {
        // SAFETY: it was mapped, and nobody has references into it any more.
        let _ = unsafe { munmap(self.0.as_ptr(), PAGE) };
    }
}

impl Page for SharedPage {
    fn load(&self, at: usize) -> u32 {
        self.word(at).load(Ordering::SeqCst)
    }

    fn store(&self, at: usize, value: u32) {
        self.word(at).store(value, Ordering::SeqCst);
    }

    fn read(&self, at: usize, bytes: &mut [u8]) {
        let shared = self.bytes(at, bytes.len());
        bytes.iter_mut().zip(shared).for_each(|(byte, shared)| *byte = shared.load(Ordering::Relaxed));
    }

    fn write(&self, at: usize, bytes: &[u8]) {
        let shared = self.bytes(at, bytes.len());
        bytes.iter().zip(shared).for_each(|(byte, shared)| shared.store(*byte, Ordering::Relaxed));
    }
}

/// `struct privcmd_hypercall`.
#[repr(C)]
struct Hypercall {
    op: u64,
    arguments: [u64; 5],
}

/// `__HYPERVISOR_domctl`.
const DOMCTL: u64 = 36;
/// `XEN_DOMCTL_getdomaininfo`.
const GET_DOMAIN_INFO: u32 = 5;
/// Where `struct xen_domctl` has what is asked, and `struct xen_domctl_getdomaininfo` in it what is answered; so in all versions below.
const COMMAND: usize = 0;
const INTERFACE_VERSION: usize = 4;
const DOMAIN: usize = 8;
const INFO_DOMAIN: usize = 16;
const INFO_FLAGS: usize = 20;
/// Bits of the flags: `XEN_DOMINF_dying`, `XEN_DOMINF_shutdown`.
const DYING: u32 = 1;
const SHUTDOWN: u32 = 4;
/// `XEN_DOMCTL_INTERFACE_VERSION` of Xen 4.12 (0x11) and later ones. Each hypervisor answers to its own only, so they are tried.
const VERSIONS: std::ops::RangeInclusive<u32> = 0x11..=0x20;

/// How a domain is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Life {
    /// It runs, or could.
    Running,
    /// It has shut down or crashed, and still exists.
    ShutDown,
    /// It is dying, or there is none.
    Gone,
}

/// Asks the hypervisor about domains.
pub struct Domains {
    privcmd: OwnedFd,
    /// Memory that hypercalls can use: of `/dev/xen/hypercall`.
    argument: SharedPage,
    version: u32,
}

impl Domains {
    /// Finds out how this hypervisor wants to be asked.
    ///
    /// # Errors
    /// When there is none, or it is newer than this program.
    pub fn new() -> io::Result<Domains> {
        let argument = SharedPage::map(&open("/dev/xen/hypercall")?, 0)?;
        let mut domains = Domains { privcmd: open("/dev/xen/privcmd")?, argument, version: 0 };
        for version in VERSIONS {
            domains.version = version;
            if domains.info(DomId::HOST).is_ok() {
                return Ok(domains);
            }
        }
        Err(io::Error::other("the hypervisor does not tell about domains"))
    }

    /// How this domain is.
    ///
    /// # Errors
    /// The hypervisor's.
    pub fn life(&self, domain: DomId) -> io::Result<Life> {
        match self.info(domain) {
            // It tells of the next domain when there is no such one.
            Ok((told, _)) if told != domain.0 => Ok(Life::Gone),
            Ok((_, flags)) if flags & DYING != 0 => Ok(Life::Gone),
            Ok((_, flags)) if flags & SHUTDOWN != 0 => Ok(Life::ShutDown),
            Ok(_) => Ok(Life::Running),
            Err(error) if error.raw_os_error() == Some(Errno::SRCH.raw_os_error()) => Ok(Life::Gone),
            Err(error) => Err(error),
        }
    }

    fn info(&self, domain: DomId) -> io::Result<(u16, u32)> {
        for (at, value) in [(COMMAND, GET_DOMAIN_INFO), (INTERFACE_VERSION, self.version), (DOMAIN, domain.0.into()), (12, 0)] {
            self.argument.store(at, value);
        }
        let mut hypercall = Hypercall { op: DOMCTL, arguments: [self.argument.0.as_ptr().addr() as u64, 0, 0, 0, 0] };
        call::<_, HYPERCALL>(&self.privcmd, &mut hypercall)?;
        Ok(((self.argument.load(INFO_DOMAIN) & 0xffff) as u16, self.argument.load(INFO_FLAGS)))
    }
}
