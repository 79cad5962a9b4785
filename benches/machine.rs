//! One run of a machine from the start of its program to the guest's power-off, and what it cost.
//!
//! The guest is `tests/common/guest/init`, which prints `INIT REACHED` first and `LOOP NAME COUNT NANOSECONDS` for each loop it has run. Time to init is
//! the host's, times of loops are the guest's own. `vmctl` counts instructions when it is asked to by `--stats`.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// A run that is not done by then is broken.
const PATIENCE: Duration = Duration::from_secs(600);
/// Mappings at least this large are the guest's memory.
const GUEST_MAPPING: u64 = 256 << 20;
/// Bytes of a mebibyte.
pub const MIB: f64 = (1 << 20) as f64;

/// What one run gave.
#[derive(Debug, Default)]
pub struct Sample {
    /// Seconds by name.
    pub seconds: BTreeMap<String, f64>,
    /// Instructions of the whole run.
    pub instructions: Option<f64>,
    /// Bytes resident besides guest memory, when init ran.
    pub overhead: Option<f64>,
    /// What the guest wrote to its serial port.
    pub output: String,
}

/// Runs one machine and takes down what it says.
pub fn run(mut command: Command) -> Sample {
    let start = Instant::now();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let smaps = PathBuf::from(format!("/proc/{}/smaps", child.id()));
    let stdout = child.stdout.take().expect("a pipe");
    let stderr = child.stderr.take().expect("a pipe");
    let errors = std::thread::spawn(move || {
        let mut text = String::new();
        // Whatever was said before it broke off is enough.
        let _ = BufReader::new(stderr).read_to_string(&mut text);
        text
    });
    let mut sample = Sample::default();
    for line in BufReader::new(stdout).split(b'\n').map_while(Result::ok) {
        let line = String::from_utf8_lossy(&line).into_owned();
        if line.contains("INIT REACHED") {
            sample.seconds.insert("init".into(), start.elapsed().as_secs_f64());
            sample.overhead = std::fs::read_to_string(&smaps).ok().map(|text| resident_beyond_guest(&text));
        } else if let Some((_, rest)) = line.split_once("LOOP ") {
            let words: Vec<&str> = rest.split_whitespace().collect();
            if let [name, _, nanoseconds] = words[..] {
                sample.seconds.insert(name.into(), nanoseconds.parse::<f64>().expect("nanoseconds") / 1e9);
            }
        }
        sample.output.push_str(&line);
        sample.output.push('\n');
        assert!(start.elapsed() < PATIENCE, "{command:?} is not done after {PATIENCE:?}:\n{}", sample.output);
    }
    let status = child.wait().expect("its end");
    let errors = errors.join().expect("its errors");
    assert!(status.success(), "{command:?}: {status}\n{errors}\n{}", sample.output);
    let count = errors.lines().find_map(|line| line.strip_prefix("instructions "));
    sample.instructions = count.and_then(|count| count.trim().parse().ok());
    sample
}

/// Resident bytes of all mappings but the guest's memory, out of /proc/PID/smaps.
fn resident_beyond_guest(smaps: &str) -> f64 {
    let kib = |line: &str| line.split_whitespace().nth(1).and_then(|word| word.parse::<u64>().ok()).unwrap_or(0) * 1024;
    let (mut size, mut sum) = (0, 0);
    for line in smaps.lines() {
        if line.starts_with("Size:") {
            size = kib(line);
        } else if line.starts_with("Rss:") && size < GUEST_MAPPING {
            sum += kib(line);
        }
    }
    sum as f64
}
