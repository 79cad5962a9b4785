//! One of the machines that are compared.

use std::sync::{Arc, Weak};

use soft::Soft;
use vm_memory::{Bytes, GuestAddress};
use vmm::{BackendVm, Entry, Exit, RegisterMask, Registers};

use crate::SECOND;
use crate::guest::{self, Guest, NoBus, STACK_TOP, USER_ALL};
use crate::program::Program;
use crate::state::State;

/// Guest physical address of the second code page, apart from the first one.
const CODE_2: u64 = guest::CODE + 0x4000;
const PAGE: usize = 4096;
/// What an exception pushes at most: SS, RSP, RFLAGS, CS, RIP and an error code.
const FRAME: usize = 6;

/// A guest with two code pages and the data pages, each at two linear addresses.
pub struct Side {
    guest: Guest,
}

/// Where a run of a program ended.
pub struct End {
    exit: Exit,
    registers: Registers,
    /// Top of the handler's stack.
    frame: [u64; FRAME],
    fx: [u8; 512],
    data: Vec<u8>,
    code: Vec<u8>,
    /// Instructions that were executed.
    pub instructions: u64,
}

impl Side {
    /// A machine that translates after so many executions.
    pub fn new(translate_after: u32) -> Side {
        let mut guest = Guest::new(Soft::translating_after(translate_after));
        // The third time only for stores into code that runs at the second address.
        for linear in [State::CODE, State::CODE + SECOND, State::CODE + 2 * SECOND] {
            guest.map(linear, guest::CODE, USER_ALL);
            guest.map(linear + PAGE as u64, CODE_2, USER_ALL);
        }
        guest.map_data(State::DATA + SECOND);
        Side { guest }
    }

    /// The machine, to kick its processor.
    pub fn machine(&self) -> Weak<dyn BackendVm> {
        Arc::downgrade(&self.guest.vm)
    }

    /// Writes the program's code.
    pub fn load(&mut self, program: &Program) {
        let mut code = [0xcc; 2 * PAGE];
        let start = program.offset as usize;
        code[start..start + program.code.len()].copy_from_slice(&program.code);
        self.guest.memory.write_slice(&code[..PAGE], GuestAddress(guest::CODE)).unwrap();
        self.guest.memory.write_slice(&code[PAGE..], GuestAddress(CODE_2)).unwrap();
    }

    /// Runs the program from `rip` with its state.
    pub fn run(&mut self, program: &Program, rip: u64) -> End {
        let Guest { memory, vcpu, .. } = &mut self.guest;
        memory.write_slice(&program.state.data, GuestAddress(guest::DATA)).unwrap();
        memory.write_slice(&[0; 8 * FRAME], GuestAddress(STACK_TOP - 8 * FRAME as u64)).unwrap();
        vcpu.set_registers(&Registers { rip, ..guest::registers(&program.state) }, RegisterMask::all()).unwrap();
        vcpu.set_fxsave(&program.state.fx).unwrap();
        let before = vcpu.stats().instructions.unwrap();
        let mut exit = vcpu.run(&NoBus, Entry::default()).unwrap();
        // The kick was for the program before this one.
        if exit == Exit::Interrupted && vcpu.stats().instructions == Some(before) {
            exit = vcpu.run(&NoBus, Entry::default()).unwrap();
        }
        let mut end = End {
            exit,
            registers: vcpu.registers(RegisterMask::all()).unwrap(),
            frame: [0; FRAME],
            fx: vcpu.fxsave().unwrap(),
            data: vec![0; State::DATA_SIZE],
            code: vec![0; 2 * PAGE],
            instructions: vcpu.stats().instructions.unwrap() - before,
        };
        for (n, word) in end.frame.iter_mut().enumerate() {
            *word = memory.read_obj(GuestAddress(STACK_TOP - 8 * (FRAME - n) as u64)).unwrap();
        }
        memory.read_slice(&mut end.data, GuestAddress(guest::DATA)).unwrap();
        memory.read_slice(&mut end.code[..PAGE], GuestAddress(guest::CODE)).unwrap();
        memory.read_slice(&mut end.code[PAGE..], GuestAddress(CODE_2)).unwrap();
        end
    }
}

impl End {
    /// The exception that ended the program, if it came to its end.
    pub fn vector(&self) -> Option<u8> {
        (self.exit == Exit::Halt).then(|| guest::vector(&self.registers) as u8)
    }

    /// What is different in `other`, for people; empty when nothing is.
    pub fn differences(&self, other: &End) -> String {
        let mut text = String::new();
        let mut differ = |name: &str, interpreted: &dyn std::fmt::Debug, translated: &dyn std::fmt::Debug| {
            text.push_str(&format!("  {name}: interpreted {interpreted:x?}, translated {translated:x?}\n"));
        };
        if self.exit != other.exit {
            differ("exit", &self.exit, &other.exit);
        }
        if self.instructions != other.instructions {
            differ("instructions", &self.instructions, &other.instructions);
        }
        if self.frame != other.frame {
            differ("frame (error code, RIP, CS, RFLAGS, RSP, SS)", &self.frame, &other.frame);
        }
        for (name, ours, theirs) in
            [("data", &self.data[..], &other.data[..]), ("code", &self.code, &other.code), ("x87 and SSE state", &self.fx, &other.fx)]
        {
            if let Some(at) = ours.iter().zip(theirs).position(|(ours, theirs)| ours != theirs) {
                let end = (at + 16).min(ours.len());
                differ(&format!("{name}+{at:#x}"), &&ours[at..end], &&theirs[at..end]);
            }
        }
        if self.registers != other.registers {
            text.push_str(&format!("  interpreted:\n{}\n  translated:\n{}\n", self.registers, other.registers));
        }
        text
    }
}
