//! What a run cost: exits by kind, instructions, speed. The table of `vmctl run --stats`.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::Ordering;
use std::time::Duration;

use vmm::VcpuStats;

use crate::bus::Unowned;

/// Counters of a finished machine, over all its processors and reboots.
#[derive(Debug, Default)]
pub struct RunStats {
    processors: Vec<VcpuStats>,
    /// Times [`vmm::Vcpu::run`] came back, by the exit's name.
    returns: BTreeMap<&'static str, u64>,
    unowned: [(&'static str, u64); 4],
    wall: Duration,
    reboots: u32,
}

impl RunStats {
    /// Adds one processor.
    pub fn add_processor(&mut self, stats: VcpuStats, returns: &BTreeMap<&'static str, u64>) {
        self.processors.push(stats);
        for (name, count) in returns {
            *self.returns.entry(name).or_default() += count;
        }
    }

    /// Adds what the bus counted.
    pub fn add_unowned(&mut self, unowned: &Unowned) {
        let now = [("port", &unowned.port), ("mmio", &unowned.mmio), ("msr", &unowned.msr), ("hypercall", &unowned.hypercall)];
        for (total, (name, counter)) in self.unowned.iter_mut().zip(now) {
            *total = (name, total.1 + counter.load(Ordering::Relaxed));
        }
    }

    /// Says that the guest reset the machine.
    pub fn add_reboot(&mut self) {
        self.reboots += 1;
    }

    /// Sets the time the run took.
    pub fn set_wall(&mut self, wall: Duration) {
        self.wall = wall;
    }

    /// Instructions of all processors, where the backend counts them.
    pub fn instructions(&self) -> Option<u64> {
        self.processors.iter().map(|p| p.instructions).sum()
    }

    /// Hash of the instruction pointers executed, in deterministic mode.
    pub fn trace_hash(&self) -> Option<u64> {
        self.processors.last().and_then(|p| p.trace_hash)
    }
}

impl fmt::Display for RunStats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let total = |field: fn(&VcpuStats) -> u64| self.processors.iter().map(field).sum::<u64>();
        let mut line = |name: &str, value: u64| writeln!(f, "{name:<24}{value:>16}");
        if let Some(instructions) = self.instructions() {
            line("instructions", instructions)?;
        }
        line("port accesses", total(|p| p.port))?;
        line("mmio accesses", total(|p| p.mmio))?;
        line("msr accesses", total(|p| p.msr))?;
        line("cpuid", total(|p| p.cpuid))?;
        line("hypercalls", total(|p| p.hypercalls))?;
        line("halts", total(|p| p.halts))?;
        line("interrupts", total(|p| p.interrupts))?;
        line("exceptions", total(|p| p.exceptions))?;
        for (name, count) in &self.returns {
            line(&format!("exit {name}"), *count)?;
        }
        for (name, count) in self.unowned.iter().filter(|(_, count)| *count != 0) {
            line(&format!("unowned {name}"), *count)?;
        }
        if self.reboots != 0 {
            line("reboots", self.reboots.into())?;
        }
        let seconds = self.wall.as_secs_f64();
        writeln!(f, "{:<24}{seconds:>16.3} s", "wall time")?;
        if let Some(instructions) = self.instructions() {
            writeln!(f, "{:<24}{:>16.1} million instructions a second", "speed", instructions as f64 / seconds.max(1e-9) / 1e6)?;
        }
        if let Some(hash) = self.trace_hash() {
            writeln!(f, "{:<24}{hash:016x}", "trace hash")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_adds_the_processors_up() {
        let mut stats = RunStats::default();
        for _ in 0..2 {
            let processor = VcpuStats { instructions: Some(1_000_000), port: 3, ..VcpuStats::default() };
            stats.add_processor(processor, &BTreeMap::from([("interrupted", 1)]));
        }
        stats.set_wall(Duration::from_secs(1));
        let text = stats.to_string();
        assert!(text.contains(&format!("{:<24}{:>16}", "port accesses", 6)), "{text}");
        assert!(text.contains("2.0 million"), "{text}");
        assert!(text.contains("exit interrupted"), "{text}");
    }
}
