//! Hypercalls: control word and input out of registers and the guest's memory, a status back (TLFS 3).
//!
//! A call comes from ring 0 through the hypercall page. Simple calls do one thing, rep calls do it for each element of a list and tell how many they
//! did; here they always do all. Input in memory lies in one page, and output does.

use abi::hyperv::hypercall::{
    ALL, CONNECTION_MASK, ClusterIpi, ClusterIpiEx, FIRST_IPI_VECTOR, Flush, FlushEx, MESSAGE_PAYLOAD, PostMessage, SPARSE, SignalEvent,
    SparseSet, Status, code, control, flush,
};
use vm_memory::{Bytes, GuestAddress};
use vmm::memory::PAGE_SIZE;
use vmm::registers::{RAX, RBX, RCX, RDI, RDX, RSI};
use vmm::{GuestMemory, VcpuId};
use zerocopy::{FromBytes, IntoBytes};

use super::Hyperv;
use super::synic::interrupt;

/// R8, the address of the output.
const R8: usize = 8;
/// Input and output lie on so many bytes; headers, too, are counted in them.
const ALIGNMENT: u64 = 8;

/// One hypercall.
struct Call<'a> {
    memory: &'a GuestMemory,
    vcpu: VcpuId,
    input: Input,
    output: u64,
    /// Bytes of the variable header.
    variable: usize,
    /// Elements, and the first that is left to do.
    count: usize,
    start: usize,
}

enum Input {
    Registers([u8; 16]),
    Memory(u64),
}

/// What a call did, or why not.
type Answer = Result<(), Status>;

impl<'a> Call<'a> {
    fn new(memory: &'a GuestMemory, vcpu: VcpuId, word: u64, input: u64, output: u64) -> Call<'a> {
        let mut registers = [0; 16];
        registers[..8].copy_from_slice(&input.to_le_bytes());
        registers[8..].copy_from_slice(&output.to_le_bytes());
        Call {
            memory,
            vcpu,
            input: if word & control::FAST != 0 { Input::Registers(registers) } else { Input::Memory(input) },
            output,
            variable: (word >> control::VARIABLE_SHIFT & control::VARIABLE_MASK) as usize * ALIGNMENT as usize,
            count: (word >> control::COUNT_SHIFT & control::REP_MASK) as usize,
            start: (word >> control::START_SHIFT & control::REP_MASK) as usize,
        }
    }

    /// Whether it is of the form that its code has: a list or none, a variable header or none.
    fn check(&self, is_rep: bool, takes_variable: bool) -> Answer {
        let reps = if is_rep { self.start < self.count } else { self.start == 0 && self.count == 0 };
        if reps && (takes_variable || self.variable == 0) { Ok(()) } else { Err(Status::INVALID_HYPERCALL_INPUT) }
    }

    /// The input's bytes from `offset`.
    fn bytes(&self, offset: usize, into: &mut [u8]) -> Answer {
        let end = offset + into.len();
        match &self.input {
            Input::Registers(registers) => into.copy_from_slice(registers.get(offset..end).ok_or(Status::INVALID_HYPERCALL_INPUT)?),
            Input::Memory(gpa) => {
                let gpa = in_one_page(*gpa, end)?;
                self.memory.read_slice(into, GuestAddress(gpa + offset as u64)).map_err(|_| Status::INVALID_ALIGNMENT)?;
            }
        }
        Ok(())
    }

    /// The fixed header.
    fn header<T: FromBytes + IntoBytes>(&self) -> Result<T, Status> {
        let mut header = T::new_zeroed();
        self.bytes(0, header.as_mut_bytes())?;
        Ok(header)
    }

    /// 64-bit words of the input from `offset`.
    fn words(&self, offset: usize, count: usize) -> Result<Vec<u64>, Status> {
        let mut bytes = vec![0; count * size_of::<u64>()];
        self.bytes(offset, &mut bytes)?;
        Ok(bytes.as_chunks().0.iter().map(|word| u64::from_le_bytes(*word)).collect())
    }

    /// A sparse set whose banks begin at `offset`, as bits of the processors that there can be.
    fn set(&self, set: &SparseSet, offset: usize) -> Result<u64, Status> {
        match set.format.get() {
            ALL => Ok(u64::MAX),
            SPARSE => {
                let banks = self.words(offset, self.variable / ALIGNMENT as usize)?;
                if banks.len() != set.banks.get().count_ones() as usize {
                    return Err(Status::INVALID_HYPERCALL_INPUT);
                }
                // No machine has a processor outside of the first bank.
                Ok(if set.banks.get() & 1 != 0 { banks.first().copied().unwrap_or(0) } else { 0 })
            }
            _ => Err(Status::INVALID_PARAMETER),
        }
    }
}

/// `gpa`, if `size` bytes there are aligned and in one page.
fn in_one_page(gpa: u64, size: usize) -> Result<u64, Status> {
    let is_good = gpa.is_multiple_of(ALIGNMENT) && gpa % PAGE_SIZE + size as u64 <= PAGE_SIZE;
    if is_good { Ok(gpa) } else { Err(Status::INVALID_ALIGNMENT) }
}

impl Hyperv {
    /// Answers a hypercall in the caller's registers.
    pub(super) fn answer(&self, vcpu: VcpuId, gpr: &mut [u64; 16], long_mode: bool) {
        let pair = |high: usize, low: usize| gpr[high] << 32 | gpr[low] & 0xffff_ffff;
        let (word, input, output) =
            if long_mode { (gpr[RCX], gpr[RDX], gpr[R8]) } else { (pair(RDX, RAX), pair(RBX, RCX), pair(RDI, RSI)) };
        let call = Call::new(&self.memory, vcpu, word, input, output);
        let answer = if word & control::RESERVED != 0 { Err(Status::INVALID_HYPERCALL_INPUT) } else { self.dispatch(word, &call) };
        tracing::trace!(vcpu, word, input, output, ?answer, "hyperv: hypercall");
        let result = match answer {
            Ok(()) => (call.count as u64) << control::COUNT_SHIFT,
            Err(Status(status)) => u64::from(status) | (call.start as u64) << control::COUNT_SHIFT,
        };
        if long_mode {
            gpr[RAX] = result;
        } else {
            (gpr[RDX], gpr[RAX]) = (result >> 32, result & 0xffff_ffff);
        }
    }

    fn dispatch(&self, word: u64, call: &Call<'_>) -> Answer {
        match (word & control::CODE) as u16 {
            code::FLUSH_SPACE => self.flush(call, false),
            code::FLUSH_LIST => self.flush(call, true),
            code::FLUSH_SPACE_EX => self.flush_ex(call, false),
            code::FLUSH_LIST_EX => self.flush_ex(call, true),
            code::NOTIFY_LONG_SPIN_WAIT => {
                call.check(false, false)?;
                std::thread::yield_now();
                Ok(())
            }
            code::SEND_CLUSTER_IPI => {
                call.check(false, false)?;
                let ipi: ClusterIpi = call.header()?;
                self.send_ipi(ipi.vector.get(), ipi.trust_level.get(), ipi.processors.get())
            }
            code::SEND_CLUSTER_IPI_EX => {
                call.check(false, true)?;
                let ipi: ClusterIpiEx = call.header()?;
                self.send_ipi(ipi.vector.get(), ipi.trust_level.get(), call.set(&ipi.set, size_of::<ClusterIpiEx>())?)
            }
            code::POST_MESSAGE => self.guest_posts(call),
            code::SIGNAL_EVENT => self.guest_signals(call),
            code::EXT_QUERY_CAPABILITIES => {
                call.check(false, false)?;
                // None.
                let gpa = in_one_page(call.output, size_of::<u64>())?;
                self.memory.write_obj(0u64, GuestAddress(gpa)).map_err(|_| Status::INVALID_ALIGNMENT)
            }
            _ => Err(Status::INVALID_HYPERCALL_CODE),
        }
    }

    fn flush(&self, call: &Call<'_>, is_list: bool) -> Answer {
        call.check(is_list, false)?;
        let header: Flush = call.header()?;
        self.flush_processors(call, header.flags.get(), header.processors.get(), is_list.then_some(size_of::<Flush>()))
    }

    fn flush_ex(&self, call: &Call<'_>, is_list: bool) -> Answer {
        call.check(is_list, true)?;
        let header: FlushEx = call.header()?;
        let processors = call.set(&header.set, size_of::<FlushEx>())?;
        self.flush_processors(call, header.flags.get(), processors, is_list.then_some(size_of::<FlushEx>() + call.variable))
    }

    /// Flushes translations of some processors: those of the pages listed at offset `list`, or all.
    fn flush_processors(&self, call: &Call<'_>, flags: u64, processors: u64, list: Option<usize>) -> Answer {
        if flags & !flush::DEFINED != 0 {
            return Err(Status::INVALID_PARAMETER);
        }
        let processors = if flags & flush::ALL_PROCESSORS != 0 { u64::MAX } else { processors };
        let pages = list.map(|offset| call.words(offset, call.count)).transpose()?;
        // Large ranges are not worth a look at their pages.
        let pages = pages.filter(|_| flags & flush::EXTENDED_RANGES == 0).and_then(|list| pages_of(list.get(call.start..)?));
        if let Some(known) = self.processors.get() {
            known.flush_translations(call.vcpu, processors & self.all_processors(), pages.as_deref());
        }
        Ok(())
    }

    fn send_ipi(&self, vector: u32, trust_level: u32, processors: u64) -> Answer {
        let vector = u8::try_from(vector).ok().filter(|&vector| u32::from(vector) >= FIRST_IPI_VECTOR).ok_or(Status::INVALID_PARAMETER)?;
        if trust_level != 0 {
            return Err(Status::INVALID_PARAMETER);
        }
        if let Some(known) = self.processors.get() {
            let processors = processors & self.all_processors();
            (0..u64::BITS).filter(|vp| processors >> vp & 1 != 0).for_each(|vp| interrupt(known, vp, vector));
        }
        Ok(())
    }

    fn guest_posts(&self, call: &Call<'_>) -> Answer {
        call.check(false, false)?;
        let Input::Memory(_) = call.input else { return Err(Status::INVALID_HYPERCALL_INPUT) };
        let header: PostMessage = call.header()?;
        let mut payload = [0; MESSAGE_PAYLOAD];
        let payload = payload.get_mut(..header.size.get() as usize).ok_or(Status::INVALID_PARAMETER)?;
        if header.kind.get() == 0 || header.kind.get() >> 31 != 0 {
            return Err(Status::INVALID_PARAMETER);
        }
        call.bytes(size_of::<PostMessage>(), payload)?;
        self.posted(header.connection.get() & CONNECTION_MASK, header.kind.get(), payload).into_result()
    }

    fn guest_signals(&self, call: &Call<'_>) -> Answer {
        call.check(false, false)?;
        let event = call.header::<SignalEvent>()?.get();
        if event >> 48 != 0 {
            return Err(Status::INVALID_PARAMETER);
        }
        self.signalled(event as u32 & CONNECTION_MASK, (event >> 32) as u16).into_result()
    }
}

/// Addresses of all pages of a list's elements, unless they are more than is worth it.
fn pages_of(elements: &[u64]) -> Option<Vec<u64>> {
    /// Beyond this, forgetting everything is cheaper.
    const MAX_PAGES: usize = 64;
    let mut pages = Vec::new();
    for element in elements {
        let (first, more) = (element & !(PAGE_SIZE - 1), element & abi::hyperv::hypercall::range::MORE);
        if pages.len() + more as usize >= MAX_PAGES {
            return None;
        }
        pages.extend((0..=more).map(|page| first.wrapping_add(page * PAGE_SIZE)));
    }
    Some(pages)
}
