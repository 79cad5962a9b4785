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
/// Bytes of a kibibyte.
pub const KIB: f64 = 1024.0;

/// What a monitor has resident besides its guest's memory, in bytes.
#[derive(Debug, Clone, Copy, Default)]
pub struct Memory {
    /// Its own but for translations.
    pub own: f64,
    /// Translated code, its own too. How much of the guest is executed often enough depends on when its interrupts come.
    pub translations: f64,
    /// Pages of the program and its libraries: the host's page cache has them once, for all machines and whoever else maps the files. The host
    /// maps up to 16 around each that is touched (`fault_around_bytes`).
    pub files: f64,
}

/// What one run gave.
#[derive(Debug, Default)]
pub struct Sample {
    /// Seconds by name.
    pub seconds: BTreeMap<String, f64>,
    /// Instructions of the whole run.
    pub instructions: Option<f64>,
    /// Of the monitor, when init ran.
    pub memory: Option<Memory>,
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
            sample.memory = std::fs::read_to_string(&smaps).ok().map(|text| beyond_guest(&text));
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

/// What /proc/PID/smaps (proc_pid_smaps(5)) says of all mappings but the guest's memory. Those the monitor keeps out of core dumps, which is what `dd` says;
/// the host gives only the kernel's own data pages the same flag, none of which count as resident.
fn beyond_guest(smaps: &str) -> Memory {
    /// Files of the monitor's that have no name: the translator's code, mapped twice. Each mapping has its half of a page in `Pss`.
    const NAMELESS: &str = "/memfd:";
    let mut memory = Memory::default();
    let (mut is_nameless, mut resident, mut shares, mut anonymous) = (false, 0.0, 0.0, 0.0);
    for line in smaps.lines() {
        let (name, rest) = line.split_once(':').unwrap_or_default();
        let bytes = || rest.split_whitespace().next().and_then(|word| word.parse::<f64>().ok()).unwrap_or(0.0) * KIB;
        match name {
            "Rss" => resident = bytes(),
            "Pss" => shares = bytes(),
            "Anonymous" => anonymous = bytes(),
            // The last of each mapping.
            "VmFlags" if rest.split_whitespace().any(|flag| flag == "dd") => {}
            "VmFlags" if is_nameless => memory.translations += shares,
            "VmFlags" => {
                memory.own += anonymous;
                memory.files += resident - anonymous;
            }
            range if range.contains('-') => is_nameless = line.contains(NAMELESS),
            _ => {}
        }
    }
    memory
}
