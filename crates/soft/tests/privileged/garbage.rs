//! Random instructions with random tables and registers in every mode: whatever a guest does, the monitor goes on.

use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use vm_memory::{Bytes, GuestAddress};
use vmm::{BackendVm, Entry, Exit, Inject, Registers, Segment};

use super::machine::*;

const CASES: u64 = 1000;
const STEPS: u32 = 40;

/// Opcodes that matter here; random bytes follow them.
const OPCODES: &[&[u8]] = &[
    &[0x0f, 0x00],
    &[0x0f, 0x01],
    &[0x0f, 0x02],
    &[0x0f, 0x03],
    &[0x0f, 0x05],
    &[0x48, 0x0f, 0x07],
    &[0x0f, 0x20],
    &[0x0f, 0x21],
    &[0x0f, 0x22],
    &[0x0f, 0x23],
    &[0x0f, 0x30],
    &[0x0f, 0x32],
    &[0x0f, 0x34],
    &[0x0f, 0x35],
    &[0x0f, 0xa1],
    &[0x0f, 0xb2],
    &[0x0f, 0xb4],
    &[0x0f, 0xc7],
    &[0x66, 0x0f, 0x38, 0x82],
    &[0xf3, 0x0f, 0xae],
    &[0x07],
    &[0x17],
    &[0x63],
    &[0x6c],
    &[0xf3, 0x6d],
    &[0xf3, 0x6f],
    &[0x8c],
    &[0x8e],
    &[0x9a],
    &[0x9d],
    &[0xc4],
    &[0xca],
    &[0xcb],
    &[0xcc],
    &[0xcd],
    &[0xce],
    &[0xcf],
    &[0x48, 0xcf],
    &[0x66, 0xcf],
    &[0xe5],
    &[0xef],
    &[0xea],
    &[0xf1],
    &[0xfb],
    &[0xff],
    &[0x66, 0xff],
    &[],
];

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    /// A value that means something to somebody.
    fn value(&mut self) -> u64 {
        match self.below(10) {
            0 => self.next(),
            1 => 0,
            2 => u64::MAX - self.below(16),
            3 => 0x7fff_ffff_fff0 + self.below(32),
            4 => 0xffff_8000_0000_0000u64.wrapping_sub(16) + self.below(32),
            5 => 0xffff_fff0 + self.below(32),
            6 => self.below(0x80) & !7 | self.below(4),
            7 => 0xc000_0080 + self.below(0x90),
            8 => 0x170 + self.below(0x200),
            _ => DATA + self.below(0x2000),
        }
    }

    fn code(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        while bytes.len() < 200 {
            bytes.extend(OPCODES[self.below(OPCODES.len() as u64) as usize]);
            for _ in 0..self.below(4) {
                bytes.push(self.next() as u8);
            }
        }
        bytes
    }

    fn segment(&mut self, dpl: u32) -> Segment {
        let access = if self.one_in(3) { self.next() as u32 & 0x1_f0ff } else { 0xc093 | dpl << 5 };
        let limit = if self.one_in(3) { self.value() as u32 } else { u32::MAX };
        let base = if self.one_in(4) { self.value() } else { 0 };
        Segment { selector: self.value() as u16, limit, access, base }
    }

    fn registers(&mut self) -> Registers {
        let mut registers = Machine::start();
        for n in 0..16 {
            registers.gpr[n] = self.value();
        }
        registers.gpr[4] = if self.one_in(4) { self.value() } else { STACK - self.below(64) };
        let dpl = if self.one_in(3) { 3 } else { 0 };
        let code = 0x9b | dpl << 5;
        match self.below(5) {
            // 64-bit, compatibility, 32-bit and 16-bit protected code.
            0 => registers.cs.access = 0xa000 | code,
            1 => registers.cs.access = 0xc000 | code,
            2 | 3 => {
                registers.efer = 0;
                registers.cr0 = 0x33;
                registers.cr4 = 0;
                registers.cs.access = if self.one_in(2) { 0xc000 | code } else { code };
                if self.one_in(4) {
                    registers.rflags |= 1 << 17;
                    registers.cs.base = 0;
                }
            }
            _ => {
                registers.efer = 0;
                registers.cr0 = 0x10;
                registers.cr4 = 0;
                registers.cs = Segment { selector: 0, limit: 0xffff, access: 0x9b, base: CODE };
                registers.rip = 0;
            }
        }
        registers.rflags |= self.next() & 0x25_7fd7;
        registers.ss = self.segment(dpl);
        registers.ss.access = registers.ss.access & !0x60 | dpl << 5;
        registers.ds = self.segment(dpl);
        registers.es = self.segment(dpl);
        registers.fs = self.segment(dpl);
        if self.one_in(4) {
            registers.ldtr = self.segment(0);
        }
        if self.one_in(4) {
            registers.tr = self.segment(0);
        }
        if self.one_in(4) {
            registers.gdtr.base = self.value();
        }
        if self.one_in(4) {
            registers.idtr.base = self.value();
        }
        if self.one_in(4) {
            for n in 0..4 {
                registers.dr[n] = self.value();
            }
            registers.dr7 = 0x400 | self.next() & 0xffff_03ff;
        }
        registers
    }
}

#[test]
fn no_guest_state_stops_the_monitor() {
    let current: Arc<Mutex<Weak<dyn BackendVm>>> = Arc::new(Mutex::new(Arc::downgrade(&Machine::new().vm)));
    // A processor that halts with a local APIC would sleep for ever.
    let watched = Arc::downgrade(&current);
    std::thread::spawn(move || {
        while let Some(current) = watched.upgrade() {
            if let Some(vm) = current.lock().unwrap().upgrade() {
                vm.kick(0);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    });
    for case in 0..CASES {
        let mut random = Random(case);
        let mut m = Machine::with(1, case % 2 == 0, false);
        *current.lock().unwrap() = Arc::downgrade(&m.vm);
        m.open_to_user();
        for at in (GDT..GDT + 0x80).step_by(8).chain((IDT..IDT + 0x1000).step_by(8)) {
            if random.one_in(2) {
                m.put(at, random.next() & 0x00ff_ffff_0000_ffff | (random.below(256) << 16) | random.below(2) << 47);
            }
        }
        m.memory.write_slice(&random.code(), GuestAddress(CODE)).unwrap();
        let registers = random.registers();
        if m.vcpu.set_registers(&registers, vmm::RegisterMask::all()).is_err() {
            continue;
        }
        for _ in 0..STEPS {
            let inject = match random.below(12) {
                0 => Some(Inject::Interrupt(random.next() as u8)),
                1 => Some(Inject::Nmi),
                2 => Some(Inject::Exception(random.below(20) as u8, random.one_in(2).then(|| random.next() as u32 & 0xffff))),
                _ => None,
            };
            if m.registers().rflags & 0x200 == 0 && random.one_in(8) {
                m.vm.signal_msi(0xfee0_0000, 0x400);
            }
            let entry = Entry { inject, single_step: true, port_in: Some(random.next() as u32), interrupt_window: random.one_in(4) };
            if m.vcpu.run(&m.bus, entry).unwrap() == Exit::Shutdown {
                break;
            }
        }
    }
}
