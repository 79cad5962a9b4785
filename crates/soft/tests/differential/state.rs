//! What both sides start from and end with.

use iced_x86::Mnemonic;

use crate::generate::Case;

/// Machine state of a case.
#[derive(Clone)]
pub struct State {
    /// RAX RCX RDX RBX RSP RBP RSI RDI R8 to R15.
    pub gpr: [u64; 16],
    pub rip: u64,
    pub rflags: u64,
    /// FXSAVE64 image.
    pub fx: [u8; 512],
    pub data: Vec<u8>,
}

impl State {
    /// Linear address of the page of code; the instruction is at its start.
    pub const CODE: u64 = 0x1000_0000;
    /// Linear address of the data pages: two to read and write, one to read only; nothing is mapped on either side.
    pub const DATA: u64 = 0x2000_0000;
    /// Size of the data pages.
    pub const DATA_SIZE: usize = 3 * 4096;
    /// Size of the part that can be written.
    pub const WRITABLE: usize = 2 * 4096;
}

/// A fault as the processor reports it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fault {
    pub vector: u8,
    pub error: u64,
    /// Only for page faults.
    pub address: u64,
}

/// End of a case on one side.
pub struct Outcome {
    pub state: State,
    pub fault: Option<Fault>,
}

/// Arithmetic and control flags that user code can see change.
const FLAGS: u64 = 0x0cd5 | 1 << 14 | 1 << 21;

impl Outcome {
    /// What differs, for people; empty when nothing does.
    pub fn differences(host: &Outcome, guest: &Outcome, case: &Case) -> String {
        let mut text = String::new();
        let mut differ = |name: &str, host: &dyn std::fmt::Debug, guest: &dyn std::fmt::Debug| {
            text.push_str(&format!("    {name}: host {host:x?}, guest {guest:x?}\n"));
        };
        if host.fault != guest.fault {
            differ("fault", &host.fault, &guest.fault);
        }
        for n in 0..16 {
            if host.state.gpr[n] != guest.state.gpr[n] && case.undefined_register != Some(n) {
                differ(
                    ["rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"][n],
                    &host.state.gpr[n],
                    &guest.state.gpr[n],
                );
            }
        }
        if host.state.rip != guest.state.rip {
            differ("rip", &host.state.rip, &guest.state.rip);
        }
        let mask = FLAGS & !if host.fault.is_some() { 0 } else { case.undefined_flags };
        if (host.state.rflags ^ guest.state.rflags) & mask != 0 {
            differ("rflags", &(host.state.rflags & mask), &(guest.state.rflags & mask));
        }
        // Control and status words, tags; not FOP, FIP and FDP, which processors of one maker treat differently.
        // A dot product that faults has added up as much as its implementation pleases, and flagged that.
        let dot_product = matches!(case.instruction.mnemonic(), Mnemonic::Dpps | Mnemonic::Dppd) && host.fault.is_some();
        for (name, range) in [("fcw fsw ftw", 0..5), ("mxcsr", 24..28)] {
            if !(dot_product && name == "mxcsr") && host.state.fx[range.clone()] != guest.state.fx[range.clone()] {
                differ(name, &&host.state.fx[range.clone()], &&guest.state.fx[range]);
            }
        }
        for n in 0..8 {
            let range = 32 + 16 * n..42 + 16 * n;
            if host.state.fx[range.clone()] != guest.state.fx[range.clone()] {
                differ(&format!("st{n}"), &&host.state.fx[range.clone()], &&guest.state.fx[range]);
            }
        }
        for n in 0..16 {
            let range = 160 + 16 * n..176 + 16 * n;
            if host.state.fx[range.clone()] != guest.state.fx[range.clone()] {
                differ(&format!("xmm{n}"), &&host.state.fx[range.clone()], &&guest.state.fx[range]);
            }
        }
        // FBSTP across pages may have written its first part when the second faults.
        let torn = case.instruction.mnemonic() == Mnemonic::Fbstp && host.fault.is_some();
        if !case.undefined_memory && !torn && host.state.data != guest.state.data {
            let at = (0..host.state.data.len()).find(|&n| host.state.data[n] != guest.state.data[n]).unwrap_or(0);
            let end = (at + 16).min(host.state.data.len());
            differ(&format!("memory at data+{at:#x}"), &&host.state.data[at..end], &&guest.state.data[at..end]);
        }
        text
    }
}
