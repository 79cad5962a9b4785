//! Loops that a guest runs for the benchmark: `loops NAME COUNT [BUSYBOX]`. Prints `LOOP NAME COUNT NANOSECONDS`.

use std::hint::black_box;
use std::process::Command;
use std::time::Instant;

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let (name, count) = (arguments[1].as_str(), arguments[2].parse::<u64>().expect("a count"));
    let start = Instant::now();
    match name {
        // Assignments and comparisons of busybox' shell.
        "shell" => {
            let script = format!("i=0; while [ $i -lt {count} ]; do i=$((i+1)); done");
            assert!(Command::new("/bin/busybox").args(["sh", "-c", &script]).status().expect("a shell").success());
        }
        // A mebibyte copied in user mode.
        "memory" => {
            let (from, mut to) = (vec![1u8; 1 << 20], vec![0u8; 1 << 20]);
            for _ in 0..count {
                to.copy_from_slice(black_box(&from));
                black_box(&mut to);
            }
        }
        "syscall" => {
            for _ in 0..count {
                black_box(std::process::id());
            }
        }
        // Fresh pages, touched once each and given back: large allocations are mapped and unmapped.
        "fault" => {
            const PAGES: u64 = 1024;
            for _ in 0..count.div_ceil(PAGES) {
                let mut memory = Vec::<u8>::with_capacity((PAGES * 4096) as usize);
                for page in memory.spare_capacity_mut().chunks_mut(4096) {
                    page[0].write(1);
                }
                black_box(&mut memory);
            }
        }
        "fork" => {
            for _ in 0..count {
                assert!(Command::new("/bin/busybox").arg("true").status().expect("a program").success());
            }
        }
        other => panic!("no loop {other}"),
    }
    println!("LOOP {name} {count} {}", start.elapsed().as_nanos());
}
