//! What a guest's clocks say about a host that speaks KVM's dialect.
//!
//! `clocks watch SECONDS` sets the guest's clock by `/dev/ptp0` once. Then it prints `NOW REALTIME` ten times a second and `PTP HOST GUEST` once
//! a second: the host's time of day and the guest's at one moment, all in nanoseconds. Before that `PTP SAMPLES N` from the ioctl without
//! cross time stamps.
//! `clocks steal SECONDS` keeps the processor busy and prints `STEAL TICKS`, hundredths of a second by which `/proc/stat` grew.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant, SystemTime};

/// `_IOW('=', 5, struct ptp_sys_offset)` and `_IOWR('=', 8, struct ptp_sys_offset_precise)`, `include/uapi/linux/ptp_clock.h`.
const PTP_SYS_OFFSET: u64 = 0x4340_3d05;
const PTP_SYS_OFFSET_PRECISE: u64 = 0xc040_3d08;

const CLOCK_REALTIME: i32 = 0;
const SECOND: i64 = 1_000_000_000;

unsafe extern "C" {
    fn ioctl(file: i32, request: u64, ...) -> i32;
    fn clock_settime(clock: i32, time: &TimeSpec) -> i32;
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
        self.seconds * SECOND + i64::from(self.nanoseconds)
    }
}

#[repr(C)]
struct TimeSpec {
    seconds: i64,
    nanoseconds: i64,
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
    let (host, guest) = pair(&ptp);
    let now = realtime() + host - guest;
    // SAFETY: the kernel reads the structure.
    assert_eq!(unsafe { clock_settime(CLOCK_REALTIME, &TimeSpec { seconds: now / SECOND, nanoseconds: now % SECOND }) }, 0);
    let start = Instant::now();
    for round in 0.. {
        if start.elapsed() >= time {
            return;
        }
        if round % 10 == 0 {
            let (host, guest) = pair(&ptp);
            println!("PTP {host} {guest}");
        }
        println!("NOW {}", realtime());
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// The host's time of day and the guest's at one moment.
fn pair(ptp: &File) -> (i64, i64) {
    let mut precise = Precise::default();
    // SAFETY: the kernel writes a structure of the size that the request tells.
    assert_eq!(unsafe { ioctl(ptp.as_raw_fd(), PTP_SYS_OFFSET_PRECISE, &mut precise) }, 0, "{}", std::io::Error::last_os_error());
    (precise.device.nanoseconds(), precise.realtime.nanoseconds())
}

fn realtime() -> i64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("after 1970").as_nanos() as i64
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
