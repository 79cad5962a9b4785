//! How long the host kept each processor's thread waiting: Linux' own count of it, the second number in `/proc/<pid>/task/<tid>/schedstat`
//! (`Documentation/scheduler/sched-stats.rst`), which is also what Linux KVM takes for steal time (`record_steal_time`).

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;

use dialects::kvm::StealSource;
use vmm::VcpuId;

/// The calling thread's file.
const OWN: &str = "/proc/thread-self/schedstat";
/// Three numbers of 20 digits and their separators.
const LINE: usize = 64;

/// The run delay of a machine's processor threads.
pub struct RunDelay {
    threads: Vec<OnceLock<File>>,
}

impl RunDelay {
    /// For `vcpus` threads to come; `None` where the host does not count (a kernel without `CONFIG_SCHED_INFO`, or no `/proc`).
    pub fn new(vcpus: u32) -> Option<RunDelay> {
        delay(&File::open(OWN).ok()?)?;
        Some(RunDelay { threads: (0..vcpus).map(|_| OnceLock::new()).collect() })
    }

    /// The calling thread is processor `vcpu`.
    pub fn enter(&self, vcpu: VcpuId) {
        // The path means the thread that opens it, the file stays with that thread.
        if let (Some(thread), Ok(file)) = (self.threads.get(vcpu as usize), File::open(OWN)) {
            let _ = thread.set(file);
        }
    }
}

impl StealSource for RunDelay {
    fn stolen(&self, vcpu: VcpuId) -> u64 {
        // A thread that has not begun, or has ended, waits for nothing.
        self.threads.get(vcpu as usize).and_then(OnceLock::get).and_then(delay).unwrap_or(0)
    }
}

fn delay(file: &File) -> Option<u64> {
    let mut line = [0; LINE];
    let length = file.read_at(&mut line, 0).ok()?;
    std::str::from_utf8(line.get(..length)?).ok()?.split_ascii_whitespace().nth(1)?.parse().ok()
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
            });
        });
        assert_eq!(delay.stolen(1), 0, "there is no such processor");
    }
}
