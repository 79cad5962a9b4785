//! What the kernel and the compiler expect of a program without a C library: the first instruction, memory, the functions that the compiler
//! calls by name, and what happens on a panic.
#![allow(unsafe_code)] // Symbols by name, the stack that the kernel fills, memory given out.

use alloc::format;
use alloc::vec::Vec;
use core::alloc::{GlobalAlloc, Layout};
use core::arch::{asm, global_asm};
use core::cell::UnsafeCell;
use core::ffi::{CStr, c_char};
use core::panic::PanicInfo;
use core::ptr::null_mut;

use hostctl::sys;
use hostctl::sys::process;

/// Status after a panic, as Rust's own runtime has it.
const STATUS_PANIC: u8 = 101;

// The kernel starts a program here, with RSP at the number of arguments, behind which the pointers to them are (System V ABI, AMD64
// supplement, 3.4.1).
global_asm!(".globl _start", "_start:", "xor ebp, ebp", "mov rdi, rsp", "and rsp, -16", "call {begin}", "ud2", begin = sym begin);

extern "C" fn begin(stack: *const usize) -> ! {
    // SAFETY: what the kernel has put there; it stays as long as the process.
    let arguments: Vec<Vec<u8>> = unsafe {
        let pointers = stack.add(1).cast::<*const c_char>();
        (0..*stack).map(|at| CStr::from_ptr(*pointers.add(at)).to_bytes().to_vec()).collect()
    };
    process::exit(crate::run(arguments))
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    sys::say(&format!("hostctl: {info}\n"));
    process::exit(STATUS_PANIC)
}

#[global_allocator]
static HEAP: Heap = Heap { free: UnsafeCell::new([null_mut(); CLASSES]), fresh: UnsafeCell::new((0, 0)) };

/// Sizes of pieces: powers of two from 32 bytes to 64 KiB. Larger ones are mappings of their own.
const SMALLEST: usize = 32;
const CLASSES: usize = 12;
const LARGEST: usize = SMALLEST << (CLASSES - 1);
/// What is taken from the kernel at a time: a read of a key needs no more.
const CHUNK: usize = 4 * LARGEST;

/// Memory for a program of one thread: free pieces of each size in a list, fresh ones from the end of a chunk.
struct Heap {
    free: UnsafeCell<[*mut Free; CLASSES]>,
    /// Where the chunk's fresh part begins and ends.
    fresh: UnsafeCell<(usize, usize)>,
}

/// A free piece holds the address of the next one.
struct Free {
    next: *mut Free,
}

// SAFETY: the program has one thread, and no signal handler takes memory.
unsafe impl Sync for Heap {}

impl Heap {
    /// The class of a layout; `None` for one with a mapping of its own.
    fn class(layout: Layout) -> Option<usize> {
        let size = layout.size().max(layout.align()).max(SMALLEST).next_power_of_two();
        (size <= LARGEST).then(|| (size / SMALLEST).trailing_zeros() as usize)
    }
}

// SAFETY: pieces are as large and as aligned as their class, which is a power of two that covers both; mappings begin with a page, which
// covers every alignment that is asked for here. A piece is in a list or given out, never both.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let Some(class) = Heap::class(layout) else {
            return process::map(layout.size()).unwrap_or(null_mut());
        };
        let size = SMALLEST << class;
        // SAFETY: nobody else looks at the lists, see above; a free piece is memory of ours that nothing refers to.
        unsafe {
            let head = &mut (*self.free.get())[class];
            if !head.is_null() {
                let piece = *head;
                *head = (*piece).next;
                return piece.cast();
            }
            let (begin, end) = &mut *self.fresh.get();
            let mut at = begin.next_multiple_of(size);
            if at + size > *end {
                let Ok(chunk) = process::map(CHUNK) else { return null_mut() };
                (at, *end) = (chunk.expose_provenance(), chunk.addr() + CHUNK);
            }
            *begin = at + size;
            core::ptr::with_exposed_provenance_mut(at)
        }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        match Heap::class(layout) {
            // SAFETY: the piece is of this class and nobody uses it any more.
            Some(class) => unsafe {
                let head = &mut (*self.free.get())[class];
                let piece = pointer.cast::<Free>();
                (*piece).next = *head;
                *head = piece;
            },
            // SAFETY: a mapping of this size that nobody uses any more.
            None => unsafe { process::unmap(pointer, layout.size()) },
        }
    }
}

/// memcpy(3).
///
/// # Safety
/// As the C function: `count` bytes at each pointer, apart from each other.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, count: usize) -> *mut u8 {
    // SAFETY: the caller's promise.
    unsafe { asm!("rep movsb", inout("rcx") count => _, inout("rdi") to => _, inout("rsi") from => _, options(nostack, preserves_flags)) };
    to
}

/// memmove(3).
///
/// # Safety
/// As the C function: `count` bytes at each pointer.
#[unsafe(no_mangle)]
unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, count: usize) -> *mut u8 {
    if to.addr().wrapping_sub(from.addr()) >= count {
        // SAFETY: going upwards, nothing is overwritten before it is read.
        return unsafe { memcpy(to, from, count) };
    }
    // SAFETY: the caller's promise; downwards from the last byte, and upwards again as everybody expects it.
    unsafe {
        asm!(
            "std", "rep movsb", "cld",
            inout("rcx") count => _,
            inout("rdi") to.wrapping_add(count).wrapping_sub(1) => _,
            inout("rsi") from.wrapping_add(count).wrapping_sub(1) => _,
            options(nostack),
        );
    }
    to
}

/// memset(3).
///
/// # Safety
/// As the C function: `count` bytes at `to`.
#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut u8, byte: i32, count: usize) -> *mut u8 {
    // SAFETY: the caller's promise.
    unsafe { asm!("rep stosb", inout("rcx") count => _, inout("rdi") to => _, in("al") byte as u8, options(nostack, preserves_flags)) };
    to
}

/// memcmp(3).
///
/// # Safety
/// As the C function: `count` bytes at each pointer.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(left: *const u8, right: *const u8, count: usize) -> i32 {
    for at in 0..count {
        // SAFETY: the caller's promise. Volatile, so that the compiler does not make a call of memcmp out of it.
        let (a, b) = unsafe { (left.add(at).read_volatile(), right.add(at).read_volatile()) };
        if a != b {
            return i32::from(a) - i32::from(b);
        }
    }
    0
}

/// bcmp(3): 0 when they are equal.
///
/// # Safety
/// As the C function: `count` bytes at each pointer.
#[unsafe(no_mangle)]
unsafe extern "C" fn bcmp(left: *const u8, right: *const u8, count: usize) -> i32 {
    // SAFETY: the caller's promise.
    unsafe { memcmp(left, right, count) }
}

/// strlen(3).
///
/// # Safety
/// As the C function: a zero byte ends the string.
#[unsafe(no_mangle)]
unsafe extern "C" fn strlen(string: *const u8) -> usize {
    let mut length = 0;
    // SAFETY: the caller's promise. Volatile as in memcmp.
    while unsafe { string.add(length).read_volatile() } != 0 {
        length += 1;
    }
    length
}

/// Names that the prebuilt `core` and `alloc` refer to, because they were compiled to unwind. A panic ends the program before that.
#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}

/// As [`rust_eh_personality`].
#[unsafe(no_mangle)]
extern "C" fn _Unwind_Resume() -> ! {
    process::exit(STATUS_PANIC)
}
