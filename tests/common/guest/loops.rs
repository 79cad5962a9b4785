//! Loops that a guest runs for the benchmark: `loops NAME COUNT [BUSYBOX]`. Prints `LOOP NAME COUNT NANOSECONDS`.

use std::hint::black_box;
use std::process::Command;
use std::time::Instant;

const PAGE: usize = 4096;
/// PROT_READ | PROT_WRITE.
const READ_WRITE: i32 = 3;
/// MAP_PRIVATE | MAP_ANONYMOUS.
const PRIVATE_ANONYMOUS: i32 = 0x22;

unsafe extern "C" {
    fn mmap(address: *mut u8, length: usize, protection: i32, flags: i32, file: i32, offset: i64) -> *mut u8;
    fn munmap(address: *mut u8, length: usize) -> i32;
}

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
        // Fresh pages, touched once each and given back. Mapped by hand: an allocator would keep them; a mebibyte at a time: more
        // would become huge pages.
        "fault" => {
            const PAGES: u64 = 256;
            const SIZE: usize = PAGES as usize * PAGE;
            for _ in 0..count.div_ceil(PAGES) {
                // SAFETY: an anonymous mapping of our own, written inside its bounds and unmapped whole.
                unsafe {
                    let memory = mmap(std::ptr::null_mut(), SIZE, READ_WRITE, PRIVATE_ANONYMOUS, -1, 0);
                    assert!(memory as isize != -1, "no memory");
                    for page in (0..SIZE).step_by(PAGE) {
                        memory.add(page).write_volatile(1);
                    }
                    munmap(memory, SIZE);
                }
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
