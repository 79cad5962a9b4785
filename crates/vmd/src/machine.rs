//! One machine from power-on to its end.
//!
//! [`run`] chooses the backend, then makes a machine, runs it until something ends it, and, when the guest asked for a reset,
//! makes a fresh one from the same configuration: a reset leaves nothing behind because nothing of the old machine is kept.
//!
//! ```text
//!   run ── boot::load ── Board (devices, bus) ── one thread a processor ── Vcpu::run(bus)
//!    ^                                                  |                      |
//!    +------- first Event wins: power off, reset, debug exit, death, stop <----+
//! ```

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use devices::block::DiskError;
use dialects::kvm::StealSource;
use vmm::attach::Attachment;
use vmm::monitor::{VmId, Vmm, VmmError};
use vmm::time::{Clock, HostClock, StepClock, Timers};
use vmm::{BackendError, BackendVm, Entry, Exit, RegisterMask, VcpuId, VmConfig};

use crate::backends::{self, Chosen};
use crate::board::{self, Board, BoardError, Parts, Start};
use crate::boot::{self, BootError};
use crate::bus::MachineBus;
use crate::config::{DialectName, Kernel, MachineConfig, SerialTarget, Uuid};
use crate::control::{Control, Running};
use crate::fw_cfg;
use crate::kv::ValueError;
use crate::paravirtual::{Paravirtual, Surroundings};
use crate::profile;
use crate::socket::server::ServerError;
use crate::stats::RunStats;
use crate::status::About;
use crate::steal::RunDelay;
use crate::store::StoreServer;
use crate::xen;

/// Name under which INFO shows the machine.
const MACHINE_NAME: &str = "machine";
/// Time of day at which a deterministic machine starts: 2024-01-01 00:00 UTC.
const DETERMINISTIC_EPOCH: Duration = Duration::from_secs(1_704_067_200);
/// The host's source of random bytes.
const RANDOM: &str = "/dev/urandom";
/// What a deterministic machine gets for random bytes.
const DETERMINISTIC_RANDOM: u8 = 0x5a;
const DETERMINISTIC_NUMBER: u64 = u64::from_ne_bytes([DETERMINISTIC_RANDOM; 8]);

/// Why a machine could not be made, or could not go on.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// The kernel, or what belongs to it.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// A disk's image.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// A device.
    #[error(transparent)]
    Board(#[from] BoardError),
    /// The monitor or its backend.
    #[error(transparent)]
    Monitor(#[from] VmmError),
    /// A file for the guest.
    #[error(transparent)]
    Value(#[from] ValueError),
    /// The store's socket.
    #[error(transparent)]
    Store(#[from] ServerError),
    /// A file of the command line.
    #[error("{}: {source}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// The host's answer.
        source: std::io::Error,
    },
    /// The host's operating system.
    #[error("{what}: {source}")]
    Host {
        /// What was asked of the host.
        what: &'static str,
        /// Its answer.
        source: std::io::Error,
    },
}

/// How a machine ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The guest powered off.
    PowerOff,
    /// The guest reset the machine, and was not to be rebooted.
    Reset,
    /// The guest wrote this to the debug-exit port.
    DebugExit(u32),
    /// Triple fault.
    GuestDied {
        /// Which processor.
        cpu: VcpuId,
        /// Its registers, for people.
        registers: String,
    },
    /// [`Control::stop`].
    Stopped,
}

/// A finished run.
#[derive(Debug)]
pub struct Report {
    /// How it ended.
    pub outcome: Outcome,
    /// What it cost.
    pub stats: RunStats,
}

/// What devices, processors and people tell the machine.
#[derive(Debug)]
pub enum Event {
    /// It is over.
    End(Outcome),
    /// The backend cannot go on.
    Failed(VmmError),
    /// The guest has something to say to people.
    Said(String),
}

/// Where events go; cheap to clone.
pub type EventSender = Sender<Event>;

/// Memory of the host in bytes, in whole mebibytes.
pub fn host_memory() -> u64 {
    let info = rustix::system::sysinfo();
    info.totalram.saturating_mul(u64::from(info.mem_unit)) & !((1 << 20) - 1)
}

/// Runs the machine to its end. Tells by `say`, line by line, what was chosen and recognised.
///
/// # Errors
/// [`MachineError`] when it cannot be made, or the backend fails.
pub fn run(config: &MachineConfig, control: &Control, say: &dyn Fn(&str)) -> Result<Report, MachineError> {
    let store_server = StoreServer::new(control.store().shared().clone(), config.xenstore.as_deref())?;
    let mut first_image = Some(recognise(config)?);
    let Chosen { backend, reason } = backends::choose(config).map_err(VmmError::from)?;
    say(&Attachment::new(backend.as_ref(), Some(reason)).to_string());
    for warning in config.dialects.warnings() {
        say(&format!("--dialect {}: {warning}", config.dialects));
    }
    if config.dialects.contains(DialectName::Vmware) && backend.name() == "kvm" && kvm::probe::vmware_backdoor() == Some(false) {
        say("VMware's tools in the guest need ioperm(2) as root: kvm.enable_vmware_backdoor is off; or use --backend soft");
    }
    let vmm = Arc::new(Vmm::new(backend));
    let identity = identity(config)?;
    control.introduce(About::new(config, identity, vmm.backend().technology()));

    for target in std::iter::once(&config.serial).chain(&config.console) {
        let SerialTarget::File(path) = target else { continue };
        // Emptied once: the board appends, so that reboots follow each other.
        File::create(path).map_err(|source| MachineError::File { path: path.clone(), source })?;
    }
    control.inventory().take(config)?;
    let mut stats = RunStats::default();
    let started = Instant::now();
    let outcome = loop {
        // Read again for a reboot: a kernel's file is larger than everything else the monitor needs while it runs.
        let image = match first_image.take() {
            Some(image) => image,
            None => recognise(config)?,
        };
        let mut machine = Machine::assemble(config, identity, &image, &vmm, control, &store_server, say)?;
        drop(image);
        let event = machine.run(control, say);
        machine.take_down(&mut stats);
        match event {
            Event::End(Outcome::Reset) if config.reboot => stats.add_reboot(),
            Event::End(outcome) => break outcome,
            Event::Failed(error) => return Err(error.into()),
            Event::Said(_) => {}
        }
    };
    stats.set_wall(started.elapsed());
    control.inventory().flush().map_err(|source| MachineError::Host { what: "cannot write a disk back", source })?;
    Ok(Report { outcome, stats })
}

fn recognise(config: &MachineConfig) -> Result<boot::Image, BootError> {
    match (&config.kernel, &config.bios) {
        (Some(Kernel::BuiltIn { name, data }), _) => boot::recognise_bytes(name, data),
        (Some(Kernel::File(path)), _) | (None, Some(path)) => boot::recognise(path),
        (None, None) => boot::find_bios(),
    }
}

/// The machine's UUID, the same over its reboots. One of our own making is of version 4 (RFC 9562 section 5.4).
fn identity(config: &MachineConfig) -> Result<Uuid, MachineError> {
    if let Some(uuid) = config.uuid {
        return Ok(uuid);
    }
    let mut bytes = [0; 16];
    random(config)?.read_exact(&mut bytes).map_err(|source| MachineError::Host { what: RANDOM, source })?;
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    Ok(Uuid(bytes))
}

/// Random bytes, or those that a deterministic machine gets for them.
fn random(config: &MachineConfig) -> Result<Box<dyn Read>, MachineError> {
    Ok(match config.deterministic {
        true => Box::new(std::io::repeat(DETERMINISTIC_RANDOM)),
        false => Box::new(File::open(RANDOM).map_err(|source| MachineError::Host { what: RANDOM, source })?),
    })
}

/// One that nobody can guess. (getrandom(2) gives eight bytes without fail.)
fn random_number() -> u64 {
    let mut bytes = [0; 8];
    let _ = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty());
    u64::from_ne_bytes(bytes)
}

/// A machine with power on.
struct Machine {
    vmm: Arc<Vmm>,
    id: VmId,
    vm: Arc<dyn BackendVm>,
    cpus: u32,
    bus: Arc<MachineBus>,
    timers: Arc<Timers>,
    timer_thread: Option<JoinHandle<()>>,
    run_delay: Option<Arc<RunDelay>>,
    running: Vec<JoinHandle<Returns>>,
    stop: Arc<AtomicBool>,
    events: Receiver<Event>,
    sender: EventSender,
    board: Arc<Board>,
}

/// How often [`Vmm::run`] came back, by the exit's name.
type Returns = BTreeMap<&'static str, u64>;

impl Machine {
    fn assemble(
        config: &MachineConfig,
        identity: Uuid,
        image: &boot::Image,
        vmm: &Arc<Vmm>,
        control: &Control,
        store_server: &StoreServer,
        say: &dyn Fn(&str),
    ) -> Result<Machine, MachineError> {
        let mut ranges = boot::layout(config.memory.0, image.rom_size());
        if config.dialects.contains(DialectName::Xen) {
            ranges.extend(xen::memory(config.memory.0));
            ranges.sort_unstable();
        }
        let memory = vmm::memory::map(&ranges).map_err(|source| MachineError::Host { what: "cannot get memory for the guest", source })?;
        let clock: Arc<dyn Clock> =
            if config.deterministic { Arc::new(StepClock::new(DETERMINISTIC_EPOCH)) } else { Arc::new(HostClock::new()) };
        let timers = Timers::new(Arc::clone(&clock));
        let backend_kvm = vmm.backend().kvm_dialect();
        // Equal runs have equal times, none of them stolen.
        let run_delay = if config.deterministic || backend_kvm.is_some() { None } else { RunDelay::new(config.cpus).map(Arc::new) };
        let surroundings = Surroundings {
            memory: memory.clone(),
            ram: config.memory.0,
            timers: Arc::clone(&timers),
            frequencies: vmm.backend().frequencies().map_err(VmmError::from)?,
            vcpus: config.cpus,
            backend_kvm,
            steal: run_delay.clone().map(|delay| delay as Arc<dyn StealSource>),
            store: control.store().clone(),
            uuid: identity,
            random: if config.deterministic { || DETERMINISTIC_NUMBER } else { random_number },
        };
        let paravirtual = Arc::new(Paravirtual::new(config.dialects.dialects(), &surroundings));
        let vm_config = VmConfig {
            memory: memory.clone(),
            vcpus: config.cpus,
            local_apic: true,
            cpuid: profile::cpuid(vmm.backend().supported_cpuid(), config.cpus, &paravirtual.dialects),
            timers: Arc::clone(&timers),
            deterministic: config.deterministic,
        };
        let id = vmm.create_with(vm_config, MACHINE_NAME)?;
        let vm = vmm.machine(id)?;
        paravirtual.connect(&vm);

        let (sender, events) = mpsc::channel();
        let mut files = fw_cfg::keys(control.store().as_ref());
        for spec in &config.fw_cfg {
            files.push((spec.name.clone(), spec.source.read()?));
        }
        let start = match image {
            image if image.rom_size() != 0 => Start::Firmware,
            image if image.is_pvh() => Start::Pvh,
            _ => Start::Kernel,
        };
        let (store, inventory) = (control.store(), control.inventory());
        let parts = Parts { store, store_server, inventory, identity, start, paravirtual: &paravirtual, files };
        let (board, bus) = Board::build(config, parts, &vm, &memory, &timers, sender.clone())?;
        let board = Arc::new(board);
        let modules = if config.kernel.is_some() { config.initrds.iter().map(|text| module(text)).collect() } else { Vec::new() };
        let rsdp = board::place_tables(config, identity, start, &memory);
        let boot_config = boot::BootConfig { cmdline: config.cmdline.clone(), modules, memory_map: board::memory_map(config), rsdp };
        let loaded = boot::load(image, &memory, &boot_config, &mut random(config)?)?;
        say(&loaded.description);

        vmm.write_registers(id, 0, &loaded.registers, RegisterMask::all())?;
        let timer_thread = match config.deterministic {
            true => None,
            false => Some(timers.spawn().map_err(|source| MachineError::Host { what: "cannot start a thread", source })?),
        };
        control.attach(Running { events: sender.clone(), board: Arc::clone(&board), paravirtual });
        let stop = Arc::new(AtomicBool::new(false));
        let (vmm, bus) = (Arc::clone(vmm), Arc::new(bus));
        Ok(Machine {
            vmm,
            id,
            vm,
            cpus: config.cpus,
            bus,
            timers,
            timer_thread,
            run_delay,
            running: Vec::new(),
            stop,
            events,
            sender,
            board,
        })
    }

    /// Starts the processors and waits for the event that ends the machine.
    fn run(&mut self, control: &Control, say: &dyn Fn(&str)) -> Event {
        for cpu in 0..self.cpus {
            let processor = Processor {
                vmm: Arc::clone(&self.vmm),
                machine: self.id,
                id: cpu,
                bus: Arc::clone(&self.bus),
                run_delay: self.run_delay.clone(),
                stop: Arc::clone(&self.stop),
                events: self.sender.clone(),
            };
            match std::thread::Builder::new().name(format!("cpu{cpu}")).spawn(move || processor.run()) {
                Ok(thread) => self.running.push(thread),
                Err(source) => {
                    let what = "cannot start a thread for a processor".into();
                    return Event::Failed(BackendError::Host { what, source }.into());
                }
            }
        }
        let event = loop {
            match self.events.recv() {
                Ok(Event::Said(text)) => say(&text),
                Ok(event) => break event,
                Err(_) => break Event::End(Outcome::Stopped),
            }
        };
        control.detach();
        event
    }

    /// Stops all threads and collects the counters.
    fn take_down(mut self, stats: &mut RunStats) {
        self.stop.store(true, Ordering::SeqCst);
        for (id, _) in (0..).zip(&self.running) {
            self.vm.kick(id);
        }
        for (cpu, thread) in (0..).zip(self.running.drain(..)) {
            // A processor thread that panicked has said so; its counters are lost.
            if let Ok(returns) = thread.join()
                && let Ok(counters) = self.vmm.with_vcpu(self.id, cpu, |vcpu| vcpu.stats())
            {
                stats.add_processor(counters, &returns);
            }
        }
        self.timers.stop();
        if let Some(thread) = self.timer_thread.take() {
            let _ = thread.join();
        }
        self.board.shut_down();
        // Nobody else terminates it.
        let _ = self.vmm.terminate(self.id);
        stats.add_unowned(self.bus.unowned());
    }
}

/// A processor's thread.
struct Processor {
    vmm: Arc<Vmm>,
    machine: VmId,
    id: VcpuId,
    bus: Arc<MachineBus>,
    run_delay: Option<Arc<RunDelay>>,
    stop: Arc<AtomicBool>,
    events: EventSender,
}

impl Drop for Processor {
    /// A bug of the monitor ends the machine; without this the others would wait for ever for the processor that panicked.
    fn drop(&mut self) {
        if std::thread::panicking() {
            let text = format!("the monitor's thread of processor {} panicked; its message stands above", self.id);
            let _ = self.events.send(Event::Failed(BackendError::Internal(text).into()));
        }
    }
}

impl Processor {
    fn run(&self) -> Returns {
        if let Some(delay) = &self.run_delay {
            delay.enter(self.id);
        }
        let mut returns = Returns::new();
        while !self.stop.load(Ordering::SeqCst) {
            let event = match self.vmm.run(self.machine, self.id, Entry::default(), self.bus.as_ref()) {
                Ok(exit) => {
                    *returns.entry(exit.name()).or_insert(0) += 1;
                    match exit {
                        Exit::Interrupted => continue,
                        Exit::PortOut { .. } if self.bus.has_ended() => break,
                        Exit::Shutdown => Event::End(Outcome::GuestDied { cpu: self.id, registers: self.dump() }),
                        other => {
                            let text =
                                format!("processor {} stopped with an exit that nobody asked for: {other:?}\n{}", self.id, self.dump());
                            Event::Failed(BackendError::Internal(text).into())
                        }
                    }
                }
                Err(error) => Event::Failed(error),
            };
            // Nobody listens any more when another processor was first.
            let _ = self.events.send(event);
            break;
        }
        returns
    }

    fn dump(&self) -> String {
        match self.vmm.read_registers(self.machine, self.id, RegisterMask::all()) {
            Ok(registers) => registers.to_string(),
            Err(error) => format!("(registers cannot be read: {error})"),
        }
    }
}

/// `FILE args` of `--initrd`.
fn module(text: &str) -> boot::Module {
    let (path, args) = text.split_once(' ').unwrap_or((text, ""));
    boot::Module { path: PathBuf::from(path), args: args.into() }
}
