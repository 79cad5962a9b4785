//! What a guest's clocks say about a host that speaks KVM's dialect.
//!
//! `clocks watch SECONDS` prints `NOW REALTIME` ten times a second and `PTP HOST GUEST` once a second: the host's time of day and the guest's
//! at one moment, from `/dev/ptp0`, all in nanoseconds. Before that `PTP SAMPLES N` from the ioctl without cross time stamps.
//! `clocks steal SECONDS` keeps the processor busy and prints `STEAL TICKS`, hundredths of a second by which `/proc/stat` grew.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant, SystemTime};

/// `_IOW('=', 5, struct ptp_sys_offset)` and `_IOWR('=', 8, struct ptp_sys_offset_precise)`, `include/uapi/linux/ptp_clock.h`.
const PTP_SYS_OFFSET: u64 = 0x4340_3d05;
const PTP_SYS_OFFSET_PRECISE: u64 = 0xc040_3d08;

unsafe extern "C" {
    fn ioctl(file: i32, request: u64, ...) -> i32;
}

#[derive(Default, Clone, Copy)]
#[repr(C)]
struct Time {
    seconds: i64,
    nanoseconds: u32,
    reserved: u32,
}

impl Time {
    fn nanoseconds(self) -> i64 {
        self.seconds * 1_000_000_000 + i64::from(self.nanoseconds)
    }
}

#[repr(C)]
struct Offset {
    samples: u32,
    reserved: [u32; 3],
    /// System and device in turn, and system once more.
    times: [Time; 51],
}

#[derive(Default)]
#[repr(C)]
struct Precise {
    device: Time,
    realtime: Time,
    raw: Time,
    reserved: [u32; 4],
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let time = Duration::from_secs(arguments[2].parse().expect("a number of seconds"));
    match arguments[1].as_str() {
        "watch" => watch(time),
        "steal" => steal(time),
        other => panic!("no clock {other}"),
    }
}

fn watch(time: Duration) {
    let ptp = File::open("/dev/ptp0").expect("/dev/ptp0");
    let mut offset = Offset { samples: 5, reserved: [0; 3], times: [Time::default(); 51] };
    // SAFETY: the kernel writes a structure of the size that the request tells.
    assert_eq!(unsafe { ioctl(ptp.as_raw_fd(), PTP_SYS_OFFSET, &mut offset) }, 0, "{}", std::io::Error::last_os_error());
    let rising = offset.times[..11].windows(3).step_by(2).filter(|t| t[0].nanoseconds() <= t[2].nanoseconds() && t[1].seconds > 0).count();
    println!("PTP SAMPLES {rising}");
    let start = Instant::now();
    for round in 0.. {
        if start.elapsed() >= time {
            return;
        }
        if round % 10 == 0 {
            let mut precise = Precise::default();
            // SAFETY: as above.
            assert_eq!(unsafe { ioctl(ptp.as_raw_fd(), PTP_SYS_OFFSET_PRECISE, &mut precise) }, 0, "{}", std::io::Error::last_os_error());
            println!("PTP {} {}", precise.device.nanoseconds(), precise.realtime.nanoseconds());
        }
        println!("NOW {}", SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("after 1970").as_nanos());
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn steal(time: Duration) {
    let ticks = || -> u64 {
        let stat = std::fs::read_to_string("/proc/stat").expect("/proc/stat");
        stat.split_whitespace().nth(8).and_then(|steal| steal.parse().ok()).expect("a steal column")
    };
    let (before, start) = (ticks(), Instant::now());
    while start.elapsed() < time {
        std::hint::black_box(0);
    }
    println!("STEAL {}", ticks() - before);
}
