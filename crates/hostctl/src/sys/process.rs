//! The process itself: what it may do, what catches its faults, how it goes into the background, and its end.
#![allow(unsafe_code)] // System calls with pointers, and a signal handler that looks into the context.

use core::arch::global_asm;
use core::{mem, ptr};

use linux_raw_sys::general::{
    __NR_chdir, __NR_dup2, __NR_exit_group, __NR_fork, __NR_geteuid, __NR_ioperm, __NR_mmap, __NR_munmap, __NR_rt_sigaction, __NR_setsid,
    MAP_ANONYMOUS, MAP_PRIVATE, PROT_READ, PROT_WRITE, SA_RESTORER, SA_SIGINFO, kernel_sigaction, siginfo_t,
};
use linux_raw_sys::signal_macros::SIG_DFL;

use super::file::Access;
use super::syscall::syscall;
use super::{Errno, File};

/// Bytes of the kernel's signal set.
const SIGNAL_SET: usize = 8;
/// Where a signal's context holds RIP: `struct ucontext` has flags, link and stack (40 bytes) before `struct sigcontext`, whose 17th word it is
/// (Linux `arch/x86/include/uapi/asm/{ucontext,sigcontext}.h`).
const CONTEXT_RIP: usize = 40 + 16 * 8;

// What a handler returns to: rt_sigreturn(2), as SA_RESTORER wants it.
global_asm!(".globl hostctl_restore", "hostctl_restore:", "mov eax, 15", "syscall");

unsafe extern "C" {
    fn hostctl_restore();
}

/// Whether this process acts as root.
#[must_use]
pub fn is_root() -> bool {
    // SAFETY: no memory.
    let user = unsafe { syscall(__NR_geteuid, []) };
    user == Ok(0)
}

/// ioperm(2): opens `count` ports from `first` on.
///
/// # Errors
/// The system's.
pub fn permit_ports(first: u16, count: u32) -> Result<(), Errno> {
    // SAFETY: no memory.
    unsafe { syscall(__NR_ioperm, [first.into(), count as usize, 1]) }.map(drop)
}

/// Lets `go_on` decide, when the processor sends `signal`, where the program goes on: it is given the address of the instruction that
/// faulted. Without an answer the fault happens again and ends the program.
///
/// # Safety
/// Where the program goes on is code that expects to be reached from there, with the registers of the fault. `go_on` looks at nothing that may
/// be changing.
pub unsafe fn catch(signal: u32, go_on: fn(usize) -> Option<usize>) -> Result<(), Errno> {
    // SAFETY: a function of one word, which is 0 until the first handler is installed and the same ever after.
    unsafe { GO_ON = Some(go_on) };
    let handler = unsafe {
        // SAFETY: with SA_SIGINFO, the kernel calls it with the three arguments that it has.
        mem::transmute::<extern "C" fn(i32, *mut siginfo_t, *mut u8), unsafe extern "C" fn(i32)>(on_fault)
    };
    set_action(
        signal,
        kernel_sigaction {
            sa_handler_kernel: Some(handler),
            sa_flags: (SA_SIGINFO | SA_RESTORER).into(),
            sa_restorer: Some(hostctl_restore),
            sa_mask: linux_raw_sys::general::kernel_sigset_t { sig: [0] },
        },
    )
}

static mut GO_ON: Option<fn(usize) -> Option<usize>> = None;

extern "C" fn on_fault(signal: i32, _: *mut siginfo_t, context: *mut u8) {
    // SAFETY: the kernel passes a `struct ucontext`, ours to change until we return; `GO_ON` was set before the handler was.
    unsafe {
        let rip = context.add(CONTEXT_RIP).cast::<usize>();
        match GO_ON.and_then(|go_on| go_on(*rip)) {
            Some(next) => *rip = next,
            None => drop(set_action(signal as u32, kernel_sigaction { sa_handler_kernel: SIG_DFL, ..mem::zeroed() })),
        }
    }
}

fn set_action(signal: u32, action: kernel_sigaction) -> Result<(), Errno> {
    // SAFETY: the call reads `action`.
    unsafe { syscall(__NR_rt_sigaction, [signal as usize, (&raw const action).addr(), 0, SIGNAL_SET]) }.map(drop)
}

/// Goes on in a process of its own, without a terminal, with / as its directory; the process that called ends well.
///
/// # Errors
/// The system's.
pub fn into_background() -> Result<(), Errno> {
    // SAFETY: this process has one thread and keeps no memory with others, so that the child has all that the parent had.
    if unsafe { syscall(__NR_fork, []) }? != 0 {
        exit(0);
    }
    // SAFETY: no memory but a constant string.
    unsafe {
        syscall(__NR_setsid, [])?;
        syscall(__NR_chdir, [c"/".as_ptr().addr()])?;
    }
    let null = File::open(b"/dev/null", Access::ReadWrite)?;
    for standard in 0..3 {
        // SAFETY: no memory.
        unsafe { syscall(__NR_dup2, [null.number(), standard]) }?;
    }
    Ok(())
}

/// `size` bytes of zeroed memory, beginning with a page.
///
/// # Errors
/// The system's.
pub fn map(size: usize) -> Result<*mut u8, Errno> {
    let (access, kind) = (PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS);
    // SAFETY: memory that was not there before.
    let address = unsafe { syscall(__NR_mmap, [0, size, access as usize, kind as usize, usize::MAX, 0]) }?;
    Ok(ptr::with_exposed_provenance_mut(address))
}

/// Gives memory back that [`map`] gave.
///
/// # Safety
/// Nobody uses it any more, and `size` is what was asked for.
pub unsafe fn unmap(memory: *mut u8, size: usize) {
    // SAFETY: the caller's promise. Nothing can be done about a failure.
    let _ = unsafe { syscall(__NR_munmap, [memory.addr(), size]) };
}

/// Ends the process.
pub fn exit(status: u8) -> ! {
    loop {
        // SAFETY: no memory. It does not come back.
        let _ = unsafe { syscall(__NR_exit_group, [status.into()]) };
    }
}
