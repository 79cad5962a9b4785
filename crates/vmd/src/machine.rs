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
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use dialects::Dialect;
use vmm::time::{Clock, HostClock, StepClock, Timers};
use vmm::{Backend, BackendError, BackendVm, Entry, Exit, RegisterMask, Vcpu, VcpuId, VmConfig};

use crate::backends::{self, Chosen};
use crate::board::{Board, BoardError};
use crate::boot::{self, BootError};
use crate::bus::MachineBus;
use crate::config::{DialectName, MachineConfig};
use crate::profile;
use crate::stats::RunStats;

/// Ticks a second of the software CPU's TSC: it counts the machine's nanoseconds.
const SOFT_TSC_HZ: u64 = 1_000_000_000;
/// Time of day at which a deterministic machine starts: 2024-01-01 00:00 UTC.
const DETERMINISTIC_EPOCH: Duration = Duration::from_secs(1_704_067_200);
/// What a deterministic machine's kernel gets for random bytes.
const DETERMINISTIC_RANDOM: u8 = 0x5a;

/// Why a machine could not be made, or could not go on.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// The kernel, or what belongs to it.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// A device.
    #[error(transparent)]
    Board(#[from] BoardError),
    /// The backend.
    #[error(transparent)]
    Backend(#[from] BackendError),
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
    Failed(BackendError),
}

/// Where events go; cheap to clone.
pub type EventSender = Sender<Event>;

/// The outside's hold on a running machine. Made before it, and good over its reboots.
#[derive(Default)]
pub struct Control {
    state: Mutex<ControlState>,
}

#[derive(Default)]
struct ControlState {
    stopped: bool,
    machine: Option<(EventSender, Arc<Board>)>,
}

impl Control {
    /// Ends the machine as if its plug was pulled.
    pub fn stop(&self) {
        let mut state = self.lock();
        state.stopped = true;
        if let Some((events, _)) = &state.machine {
            // A machine that has ended no longer listens.
            let _ = events.send(Event::End(Outcome::Stopped));
        }
    }

    /// Bytes typed at the first serial port. Waits while the guest does not read them.
    pub fn serial_input(&self, mut bytes: &[u8]) {
        const RETRY: Duration = Duration::from_millis(5);
        while !bytes.is_empty() {
            let board = {
                let state = self.lock();
                if state.stopped {
                    return;
                }
                state.machine.as_ref().map(|(_, board)| Arc::clone(board))
            };
            let taken = board.map_or(0, |board| board.serial_input(bytes));
            bytes = &bytes[taken..];
            if !bytes.is_empty() {
                std::thread::sleep(RETRY);
            }
        }
    }

    fn attach(&self, events: &EventSender, board: &Arc<Board>) {
        let mut state = self.lock();
        if state.stopped {
            let _ = events.send(Event::End(Outcome::Stopped));
        }
        state.machine = Some((events.clone(), Arc::clone(board)));
    }

    fn detach(&self) {
        self.lock().machine = None;
    }

    fn lock(&self) -> MutexGuard<'_, ControlState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Memory of the host in bytes, in whole mebibytes.
pub fn host_memory() -> u64 {
    let info = rustix::system::sysinfo();
    info.totalram.saturating_mul(u64::from(info.mem_unit)) & !((1 << 20) - 1)
}

/// Runs the machine to its end. Says on standard error what was chosen and recognised.
///
/// # Errors
/// [`MachineError`] when it cannot be made, or the backend fails.
pub fn run(config: &MachineConfig, control: &Control) -> Result<Report, MachineError> {
    let image = match config.kernel.as_deref().or(config.bios.as_deref()) {
        Some(path) => boot::recognise(path)?,
        None => boot::find_bios()?,
    };
    let Chosen { backend, reason } = backends::choose(config)?;
    eprintln!("vmctl: backend {}: {reason}", backend.name());

    let mut stats = RunStats::default();
    let started = Instant::now();
    let outcome = loop {
        let mut machine = Machine::assemble(config, &image, backend.as_ref(), control)?;
        let event = machine.run(control);
        machine.take_down(&mut stats);
        match event {
            Event::End(Outcome::Reset) if config.reboot => stats.add_reboot(),
            Event::End(outcome) => break outcome,
            Event::Failed(error) => return Err(error.into()),
        }
    };
    stats.set_wall(started.elapsed());
    Ok(Report { outcome, stats })
}

/// A machine with power on.
struct Machine {
    vm: Arc<dyn BackendVm>,
    bus: Arc<MachineBus>,
    timers: Arc<Timers>,
    timer_thread: Option<JoinHandle<()>>,
    waiting: Vec<Box<dyn Vcpu>>,
    running: Vec<JoinHandle<Finished>>,
    stop: Arc<AtomicBool>,
    events: Receiver<Event>,
    sender: EventSender,
    board: Arc<Board>,
}

/// What a processor's thread leaves.
struct Finished {
    vcpu: Box<dyn Vcpu>,
    returns: BTreeMap<&'static str, u64>,
}

impl Machine {
    fn assemble(config: &MachineConfig, image: &boot::Image, backend: &dyn Backend, control: &Control) -> Result<Machine, MachineError> {
        let ranges = boot::layout(config.memory.0, image.rom_size());
        let memory = vmm::memory::map(&ranges).map_err(|source| MachineError::Host { what: "cannot get memory for the guest", source })?;
        let clock: Arc<dyn Clock> =
            if config.deterministic { Arc::new(StepClock::new(DETERMINISTIC_EPOCH)) } else { Arc::new(HostClock::new()) };
        let timers = Timers::new(Arc::clone(&clock));
        let dialects: Vec<Arc<dyn Dialect>> = config
            .dialects
            .0
            .iter()
            .map(|name| match name {
                DialectName::Kvm => {
                    Arc::new(dialects::kvm::Kvm::new(memory.clone(), Arc::clone(&clock), SOFT_TSC_HZ, config.cpus)) as Arc<dyn Dialect>
                }
            })
            .collect();
        let vm = backend.create_vm(VmConfig {
            memory: memory.clone(),
            vcpus: config.cpus,
            local_apic: true,
            cpuid: profile::cpuid(backend.supported_cpuid(), config.cpus, &dialects),
            timers: Arc::clone(&timers),
            deterministic: config.deterministic,
        })?;

        let (sender, events) = mpsc::channel();
        let (board, bus) = Board::build(config, &vm, &memory, &timers, dialects, sender.clone())?;
        let board = Arc::new(board);
        let modules = if config.kernel.is_some() { config.initrds.iter().map(|text| module(text)).collect() } else { Vec::new() };
        let boot_config =
            boot::BootConfig { cmdline: config.cmdline.clone(), modules, memory_map: boot::e820(config.memory.0), rsdp: board.rsdp() };
        let mut random: Box<dyn Read> = match config.deterministic {
            true => Box::new(std::io::repeat(DETERMINISTIC_RANDOM)),
            false => Box::new(File::open("/dev/urandom").map_err(|source| MachineError::Host { what: "/dev/urandom", source })?),
        };
        let loaded = boot::load(image, &memory, &boot_config, &mut random)?;
        eprintln!("vmctl: {}", loaded.description);

        let mut waiting = (0..config.cpus).map(|id| vm.create_vcpu(id)).collect::<Result<Vec<_>, _>>()?;
        if let Some(first) = waiting.first_mut() {
            first.set_registers(&loaded.registers, RegisterMask::all())?;
        }
        let timer_thread = match config.deterministic {
            true => None,
            false => Some(timers.spawn().map_err(|source| MachineError::Host { what: "cannot start a thread", source })?),
        };
        control.attach(&sender, &board);
        let stop = Arc::new(AtomicBool::new(false));
        Ok(Machine { vm, bus: Arc::new(bus), timers, timer_thread, waiting, running: Vec::new(), stop, events, sender, board })
    }

    /// Starts the processors and waits for the event that ends the machine.
    fn run(&mut self, control: &Control) -> Event {
        for (id, vcpu) in (0..).zip(std::mem::take(&mut self.waiting)) {
            let (bus, stop, events) = (Arc::clone(&self.bus), Arc::clone(&self.stop), self.sender.clone());
            let thread = std::thread::Builder::new().name(format!("cpu{id}")).spawn(move || run_processor(id, vcpu, &bus, &stop, &events));
            match thread {
                Ok(thread) => self.running.push(thread),
                Err(source) => return Event::Failed(BackendError::Host { what: "cannot start a thread for a processor".into(), source }),
            }
        }
        let event = self.events.recv().unwrap_or(Event::End(Outcome::Stopped));
        control.detach();
        event
    }

    /// Stops all threads and collects the counters.
    fn take_down(mut self, stats: &mut RunStats) {
        self.stop.store(true, Ordering::SeqCst);
        for (id, _) in (0..).zip(&self.running) {
            self.vm.kick(id);
        }
        for thread in self.running.drain(..) {
            // A processor thread that panicked has said so; its counters are lost.
            if let Ok(finished) = thread.join() {
                stats.add_processor(finished.vcpu.stats(), &finished.returns);
            }
        }
        self.timers.stop();
        if let Some(thread) = self.timer_thread.take() {
            let _ = thread.join();
        }
        self.board.shut_down();
        stats.add_unowned(self.bus.unowned());
    }
}

/// The life of a processor's thread.
fn run_processor(id: VcpuId, mut vcpu: Box<dyn Vcpu>, bus: &MachineBus, stop: &AtomicBool, events: &EventSender) -> Finished {
    let mut returns = BTreeMap::new();
    while !stop.load(Ordering::SeqCst) {
        let event = match vcpu.run(bus, Entry::default()) {
            Ok(exit) => {
                *returns.entry(exit.name()).or_insert(0) += 1;
                match exit {
                    Exit::Interrupted => continue,
                    Exit::Shutdown => Event::End(Outcome::GuestDied { cpu: id, registers: dump(vcpu.as_ref()) }),
                    other => Event::Failed(BackendError::Internal(format!(
                        "processor {id} stopped with an exit that nobody asked for: {other:?}\n{}",
                        dump(vcpu.as_ref())
                    ))),
                }
            }
            Err(error) => Event::Failed(error),
        };
        // Nobody listens any more when another processor was first.
        let _ = events.send(event);
        break;
    }
    Finished { vcpu, returns }
}

fn dump(vcpu: &dyn Vcpu) -> String {
    match vcpu.registers(RegisterMask::all()) {
        Ok(registers) => registers.to_string(),
        Err(error) => format!("(registers cannot be read: {error})"),
    }
}

/// `FILE args` of `--initrd`.
fn module(text: &str) -> boot::Module {
    let (path, args) = text.split_once(' ').unwrap_or((text, ""));
    boot::Module { path: PathBuf::from(path), args: args.into() }
}
