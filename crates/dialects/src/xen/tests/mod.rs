//! A guest that is none: it makes hypercalls and writes to its memory as a kernel would, or as no kernel would.

mod block;
mod calls;
mod events;
mod grants;
mod hostile;
mod rings;
mod runstate;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use abi::xen::grant_table::{Entry, flag};
use abi::xen::hvm::UpcallVector;
use abi::xen::hypercall::{AddToPhysmap, memory, number};
use abi::xen::{event_channel as evtchn, hvm as words};
use vmm::backend::EoiFlag;
use vmm::time::{Clock, StepClock};
use zerocopy::{FromBytes, IntoBytes};

use super::xenbus::Keys;
use super::*;

const RAM: u64 = 0x20_0000;
/// Where the guest has the arguments of its hypercalls.
const ARGUMENT: u64 = 0x1000;
const SHARED_INFO: u64 = 0x2000;
const GRANT_TABLE: u64 = 0x3000;
/// Its free pages.
const PAGES: u64 = 0x1_0000;
const VECTOR: u8 = 0xf3;

/// Interrupts that were sent, as addresses and data; vectors that end by themselves, or do not any more; and whether the processors rest.
#[derive(Default)]
struct Interrupts(Mutex<Vec<(u64, u32)>>, Mutex<Vec<(VcpuId, u8, bool)>>, AtomicBool);

impl Processors for Interrupts {
    fn signal_msi(&self, address: u64, data: u32) {
        self.0.lock().unwrap().push((address, data));
    }
    fn wake(&self, _id: VcpuId) {}
    fn is_idle(&self) -> bool {
        self.2.load(Ordering::Relaxed)
    }
    fn set_eoi_flag(&self, _id: VcpuId, _flag: Option<Arc<dyn EoiFlag>>) {}
    fn set_auto_eoi(&self, id: VcpuId, vector: u8, ends_by_itself: bool) -> bool {
        self.1.lock().unwrap().push((id, vector, ends_by_itself));
        true
    }
}

/// How the machine was ended, whether its emulated disks were unplugged with the first, and levels of lines.
#[derive(Default)]
struct Ended(Mutex<Vec<Shutdown>>, Mutex<Vec<bool>>, Arc<Mutex<Vec<(Wire, bool)>>>);

impl Machine for Ended {
    fn shut_down(&self, reason: Shutdown) {
        self.0.lock().unwrap().push(reason);
    }

    fn unplug_disks(&self, with_first: bool) {
        self.1.lock().unwrap().push(with_first);
    }

    fn line(&self, wire: Wire) -> Option<SetLine> {
        let levels = Arc::clone(&self.2);
        let set: SetLine = Box::new(move |level| levels.lock().unwrap().push((wire, level)));
        (wire != Wire::Gsi(24)).then_some(set)
    }
}

/// A host that has taken this many nanoseconds from processor 1.
#[derive(Default)]
struct Host(AtomicU64);

impl StealSource for Host {
    fn stolen(&self, vcpu: VcpuId) -> u64 {
        self.0.load(Ordering::Relaxed) * u64::from(vcpu)
    }
    fn ran(&self, _vcpu: VcpuId) -> u64 {
        0
    }
}

pub(super) struct Guest {
    pub memory: GuestMemory,
    pub xen: Arc<Xen>,
    clock: Arc<StepClock>,
    timers: Arc<Timers>,
    interrupts: Arc<Interrupts>,
    ended: Arc<Ended>,
    host: Arc<Host>,
    pages: AtomicU32,
    grants: AtomicU32,
}

impl Guest {
    /// With two processors, that have not said anything yet.
    pub fn new() -> Guest {
        let memory = vmm::memory::map(&[(0, RAM), (words::SPECIAL_PAGES, words::SPECIAL_PAGES_SIZE)]).unwrap();
        let clock = Arc::new(StepClock::new(Duration::from_secs(1_000_000)));
        let timers = Timers::new(clock.clone());
        let pvclock = Arc::new(PvClock::new(memory.clone(), clock.clone(), 1_000_000_000, 2));
        let host = Arc::new(Host::default());
        let xen = Xen::new(memory.clone(), pvclock, timers.clone(), Some(host.clone()), [7; 16], 2);
        let (interrupts, ended) = (Arc::new(Interrupts::default()), Arc::new(Ended::default()));
        xen.connect(interrupts.clone(), ended.clone());
        Guest { memory, xen, clock, timers, interrupts, ended, host, pages: AtomicU32::new(0), grants: AtomicU32::new(8) }
    }

    /// With shared info, grant table and vectors.
    pub fn running() -> Guest {
        let guest = Guest::new();
        assert_eq!(guest.place(memory::SPACE_SHARED_INFO, 0, SHARED_INFO), 0);
        assert_eq!(guest.place(memory::SPACE_GRANT_TABLE, 0, GRANT_TABLE), 0);
        for vcpu in 0..2u32 {
            let set = UpcallVector { vcpu: vcpu.into(), vector: VECTOR, pad: [0; 3] };
            assert_eq!(guest.call_with(number::HVM_OP, words::op::SET_UPCALL_VECTOR, &set).0, 0);
        }
        guest
    }

    /// A hypercall of processor 0's kernel.
    pub fn call(&self, number: u64, arguments: [u64; 4]) -> i64 {
        let mut call = Hypercall { long_mode: true, ..Hypercall::default() };
        call.gpr[0] = number;
        [call.gpr[7], call.gpr[6], call.gpr[2], call.gpr[10]] = arguments;
        assert!(self.xen.hypercall(0, &mut call));
        call.gpr[0].cast_signed()
    }

    /// One with an operation and a structure, which comes back.
    pub fn call_with<T: IntoBytes + FromBytes + zerocopy::Immutable>(&self, number: u64, operation: u64, value: &T) -> (i64, T) {
        self.memory.write_slice(value.as_bytes(), GuestAddress(ARGUMENT)).unwrap();
        let answer = self.call(number, [operation, ARGUMENT, 1, 0]);
        let mut back = T::new_zeroed();
        let mut bytes = vec![0; size_of::<T>()];
        self.memory.read_slice(&mut bytes, GuestAddress(ARGUMENT)).unwrap();
        if let Ok(value) = T::read_from_bytes(&bytes) {
            back = value;
        }
        (answer, back)
    }

    pub fn place(&self, space: u32, index: u64, gpa: u64) -> i64 {
        let add =
            AddToPhysmap { domid: DOMAIN.into(), space: space.into(), idx: index.into(), gpfn: (gpa / PAGE_SIZE).into(), size: 0.into() };
        self.call_with(number::MEMORY_OP, memory::ADD_TO_PHYSMAP, &add).0
    }

    /// A page that nobody has yet.
    pub fn page(&self) -> u64 {
        PAGES + u64::from(self.pages.fetch_add(1, Ordering::Relaxed)) * PAGE_SIZE
    }

    /// Grants a page to backends.
    pub fn grant(&self, page: u64, flags: u16) -> u32 {
        let grant = self.grants.fetch_add(1, Ordering::Relaxed);
        self.set_grant(
            grant,
            Entry { flags: (flag::PERMIT_ACCESS | flags).into(), domid: 0.into(), frame: ((page / PAGE_SIZE) as u32).into() },
        );
        grant
    }

    pub fn set_grant(&self, grant: u32, entry: Entry) {
        self.memory.write_slice(entry.as_bytes(), GuestAddress(GRANT_TABLE + u64::from(grant) * 8)).unwrap();
    }

    pub fn flags(&self, grant: u32) -> u16 {
        self.memory.read_obj(GuestAddress(GRANT_TABLE + u64::from(grant) * 8)).unwrap()
    }

    /// A port for a backend.
    pub fn port(&self) -> u32 {
        let alloc = evtchn::AllocUnbound { dom: abi::xen::hypercall::DOMID_SELF.into(), remote_dom: 0.into(), port: 0.into() };
        let (answer, alloc) = self.call_with(number::EVENT_CHANNEL_OP, evtchn::op::ALLOC_UNBOUND, &alloc);
        assert_eq!(answer, 0);
        alloc.port.get()
    }

    pub fn port_call(&self, operation: u64, port: u32) -> i64 {
        self.call_with(number::EVENT_CHANNEL_OP, operation, &port).0
    }

    pub fn u64_at(&self, gpa: u64) -> u64 {
        self.memory.read_obj(GuestAddress(gpa)).unwrap()
    }

    pub fn u32_at(&self, gpa: u64) -> u32 {
        self.memory.read_obj(GuestAddress(gpa)).unwrap()
    }

    pub fn put_u32(&self, gpa: u64, value: u32) {
        self.memory.write_obj(value, GuestAddress(gpa)).unwrap();
    }

    /// Interrupts since the last look.
    pub fn interrupts(&self) -> Vec<(u64, u32)> {
        std::mem::take(&mut self.interrupts.0.lock().unwrap())
    }
}

/// A store that only the test and the backend know.
#[derive(Default)]
pub(super) struct Tree(Mutex<BTreeMap<String, String>>);

impl Tree {
    pub fn set(&self, path: &str, value: impl ToString) {
        self.0.lock().unwrap().insert(path.into(), value.to_string());
    }

    pub fn get(&self, path: &str) -> String {
        self.0.lock().unwrap().get(path).cloned().unwrap_or_default()
    }
}

impl Keys for Tree {
    fn read(&self, path: &str) -> Option<String> {
        self.0.lock().unwrap().get(path).cloned()
    }

    fn write(&self, keys: &[(String, String)]) {
        keys.iter().for_each(|(path, value)| self.set(path, value));
    }
}

/// The other side of a ring: what a frontend does, or should not do.
pub(super) struct FrontRing {
    pub page: u64,
    slot: u64,
    slots: u32,
    req_prod: u32,
    rsp_cons: u32,
}

impl FrontRing {
    pub fn new(guest: &Guest, slot: usize, slots: u32) -> FrontRing {
        let page = guest.page();
        guest.put_u32(page + 4, 1);
        guest.put_u32(page + 12, 1);
        FrontRing { page, slot: slot as u64, slots, req_prod: 0, rsp_cons: 0 }
    }

    /// Puts a request into the ring and shows it.
    pub fn push(&mut self, guest: &Guest, request: &[u8]) {
        let at = self.page + 64 + u64::from(self.req_prod % self.slots) * self.slot;
        guest.memory.write_slice(request, GuestAddress(at)).unwrap();
        self.req_prod += 1;
        guest.put_u32(self.page, self.req_prod);
    }

    /// The next response, if there is one.
    pub fn pop<const N: usize>(&mut self, guest: &Guest) -> Option<[u8; N]> {
        if guest.u32_at(self.page + 8) == self.rsp_cons {
            return None;
        }
        let at = self.page + 64 + u64::from(self.rsp_cons % self.slots) * self.slot;
        self.rsp_cons += 1;
        let mut bytes = [0; N];
        guest.memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        Some(bytes)
    }
}
