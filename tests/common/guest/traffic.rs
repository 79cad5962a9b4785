//! A guest's traffic on a disk or a network, for tests and benchmarks; statically linked, it runs in any initial RAM disk.
//!
//! ```text
//!   traffic fill DEVICE BLOCKS ROUNDS      writes all blocks in a disorderly order, that many times; the last round's content stays
//!   traffic flush DEVICE BLOCKS            writes block after block, flushes now and then, and says how many are flushed, without end
//!   traffic random DEVICE read|write N     N blocks of 4 KiB at random places, past the page cache; microseconds each
//!   traffic sequential DEVICE read|write N  N pieces of 1 MiB in order, past the page cache; microseconds each
//!   traffic cached DEVICE read N           the same through the page cache, which is emptied before
//!   traffic receive|send HOST PORT MIB     a TCP stream in pieces of 64 KiB; microseconds a MiB
//!   traffic answer HOST PORT N             N requests of one byte, each with its answer; microseconds each
//! ```
//!
//! What blocks hold is in `pattern.rs`, which the host's side of a test has, too.

#[path = "pattern.rs"]
mod pattern;

use std::alloc::{Layout, alloc_zeroed};
use std::error::Error;
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::net::TcpStream;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::time::Instant;

use pattern::{BLOCK, block, place};

/// Past the page cache: `O_DIRECT` of x86 Linux.
const DIRECT: i32 = 0o40000;
const PIECE: usize = 1 << 20;
const STREAM_PIECE: usize = 64 << 10;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["fill", device, blocks, rounds] => fill(&open(device, 0)?, blocks.parse()?, rounds.parse()?),
        ["flush", device, blocks] => flush(&open(device, 0)?, blocks.parse()?),
        ["random", device, way, count] => {
            let place = |n, size| place(n, size / BLOCK as u64) * BLOCK as u64;
            timed(&open(device, DIRECT)?, way, count.parse()?, BLOCK, place)
        }
        ["sequential", device, way, count] => timed(&open(device, DIRECT)?, way, count.parse()?, PIECE, in_order),
        ["cached", device, way, count] => {
            std::fs::write("/proc/sys/vm/drop_caches", "3")?;
            timed(&open(device, 0)?, way, count.parse()?, PIECE, in_order)
        }
        ["receive", host, port, mebibytes] => {
            stream(connect(host, port, b'r')?, mebibytes.parse()?, |stream, piece| stream.read_exact(piece))
        }
        ["send", host, port, mebibytes] => stream(connect(host, port, b's')?, mebibytes.parse()?, |stream, piece| stream.write_all(piece)),
        ["answer", host, port, count] => answer(connect(host, port, b'a')?, count.parse()?),
        _ => Err("what traffic?".into()),
    }
}

fn open(device: &str, flags: i32) -> std::io::Result<File> {
    OpenOptions::new().read(true).write(true).custom_flags(flags).open(device)
}

fn fill(file: &File, blocks: u64, rounds: u64) -> Result<(), Box<dyn Error>> {
    for round in 0..rounds {
        for n in 0..blocks {
            let at = place(n + round, blocks);
            file.write_all_at(&block(at + round), at * BLOCK as u64)?;
        }
    }
    file.sync_all()?;
    println!("FILLED");
    Ok(())
}

fn flush(file: &File, blocks: u64) -> Result<(), Box<dyn Error>> {
    for n in 0..blocks {
        file.write_all_at(&block(n), place(n, blocks) * BLOCK as u64)?;
        if n % 5 == 4 || n % 7 == 0 {
            file.sync_all()?;
            println!("FLUSHED {n}.");
        }
    }
    Err("the disk is full".into())
}

/// Where the `n`th piece is on a disk of `size` bytes.
fn in_order(n: u64, size: u64) -> u64 {
    n % (size / PIECE as u64) * PIECE as u64
}

/// Moves `count` pieces of `length` bytes to or from where `place` says, and prints how long one takes.
fn timed(mut file: &File, way: &str, count: u64, length: usize, place: impl Fn(u64, u64) -> u64) -> Result<(), Box<dyn Error>> {
    let size = file.seek(SeekFrom::End(0))?;
    let layout = Layout::from_size_align(length, BLOCK)?;
    // SAFETY: the layout has a size, and the buffer lives as long as the program.
    let buffer = unsafe { std::slice::from_raw_parts_mut(alloc_zeroed(layout), length) };
    let mut transfer = |n| {
        let at = place(n, size);
        if way == "read" { file.read_exact_at(buffer, at) } else { file.write_all_at(buffer, at) }
    };
    // Once before, for what the first time costs.
    transfer(0)?;
    let start = Instant::now();
    (1..=count).try_for_each(transfer)?;
    file.sync_all()?;
    say(start, count);
    Ok(())
}

/// The host's side does what the first byte says.
fn connect(host: &str, port: &str, wish: u8) -> Result<TcpStream, Box<dyn Error>> {
    let mut stream = TcpStream::connect((host, port.parse()?))?;
    stream.set_nodelay(true)?;
    stream.write_all(&[wish])?;
    Ok(stream)
}

fn stream(
    mut stream: TcpStream,
    mebibytes: u64,
    move_piece: impl Fn(&mut TcpStream, &mut [u8]) -> std::io::Result<()>,
) -> Result<(), Box<dyn Error>> {
    let mut piece = vec![0x5a; STREAM_PIECE];
    let start = Instant::now();
    for _ in 0..mebibytes * (PIECE / STREAM_PIECE) as u64 {
        move_piece(&mut stream, &mut piece)?;
    }
    // A sender is done when the other side has all.
    stream.shutdown(std::net::Shutdown::Write)?;
    let _ = stream.read(&mut [0]);
    say(start, mebibytes);
    Ok(())
}

fn answer(mut stream: TcpStream, count: u64) -> Result<(), Box<dyn Error>> {
    let start = Instant::now();
    for _ in 0..count {
        stream.write_all(&[1])?;
        stream.read_exact(&mut [0])?;
    }
    say(start, count);
    Ok(())
}

fn say(start: Instant, count: u64) {
    println!("MICROSECONDS {:.2}", start.elapsed().as_secs_f64() * 1e6 / count as f64);
}
