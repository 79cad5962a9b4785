//! The oracle: executes one instruction on the host's processor, in this process.
//!
//! A signal to ourselves enters the case: the handler keeps the interrupted context and replaces it by the case's state, so the
//! kernel's return from the handler loads every register. The instruction is followed by INT3, so it ends in a signal in any
//! case; that handler takes the state and puts the kept context back.
#![allow(unsafe_code)] // Signal contexts, fixed mappings.

use std::sync::{Mutex, MutexGuard, Once, PoisonError};

use crate::state::{Fault, Outcome, State};

/// Signal that enters a case.
const ENTER: i32 = libc::SIGUSR1;

static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
static SETUP: Once = Once::new();

/// What the handlers work on; only while a `Host` is locked, and only on its thread.
static mut RUN: Run = Run { gpr: [0; 16], rip: 0, rflags: 0, fx: [0; 512], vector: 0, error: 0, address: 0, kept: None };

struct Run {
    gpr: [u64; 16],
    rip: u64,
    rflags: u64,
    fx: [u8; 512],
    vector: u64,
    error: u64,
    address: u64,
    /// General registers and FXSAVE area of the interrupted context.
    kept: Option<([i64; 23], [u8; 512])>,
}

/// The host's processor.
pub struct Host {
    _guard: MutexGuard<'static, ()>,
}

/// Order of the general registers in a signal context.
const REGISTERS: [i32; 16] = [
    libc::REG_RAX,
    libc::REG_RCX,
    libc::REG_RDX,
    libc::REG_RBX,
    libc::REG_RSP,
    libc::REG_RBP,
    libc::REG_RSI,
    libc::REG_RDI,
    libc::REG_R8,
    libc::REG_R9,
    libc::REG_R10,
    libc::REG_R11,
    libc::REG_R12,
    libc::REG_R13,
    libc::REG_R14,
    libc::REG_R15,
];

impl Host {
    /// Waits for the oracle and prepares this thread.
    pub fn lock() -> Host {
        let guard = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        SETUP.call_once(|| {
            map(State::CODE, 4096, libc::PROT_READ | libc::PROT_WRITE);
            map(State::DATA, State::DATA_SIZE, libc::PROT_READ | libc::PROT_WRITE);
            for signal in [ENTER, libc::SIGTRAP, libc::SIGSEGV, libc::SIGILL, libc::SIGFPE, libc::SIGBUS] {
                // SAFETY: a handler that only touches its context and `RUN`.
                unsafe {
                    let mut action: libc::sigaction = std::mem::zeroed();
                    action.sa_sigaction = if signal == ENTER { enter as *const () as usize } else { leave as *const () as usize };
                    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
                    assert_eq!(libc::sigaction(signal, &action, std::ptr::null_mut()), 0);
                }
            }
        });
        // SAFETY: a fresh mapping as this thread's signal stack; the guest's RSP is anything.
        unsafe {
            let size = 1 << 16;
            let stack =
                libc::mmap(std::ptr::null_mut(), size, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0);
            assert_ne!(stack, libc::MAP_FAILED);
            let alternate = libc::stack_t { ss_sp: stack, ss_flags: 0, ss_size: size };
            assert_eq!(libc::sigaltstack(&alternate, std::ptr::null_mut()), 0);
        }
        Host { _guard: guard }
    }

    /// Executes `bytes` once.
    pub fn execute(&mut self, bytes: &[u8], state: &State) -> Outcome {
        // SAFETY: the mappings were made in `lock` and belong to the oracle; `RUN` is ours while we are locked.
        unsafe {
            let code = State::CODE as *mut u8;
            assert_eq!(libc::mprotect(code.cast(), 4096, libc::PROT_READ | libc::PROT_WRITE), 0);
            std::ptr::write_bytes(code, 0xcc, 4096);
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), code, bytes.len());
            assert_eq!(libc::mprotect(code.cast(), 4096, libc::PROT_READ | libc::PROT_EXEC), 0);
            let data = State::DATA as *mut u8;
            let read_only = data.add(State::WRITABLE).cast();
            let rest = State::DATA_SIZE - State::WRITABLE;
            assert_eq!(libc::mprotect(read_only, rest, libc::PROT_READ | libc::PROT_WRITE), 0);
            std::ptr::copy_nonoverlapping(state.data.as_ptr(), data, State::DATA_SIZE);
            assert_eq!(libc::mprotect(read_only, rest, libc::PROT_READ), 0);
            let run = &raw mut RUN;
            (*run).gpr = state.gpr;
            (*run).rip = State::CODE;
            (*run).rflags = state.rflags;
            (*run).fx = state.fx;
            libc::syscall(libc::SYS_tgkill, libc::getpid(), libc::syscall(libc::SYS_gettid), ENTER);
            let mut end = State { gpr: (*run).gpr, rip: (*run).rip, rflags: (*run).rflags, fx: (*run).fx, data: vec![0; State::DATA_SIZE] };
            std::ptr::copy_nonoverlapping(data, end.data.as_mut_ptr(), State::DATA_SIZE);
            let fault = match (*run).vector {
                // The INT3 behind the instruction, or at the target of a branch inside the page.
                3 => {
                    end.rip -= 1;
                    None
                }
                // A branch out of the page: complete, the fetch at the target is what faults.
                14 if (*run).address == end.rip && end.rip != State::CODE => None,
                // Linux says "present" for all addresses of the kernel's half and of the page before it.
                14 if (*run).address >= (1 << 47) - 4096 => Some(Fault { vector: 14, error: (*run).error & !1, address: (*run).address }),
                14 => Some(Fault { vector: 14, error: (*run).error, address: (*run).address }),
                vector => Some(Fault { vector: vector as u8, error: (*run).error, address: 0 }),
            };
            Outcome { state: end, fault }
        }
    }
}

fn map(at: u64, size: usize, protection: i32) {
    // SAFETY: a fixed place that nobody else uses in a 64-bit process; NOREPLACE makes sure.
    let got = unsafe {
        libc::mmap(
            at as *mut libc::c_void,
            size,
            protection,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE | libc::MAP_POPULATE,
            -1,
            0,
        )
    };
    assert_eq!(got as u64, at, "no room at {at:#x}: {}", std::io::Error::last_os_error());
}

extern "C" fn enter(_signal: i32, _info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel hands a valid context; `RUN` belongs to the thread that sent the signal to itself.
    unsafe {
        let context = context.cast::<libc::ucontext_t>();
        let registers = &mut (*context).uc_mcontext.gregs;
        let area = (*context).uc_mcontext.fpregs.cast::<u8>();
        let run = &raw mut RUN;
        let mut fx = [0; 512];
        std::ptr::copy_nonoverlapping(area, fx.as_mut_ptr(), 512);
        (*run).kept = Some((*registers, fx));
        for (n, register) in REGISTERS.iter().enumerate() {
            registers[*register as usize] = (*run).gpr[n] as i64;
        }
        registers[libc::REG_RIP as usize] = (*run).rip as i64;
        registers[libc::REG_EFL as usize] = (*run).rflags as i64;
        // Bytes 464 to 511 are the kernel's.
        std::ptr::copy_nonoverlapping((*run).fx.as_ptr(), area, 416);
    }
}

extern "C" fn leave(signal: i32, _info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: as in `enter`.
    unsafe {
        let context = context.cast::<libc::ucontext_t>();
        let registers = &mut (*context).uc_mcontext.gregs;
        let area = (*context).uc_mcontext.fpregs.cast::<u8>();
        let run = &raw mut RUN;
        let Some((kept, fx)) = (*run).kept.take() else {
            // Not a case of ours: a bug in the test itself. Die of the same signal.
            libc::signal(signal, libc::SIG_DFL);
            return;
        };
        for (n, register) in REGISTERS.iter().enumerate() {
            (*run).gpr[n] = registers[*register as usize] as u64;
        }
        (*run).rip = registers[libc::REG_RIP as usize] as u64;
        (*run).rflags = registers[libc::REG_EFL as usize] as u64;
        (*run).vector = registers[libc::REG_TRAPNO as usize] as u64;
        (*run).error = registers[libc::REG_ERR as usize] as u64;
        (*run).address = registers[libc::REG_CR2 as usize] as u64;
        std::ptr::copy_nonoverlapping(area, (&raw mut (*run).fx).cast::<u8>(), 512);
        *registers = kept;
        std::ptr::copy_nonoverlapping(fx.as_ptr(), area, 416);
    }
}
