//! What this host can do, measured and not guessed.
//!
//! On some machines `/dev/kvm` opens and makes machines but executes supervisor code by emulation, a thousand times too slow, and
//! stops on ordinary instructions. So [`probe`] runs a guest of a few bytes in 64-bit ring 0: a counting loop for some tens of
//! milliseconds, then one `lock cmpxchg16b`. [`HostAbilities::choose`] is what `--backend auto` does with the answer.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};
use vmm::time::{HostClock, Timers};
use vmm::{Backend, BackendError, Bus, Entry, Exit, RegisterMask, Registers, Segment, VcpuId, VmConfig};

use crate::KvmBackend;

/// Slower than this, and the software CPU is the better choice: it does about as much, and executes everything.
pub const USABLE_MIPS: f64 = 50.0;
/// How long the loop is measured.
const MEASURE: Duration = Duration::from_millis(40);
/// A machine that says nothing for this long has failed.
const PATIENCE: Duration = Duration::from_secs(2);

/// What the host's processors and kernel offer.
#[derive(Debug, Clone)]
pub struct HostAbilities {
    /// `VMX/EPT`, `SVM/RVI`, or what is missing of them.
    pub processor: String,
    /// How fast KVM runs a guest's kernel, or why it does not.
    pub kvm: Result<Speed, String>,
}

/// How fast ring-0 code ran.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Speed {
    /// Millions of instructions a second.
    pub mips: f64,
}

impl HostAbilities {
    /// Whether KVM is of use here: `Ok` with the reason for it, `Err` with the reason against it.
    pub fn choose(&self) -> Result<String, String> {
        match &self.kvm {
            Ok(speed) if speed.mips >= USABLE_MIPS => Ok(format!("KVM runs guest kernels at {speed}")),
            Ok(speed) => Err(format!("KVM runs guest kernels at only {speed}, less than the {USABLE_MIPS} that make it worth using")),
            Err(why) => Err(why.clone()),
        }
    }
}

impl fmt::Display for HostAbilities {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "processor: {}", self.processor)?;
        match &self.kvm {
            Ok(speed) => writeln!(f, "/dev/kvm:  ring 0 at {speed}")?,
            Err(why) => writeln!(f, "/dev/kvm:  {why}")?,
        }
        match self.choose() {
            Ok(why) => write!(f, "auto:      kvm ({why})"),
            Err(why) => write!(f, "auto:      soft ({why})"),
        }
    }
}

impl fmt::Display for Speed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.mips < 10.0 { write!(f, "{:.1} MIPS", self.mips) } else { write!(f, "{:.0} MIPS", self.mips) }
    }
}

/// Looks at the host and measures its KVM. Takes about a tenth of a second.
pub fn probe() -> HostAbilities {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    HostAbilities { processor: describe_processor(&info), kvm: measure() }
}

/// What vmm(4) prints when it attaches: `VMX/EPT` or `SVM/RVI`, without its second half where there is no nested paging; plain `KVM`
/// where the processor shows neither.
pub(crate) fn host_technology() -> &'static str {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    match Flags::parse(&info) {
        Flags { vmx: true, ept: true, .. } => "VMX/EPT",
        Flags { vmx: true, .. } => "VMX",
        Flags { svm: true, npt: true, .. } => "SVM/RVI",
        Flags { svm: true, .. } => "SVM",
        _ => "KVM",
    }
}

/// Whether KVM lets a guest's programs, and not only its kernel, use VMware's backdoor: the module's parameter `enable_vmware_backdoor`
/// (Linux `Documentation/admin-guide/kernel-parameters.txt`). `None` without the module.
pub fn vmware_backdoor() -> Option<bool> {
    let parameter = std::fs::read_to_string("/sys/module/kvm/parameters/enable_vmware_backdoor").ok()?;
    Some(parameter.trim() == "Y")
}

/// The error of opening /dev/kvm, with what to do about it.
pub(crate) fn open_error(source: std::io::Error) -> BackendError {
    let what = match source.kind() {
        std::io::ErrorKind::NotFound => {
            "/dev/kvm is not there: the kernel has no KVM module loaded (kvm_intel or kvm_amd), or this is a container or a virtual machine without it"
        }
        std::io::ErrorKind::PermissionDenied => {
            "/dev/kvm is not yours to open: join the group `kvm` (usermod -aG kvm $USER) and log in again"
        }
        _ => "/dev/kvm does not open",
    };
    BackendError::Host { what: what.into(), source }
}

struct Flags {
    vmx: bool,
    ept: bool,
    svm: bool,
    npt: bool,
    hypervisor: bool,
}

impl Flags {
    /// From the flags of the first processor in /proc/cpuinfo.
    fn parse(info: &str) -> Flags {
        let has = |name: &str| {
            info.lines()
                .take_while(|line| !line.is_empty())
                .filter(|line| line.starts_with("flags") || line.starts_with("vmx flags"))
                .any(|line| line.split_whitespace().any(|word| word == name))
        };
        Flags { vmx: has("vmx"), ept: has("ept"), svm: has("svm"), npt: has("npt"), hypervisor: has("hypervisor") }
    }
}

fn describe_processor(info: &str) -> String {
    let flags = Flags::parse(info);
    match flags {
        Flags { vmx: true, ept: true, .. } => "VMX/EPT".into(),
        Flags { svm: true, npt: true, .. } => "SVM/RVI".into(),
        Flags { vmx: true, .. } => "VMX, but no extended page tables (EPT)".into(),
        Flags { svm: true, .. } => "SVM, but no nested paging (RVI)".into(),
        Flags { hypervisor: true, .. } => {
            "no VMX and no SVM: this is itself a virtual machine, whose host does not pass them on (nested virtualization)".into()
        }
        _ => "no VMX and no SVM: the processor has none, or the firmware's setup has disabled them".into(),
    }
}

/// Port at which the probe guest asks how often to count.
const PORT_COUNT: u16 = 0x10;
/// Port at which it reports that `lock cmpxchg16b` was executed.
const PORT_DONE: u16 = 0x11;
/// Instructions of one iteration of its loop.
const ROUND: u64 = 3;
/// Iterations of the first round; each one after it has three times as many.
const FIRST_ROUND: u32 = 1000;
/// Fewer rounds than this say nothing.
const MIN_ROUNDS: u32 = 3;

/// ```text
/// again: in    eax, 0x10
///        test  eax, eax
///        jz    done
/// count: add   rbx, 1
///        dec   eax
///        jnz   count
///        jmp   again
/// done:  lock  cmpxchg16b [rdi]
///        out   0x11, al
/// ```
const CODE: &[u8] = &[
    0xe5, 0x10, // in eax, 0x10
    0x85, 0xc0, // test eax, eax
    0x74, 0x0a, // jz done
    0x48, 0x83, 0xc3, 0x01, // add rbx, 1
    0xff, 0xc8, // dec eax
    0x75, 0xf8, // jnz count
    0xeb, 0xf0, // jmp again
    0xf0, 0x48, 0x0f, 0xc7, 0x0f, // lock cmpxchg16b [rdi]
    0xe6, 0x11, // out 0x11, al
];

/// Where the probe guest's parts are: page tables, code, the operand of cmpxchg16b.
const TABLES: u64 = 0x1000;
const CODE_AT: u64 = 0x4000;
const OPERAND_AT: u64 = 0x5000;
const MEMORY: u64 = 0x10000;

fn measure() -> Result<Speed, String> {
    let backend = KvmBackend::new().map_err(|e| e.to_string())?;
    let memory = vmm::memory::map(&[(0, MEMORY)]).map_err(|e| e.to_string())?;
    let config = VmConfig {
        memory: Arc::clone(&memory),
        vcpus: 1,
        local_apic: false,
        cpuid: backend.supported_cpuid(),
        timers: Timers::new(Arc::new(HostClock::new())),
        deterministic: false,
    };
    let write = |bytes: &[u8], gpa: u64| memory.write_slice(bytes, GuestAddress(gpa)).map_err(|e| e.to_string());
    write(CODE, CODE_AT)?;
    // One 2 MiB page at 0: PML4, PDPT, PD; present, writable, and PS in the last (Intel SDM vol. 3 section 5.5).
    write(&(TABLES + 0x1003).to_le_bytes(), TABLES)?;
    write(&(TABLES + 0x2003).to_le_bytes(), TABLES + 0x1000)?;
    write(&0x83u64.to_le_bytes(), TABLES + 0x2000)?;
    let vm = backend.create_vm(config).map_err(|e| e.to_string())?;
    let mut vcpu = vm.create_vcpu(0).map_err(|e| e.to_string())?;
    vcpu.set_registers(&long_mode(), RegisterMask::all()).map_err(|e| e.to_string())?;

    let bus = ProbeBus::default();
    let start = Instant::now();
    let exit = {
        let (done, watch) = std::sync::mpsc::channel::<()>();
        std::thread::scope(|scope| {
            let vm = &vm;
            scope.spawn(move || {
                if watch.recv_timeout(PATIENCE) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
                    vm.kick(0);
                }
            });
            let exit = vcpu.run(&bus, Entry::default());
            drop(done);
            exit
        })
    };
    match exit {
        Ok(Exit::PortOut { port: PORT_DONE, .. }) => bus.speed().ok_or_else(|| "KVM did not run the probe guest's loop".into()),
        Ok(Exit::Interrupted) => Err(format!("KVM did not finish a loop of milliseconds in {:.1} s", start.elapsed().as_secs_f32())),
        Ok(exit) => Err(format!("KVM left the probe guest with {exit:?}")),
        Err(error) => {
            let text = error.to_string();
            let instruction = text.lines().find_map(|line| line.strip_prefix("instruction:")).map(str::trim);
            let at = instruction.map(|i| format!(" at `{i}`")).unwrap_or_default();
            let speed = bus.speed().map(|s| format!(", after ring 0 ran at {s}")).unwrap_or_default();
            Err(format!("KVM stops with an internal error{at}{speed}"))
        }
    }
}

/// 64-bit ring 0 with flat segments, paging by `TABLES`.
fn long_mode() -> Registers {
    let data = Segment { selector: 0x10, limit: u32::MAX, access: 0xc093, base: 0 };
    let mut registers = Registers {
        rip: CODE_AT,
        cr0: 0x8000_0033, // PG, NE, ET, MP, PE
        cr3: TABLES,
        cr4: 0x620,  // PAE, OSFXSR, OSXMMEXCPT
        efer: 0x500, // LMA, LME
        cs: Segment { selector: 8, limit: u32::MAX, access: 0xa09b, base: 0 },
        ss: data,
        ds: data,
        es: data,
        fs: data,
        gs: data,
        ..Registers::reset()
    };
    registers.gpr[vmm::registers::RDI] = OPERAND_AT;
    registers
}

/// Hands out counts, each time more, until the loop has run long enough to say how fast it is.
#[derive(Default)]
struct ProbeBus {
    measured: std::sync::Mutex<Measured>,
}

#[derive(Default)]
struct Measured {
    /// When the round under way began.
    since: Option<Instant>,
    /// Its iterations.
    count: u32,
    rounds: u32,
    total: Duration,
    /// The fastest round. Others were interrupted by this host's other work, or were mostly the way in and out.
    best: Option<Speed>,
}

impl Measured {
    /// The round under way has ended: the iterations of the next one, or 0 when it was the last.
    fn next_round(&mut self, now: Instant) -> u32 {
        if let Some(since) = self.since {
            let time = now - since;
            let mips = (ROUND * u64::from(self.count)) as f64 / time.as_secs_f64().max(1e-9) / 1e6;
            if self.best.is_none_or(|best| best.mips < mips) {
                self.best = Some(Speed { mips });
            }
            self.rounds += 1;
            self.total += time;
        }
        if self.total >= MEASURE && self.rounds >= MIN_ROUNDS {
            return 0;
        }
        self.since = Some(now);
        self.count = if self.rounds == 0 { FIRST_ROUND } else { self.count.saturating_mul(3) };
        self.count
    }
}

impl ProbeBus {
    fn speed(&self) -> Option<Speed> {
        self.measured.lock().ok()?.best
    }
}

impl Bus for ProbeBus {
    fn port_in(&self, _: VcpuId, port: u16, _: u8) -> Option<u32> {
        let Ok(mut measured) = self.measured.lock() else { return Some(0) };
        Some(if port == PORT_COUNT { measured.next_round(Instant::now()) } else { 0 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INTEL: &str = "processor\t: 0\nflags\t\t: fpu vmx sse\nvmx flags\t: vnmi ept vpid\n\nprocessor\t: 1\n";
    const AMD: &str = "processor\t: 0\nflags\t\t: fpu svm npt\n";

    #[test]
    fn processor_abilities_are_read_from_the_flags() {
        assert_eq!(describe_processor(INTEL), "VMX/EPT");
        assert_eq!(describe_processor(AMD), "SVM/RVI");
        assert!(describe_processor("flags : fpu vmx").contains("no extended page tables"));
        assert!(describe_processor("flags : fpu hypervisor").contains("itself a virtual machine"));
        assert!(describe_processor("flags : fpu").contains("firmware"));
    }

    #[test]
    fn slow_or_failing_kvm_is_not_chosen() {
        let host = |kvm| HostAbilities { processor: String::new(), kvm };
        assert!(host(Ok(Speed { mips: 3000.0 })).choose().is_ok());
        assert!(host(Ok(Speed { mips: 2.0 })).choose().unwrap_err().contains("2.0 MIPS"));
        assert_eq!(host(Err("no".into())).choose().unwrap_err(), "no");
    }

    #[test]
    fn one_round_that_was_interrupted_does_not_make_kvm_slow() {
        let mut measured = Measured::default();
        let mut now = Instant::now();
        let mut rounds = 0;
        loop {
            let count = measured.next_round(now);
            if count == 0 {
                break;
            }
            rounds += 1;
            // A thousand iterations a microsecond, but the first round had to wait.
            now += Duration::from_nanos(u64::from(count)) + Duration::from_millis(if rounds == 1 { 60 } else { 0 });
        }
        assert_eq!(rounds, MIN_ROUNDS);
        assert!((2900.0..3100.0).contains(&measured.best.unwrap().mips));
    }

    #[test]
    fn open_errors_say_what_to_do() {
        let text = |code| open_error(std::io::Error::from_raw_os_error(code)).to_string();
        assert!(text(libc::EACCES).contains("group `kvm`"));
        assert!(text(libc::ENOENT).contains("kvm_intel"));
    }

    #[test]
    fn probing_this_host_gives_an_answer_with_a_reason() {
        let abilities = probe();
        eprintln!("{abilities}");
        let (Ok(why) | Err(why)) = abilities.choose();
        assert!(!why.is_empty());
    }
}
