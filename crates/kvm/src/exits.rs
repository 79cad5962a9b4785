//! KVM's exits as plain values.
//!
//! kvm-ioctls lends parts of the run page for the length of an exit; the run loop needs them later too (an IN is answered by
//! a later run, a string access element by element). So every exit is copied into a [`RawExit`], and the few places of the run page
//! that are written back have a function each.

// The run page is a C union, and port data lies behind it in the same mapping.
#![allow(unsafe_code)]

use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, Ordering};

use kvm_ioctls::{VcpuExit, VcpuFd};

/// Why KVM_RUN returned.
#[derive(Debug, Clone, Copy)]
pub(crate) enum RawExit {
    /// Port access; the data is in the run page.
    Io(IoExit),
    /// Read of an address without a slot; the answer goes to [`answer_mmio`].
    MmioRead { gpa: u64, size: usize },
    /// Write to an address without a writable slot.
    MmioWrite { gpa: u64, size: usize, data: [u8; 8] },
    /// RDMSR; the answer goes to [`answer_msr`].
    ReadMsr(u32),
    /// WRMSR; the answer goes to [`answer_msr`].
    WriteMsr(u32, u64),
    /// HLT without a local APIC in the kernel.
    Halt,
    /// The interrupt window that was asked for is open.
    InterruptWindow,
    /// EOI of a vector that an I/O APIC route sends level triggered.
    EndOfInterrupt(u8),
    /// Single step.
    Debug,
    /// Triple fault.
    Shutdown,
    /// A signal or `immediate_exit`.
    Interrupted,
    /// KVM gave up: suberror, and what it tells about it.
    InternalError(u32),
    /// The processor refused the guest's state.
    FailEntry(u64),
    /// Something that is not for us, by number.
    Unexpected(u32),
}

/// A port access, possibly of a string instruction.
#[derive(Debug, Clone, Copy)]
pub(crate) struct IoExit {
    pub port: u16,
    /// Bytes of one element.
    pub size: u8,
    /// Number of elements.
    pub count: u32,
    /// `true` for IN.
    pub input: bool,
    /// Where the data begins in the run page.
    offset: u64,
}

/// Enters the guest once.
pub(crate) fn enter(fd: &mut VcpuFd) -> Result<RawExit, kvm_ioctls::Error> {
    let exit = match fd.run() {
        Ok(VcpuExit::IoIn(..)) => return Ok(RawExit::Io(io(fd, true))),
        Ok(VcpuExit::IoOut(..)) => return Ok(RawExit::Io(io(fd, false))),
        Ok(VcpuExit::MmioRead(gpa, data)) => RawExit::MmioRead { gpa, size: data.len() },
        Ok(VcpuExit::MmioWrite(gpa, bytes)) => {
            let mut data = [0; 8];
            data[..bytes.len()].copy_from_slice(bytes);
            RawExit::MmioWrite { gpa, size: bytes.len(), data }
        }
        Ok(VcpuExit::X86Rdmsr(exit)) => RawExit::ReadMsr(exit.index),
        Ok(VcpuExit::X86Wrmsr(exit)) => RawExit::WriteMsr(exit.index, exit.data),
        Ok(VcpuExit::Hlt) => RawExit::Halt,
        Ok(VcpuExit::IrqWindowOpen) => RawExit::InterruptWindow,
        Ok(VcpuExit::IoapicEoi(vector)) => RawExit::EndOfInterrupt(vector),
        Ok(VcpuExit::Debug(_)) => RawExit::Debug,
        Ok(VcpuExit::Shutdown) => RawExit::Shutdown,
        Ok(VcpuExit::Intr) => RawExit::Interrupted,
        Ok(VcpuExit::FailEntry(reason, _)) => RawExit::FailEntry(reason),
        Ok(VcpuExit::InternalError) => {
            // SAFETY: KVM_EXIT_INTERNAL_ERROR fills `internal`; every bit pattern is a valid integer.
            RawExit::InternalError(unsafe { fd.get_kvm_run().__bindgen_anon_1.internal.suberror })
        }
        Ok(_) => RawExit::Unexpected(fd.get_kvm_run().exit_reason),
        // EAGAIN: a processor that waits for INIT or SIPI was woken (kernel: kvm_arch_vcpu_ioctl_run).
        Err(e) if e.errno() == libc::EINTR || e.errno() == libc::EAGAIN => RawExit::Interrupted,
        Err(e) => return Err(e),
    };
    Ok(exit)
}

fn io(fd: &mut VcpuFd, input: bool) -> IoExit {
    // SAFETY: KVM_EXIT_IO fills `io`; every bit pattern is a valid integer.
    let io = unsafe { fd.get_kvm_run().__bindgen_anon_1.io };
    IoExit { port: io.port, size: io.size, count: io.count, input, offset: io.data_offset }
}

/// Element `index` of a port access, as an integer.
pub(crate) fn io_element(fd: &mut VcpuFd, io: &IoExit, index: u32) -> u32 {
    let mut value = [0; 4];
    let element = io_bytes(fd, io, index);
    value[..element.len()].copy_from_slice(element);
    u32::from_le_bytes(value)
}

/// Answers element `index` of an IN.
pub(crate) fn answer_io(fd: &mut VcpuFd, io: &IoExit, index: u32, value: u32) {
    let element = io_bytes(fd, io, index);
    let size = element.len();
    element.copy_from_slice(&value.to_le_bytes()[..size]);
}

fn io_bytes<'a>(fd: &'a mut VcpuFd, io: &IoExit, index: u32) -> &'a mut [u8] {
    assert!(index < io.count && matches!(io.size, 1 | 2 | 4), "an element of the access KVM told about");
    let run: *mut u8 = std::ptr::from_mut(fd.get_kvm_run()).cast();
    let offset = io.offset as usize + index as usize * usize::from(io.size);
    // SAFETY: the kernel placed `count` elements of `size` bytes at `offset` of the mapping that begins with kvm_run
    // (api.rst, KVM_EXIT_IO), and the mapping lives as long as `fd`, which is borrowed.
    unsafe { std::slice::from_raw_parts_mut(run.add(offset), usize::from(io.size)) }
}

/// Answers an MMIO read.
pub(crate) fn answer_mmio(fd: &mut VcpuFd, data: [u8; 8]) {
    // The layout's union member for KVM_EXIT_MMIO; writing a Copy member of a union is safe.
    fd.get_kvm_run().__bindgen_anon_1.mmio.data = data;
}

/// Answers an RDMSR with a value, a WRMSR with anything, or either with #GP.
pub(crate) fn answer_msr(fd: &mut VcpuFd, answer: Option<u64>) {
    // SAFETY: KVM_EXIT_X86_RDMSR and _WRMSR fill `msr`; every bit pattern is a valid integer.
    let msr = unsafe { &mut fd.get_kvm_run().__bindgen_anon_1.msr };
    msr.error = u8::from(answer.is_none());
    msr.data = answer.unwrap_or(msr.data);
}

/// Where the flag is that makes the next KVM_RUN finish what is under way and return.
pub(crate) fn immediate_exit(fd: &mut VcpuFd) -> NonNull<u8> {
    NonNull::from(&mut fd.get_kvm_run().immediate_exit)
}

/// Writes that flag, in order with what other threads write (see `kick.rs`).
pub(crate) fn set_immediate_exit(fd: &mut VcpuFd, value: bool) {
    // SAFETY: the byte is in the mapping of `fd`, which is borrowed; all others access it atomically too.
    unsafe { AtomicU8::from_ptr(immediate_exit(fd).as_ptr()) }.store(u8::from(value), Ordering::SeqCst);
}
