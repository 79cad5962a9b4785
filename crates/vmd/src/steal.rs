//! How long each processor's thread ran, and how long the host kept it waiting: Linux' own counts, the first two numbers in
//! `/proc/<pid>/task/<tid>/schedstat` (`Documentation/scheduler/sched-stats.rst`). They are also what Linux KVM takes for Hyper-V's run time
//! (`current_task_runtime_100ns`) and for steal time (`record_steal_time`).

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;

use dialects::kvm::StealSource;
use vmm::VcpuId;

/// The calling thread's file.
const OWN: &str = "/proc/thread-self/schedstat";
/// Three numbers of 20 digits and their separators.
const LINE: usize = 64;

/// Which number of the file is the time that the thread ran, and which the time that it waited.
const RAN: usize = 0;
const WAITED: usize = 1;

/// The run delay of a machine's processor threads.
pub struct RunDelay {
    threads: Vec<OnceLock<File>>,
}

impl RunDelay {
    /// For `vcpus` threads to come; `None` where the host does not count (a kernel without `CONFIG_SCHED_INFO`, or no `/proc`).
    pub fn new(vcpus: u32) -> Option<RunDelay> {
        number(&File::open(OWN).ok()?, WAITED)?;
        Some(RunDelay { threads: (0..vcpus).map(|_| OnceLock::new()).collect() })
    }

    /// The calling thread is processor `vcpu`.
    pub fn enter(&self, vcpu: VcpuId) {
        // The path means the thread that opens it, the file stays with that thread.
        if let (Some(thread), Ok(file)) = (self.threads.get(vcpu as usize), File::open(OWN)) {
            let _ = thread.set(file);
        }
    }

    /// A number of a processor's thread. One that has not begun, or has ended, does not run and waits for nothing.
    fn number(&self, vcpu: VcpuId, which: usize) -> u64 {
        let file = self.threads.get(vcpu as usize).and_then(OnceLock::get);
        file.and_then(|file| number(file, which)).unwrap_or(0)
    }
}

impl StealSource for RunDelay {
    fn stolen(&self, vcpu: VcpuId) -> u64 {
        self.number(vcpu, WAITED)
    }

    fn ran(&self, vcpu: VcpuId) -> u64 {
        self.number(vcpu, RAN)
    }
}

fn number(file: &File, which: usize) -> Option<u64> {
    let mut line = [0; LINE];
    let length = file.read_at(&mut line, 0).ok()?;
    std::str::from_utf8(line.get(..length)?).ok()?.split_ascii_whitespace().nth(which)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn thread_that_competes_for_a_processor_has_waited() {
        let Some(delay) = RunDelay::new(1) else { return };
        assert_eq!(delay.stolen(0), 0, "nobody has entered");
        let spin = |end: Instant| {
            while Instant::now() < end {
                std::hint::black_box(0);
            }
        };
        let end = Instant::now() + Duration::from_millis(200);
        let rivals = 4 * std::thread::available_parallelism().unwrap().get();
        std::thread::scope(|scope| {
            (0..rivals).for_each(|_| drop(scope.spawn(|| spin(end))));
            scope.spawn(|| {
                delay.enter(0);
                spin(end);
                assert!(delay.stolen(0) > 1_000_000, "{} ns", delay.stolen(0));
                assert!((1_000_000..250_000_000).contains(&delay.ran(0)), "{} ns", delay.ran(0));
            });
        });
        assert_eq!([delay.stolen(1), delay.ran(1)], [0; 2], "there is no such processor");
    }
}
