//! The command line: OpenBSD's, and beside it commands that are words.
//!
//! ```text
//!   hostctl [-qt] [-f device] [-i input] [-o output] key [value]      OpenBSD's hostctl(8)
//!   hostctl [options] command [options] [arguments]                   get set ls rm watch detect serve
//! ```
//!
//! A key that is named like a command follows `--`, or is read with `get`. As with OpenBSD's getopt(3), options of the first form end at the
//! key, so that a value may begin with a hyphen; so do those of `set`.

use alloc::borrow::ToOwned;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::time::Duration;

/// How long an answer of the host is waited for without `--timeout`.
const PATIENCE: Duration = Duration::from_secs(10);

/// What is printed for a wrong command line.
pub const USAGE: &str = "usage: hostctl [-qt] [-f device] [-i input] [-o output] key [value]
       hostctl [-q] [-f device] [-o output] [--json] [--raw] get key
       hostctl [-q] [-f device] [-i input] [--raw] set key [value]
       hostctl [-f device] [--json] ls [path]
       hostctl [-f device] rm key
       hostctl [-f device] [--json] [--count n] watch key ...
       hostctl detect [--json]
       hostctl serve [--daemon]
       hostctl --help | --version
";

/// What `--help` adds.
pub const HELP: &str = "
Reads and writes the keys that this virtual machine shares with its host.

  -f device   /dev/pvbusN, or one of vmware, xen, hyperv, fw_cfg, kvm, openbsd, bhyve
  -i input    the value comes from a file, - is standard input
  -o output   the value goes to a file, - is standard output
  -q          print no value
  -t          print the type of the interface
  --raw       values as they are, byte by byte
  --json      results as JSON
  --explain   say which store answers, by what way, and why
  --timeout s seconds to wait for the host, for watch: until it ends
  --count n   changes after which watch ends
  --daemon    serve in the background

Exit status: 0 done, 1 failed, 2 usage, 3 no such key, 4 no such interface or store, 5 not permitted, 6 no answer.
Without a command word any failure is 1. More in hostctl(8).
";

/// A command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Arguments {
    /// What to do.
    pub command: Command,
    /// Whether it was said OpenBSD's way, whose exit statuses are 0 and 1.
    pub openbsd: bool,
    /// `-f`.
    pub device: Option<String>,
    /// `-o`, but not `-o -`.
    pub output: Option<Vec<u8>>,
    /// `-q`.
    pub quiet: bool,
    /// `--json`.
    pub json: bool,
    /// `--raw`.
    pub raw: bool,
    /// `--explain`.
    pub explain: bool,
    /// `--timeout`.
    pub timeout: Option<Duration>,
    /// `--count`.
    pub count: Option<u64>,
    /// `--daemon`.
    pub daemon: bool,
}

impl Arguments {
    /// How long an answer is waited for.
    #[must_use]
    pub fn patience(&self) -> Duration {
        self.timeout.unwrap_or(PATIENCE)
    }
}

/// What to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// `-t`.
    Type,
    /// A key alone, or `get`. Said OpenBSD's way, a key without a value lists what is below it.
    Get(Vec<u8>),
    /// A key and a value, or `set`.
    Set(Vec<u8>, Value),
    /// `ls`.
    List(Vec<u8>),
    /// `rm`.
    Remove(Vec<u8>),
    /// `watch`.
    Watch(Vec<Vec<u8>>),
    /// `detect`.
    Detect,
    /// `serve`.
    Serve,
    /// `--help`.
    Help,
    /// `--version`.
    Version,
}

/// Where a value comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Value {
    /// The command line.
    Bytes(Vec<u8>),
    /// `-i` and a file.
    File(Vec<u8>),
    /// `-i -`.
    Stdin,
}

/// Why a command line is wrong, and whether it was one of OpenBSD's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wrong {
    /// What is wrong with it; empty when [`USAGE`] says it all.
    pub text: String,
    /// Whether no command word had been seen.
    pub openbsd: bool,
}

/// The words of the commands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Word {
    Get,
    Set,
    List,
    Remove,
    Watch,
    Detect,
    Serve,
}

impl Word {
    fn of(argument: &[u8]) -> Option<Word> {
        Some(match argument {
            b"get" => Word::Get,
            b"set" => Word::Set,
            b"ls" => Word::List,
            b"rm" => Word::Remove,
            b"watch" => Word::Watch,
            b"detect" => Word::Detect,
            b"serve" => Word::Serve,
            _ => return None,
        })
    }
}

/// Options as they come.
#[derive(Debug, Default)]
struct Options {
    device: Option<String>,
    input: Option<Vec<u8>>,
    output: Option<Vec<u8>>,
    quiet: bool,
    show_type: bool,
    json: bool,
    raw: bool,
    explain: bool,
    timeout: Option<Duration>,
    count: Option<u64>,
    daemon: bool,
    help: bool,
    version: bool,
}

/// Understands `arguments`, the program's name not among them.
///
/// # Errors
/// [`Wrong`].
pub fn parse(arguments: impl IntoIterator<Item = Vec<u8>>) -> Result<Arguments, Wrong> {
    let mut rest = arguments.into_iter();
    let mut options = Options::default();
    let mut positional: Vec<Vec<u8>> = Vec::new();
    let mut word = None;
    // Until `--`, or until the key where a value may follow that looks like an option.
    let mut options_may_come = true;
    while let Some(argument) = rest.next() {
        let bytes = argument.as_slice();
        let wrong = |text| Wrong { text, openbsd: word.is_none() };
        if options_may_come && bytes == b"--" {
            options_may_come = false;
        } else if options_may_come && bytes.starts_with(b"--") {
            options.long(&argument, &mut rest).map_err(wrong)?;
        } else if options_may_come && bytes.starts_with(b"-") && bytes.len() > 1 {
            options.short(&bytes[1..], &mut rest).map_err(wrong)?;
        } else if options_may_come && word.is_none() && positional.is_empty() && Word::of(&argument).is_some() {
            word = Word::of(&argument);
        } else {
            options_may_come &= !matches!(word, None | Some(Word::Set));
            positional.push(argument);
        }
    }
    let openbsd = word.is_none();
    let command = command(word, &options, positional).map_err(|text| Wrong { text, openbsd })?;
    let Options { device, output, quiet, json, raw, explain, timeout, count, daemon, .. } = options;
    let output = output.filter(|path| path != b"-");
    Ok(Arguments { command, openbsd, device, output, quiet, json, raw, explain, timeout, count, daemon })
}

/// Puts word, options and the other arguments together.
fn command(word: Option<Word>, options: &Options, positional: Vec<Vec<u8>>) -> Result<Command, String> {
    if options.help {
        return Ok(Command::Help);
    }
    if options.version {
        return Ok(Command::Version);
    }
    if word.is_none() && options.show_type {
        return Ok(Command::Type);
    }
    let mut positional = positional.into_iter();
    let first = positional.next();
    let second = positional.next();
    let extra = positional.next();
    let key = |argument: Option<Vec<u8>>| argument.ok_or_else(String::new);
    match (word, second, extra) {
        (Some(Word::Watch), second, extra) => {
            let keys: Vec<_> = [first, second, extra].into_iter().flatten().chain(positional).collect();
            if keys.is_empty() { Err(String::new()) } else { Ok(Command::Watch(keys)) }
        }
        (_, _, Some(extra)) => Err(format!("too many arguments: {}", String::from_utf8_lossy(&extra))),
        (None | Some(Word::Set), Some(value), None) if options.input.is_none() => Ok(Command::Set(key(first)?, Value::Bytes(value))),
        (_, Some(extra), None) => Err(format!("too many arguments: {}", String::from_utf8_lossy(&extra))),
        (None | Some(Word::Set), None, None) if options.input.is_some() => {
            let input = options.input.clone().unwrap_or_default();
            Ok(Command::Set(key(first)?, if input == b"-" { Value::Stdin } else { Value::File(input) }))
        }
        (Some(Word::Set), None, None) => Err("set wants a value, or -i and a file".into()),
        (None | Some(Word::Get), None, None) => Ok(Command::Get(key(first)?)),
        (Some(Word::Remove), None, None) => Ok(Command::Remove(key(first)?)),
        (Some(Word::List), None, None) => Ok(Command::List(first.unwrap_or_default())),
        (Some(Word::Detect | Word::Serve), None, None) if first.is_some() => {
            Err(format!("too many arguments: {}", String::from_utf8_lossy(&first.unwrap_or_default())))
        }
        (Some(Word::Detect), None, None) => Ok(Command::Detect),
        (Some(Word::Serve), None, None) => Ok(Command::Serve),
    }
}

impl Options {
    /// Takes a cluster of short options, and from `rest` what the last of them wants.
    fn short(&mut self, cluster: &[u8], rest: &mut impl Iterator<Item = Vec<u8>>) -> Result<(), String> {
        for (at, option) in cluster.iter().enumerate() {
            match option {
                b'q' => self.quiet = true,
                b't' => self.show_type = true,
                b'f' | b'i' | b'o' => {
                    // What follows in the same argument, or the next one.
                    let joined = &cluster[at + 1..];
                    let value = if joined.is_empty() { rest.next() } else { Some(joined.to_vec()) };
                    let value = value.ok_or_else(|| format!("-{} wants an argument", char::from(*option)))?;
                    match option {
                        b'f' => self.device = Some(text(value)?),
                        b'i' => self.input = Some(value),
                        _ => self.output = Some(value),
                    }
                    return Ok(());
                }
                _ => return Err(format!("unknown option -{}", char::from(*option).escape_default())),
            }
        }
        Ok(())
    }

    /// Takes a long option, its value behind `=` or from `rest`.
    fn long(&mut self, argument: &[u8], rest: &mut impl Iterator<Item = Vec<u8>>) -> Result<(), String> {
        let option = String::from_utf8_lossy(argument);
        let (name, joined) = match option.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (&*option, None),
        };
        let mut number = |name: &str| {
            let value = joined.clone().or_else(|| rest.next().map(|value| String::from_utf8_lossy(&value).into_owned()));
            value.ok_or_else(|| format!("{name} wants a number"))
        };
        match name {
            "--timeout" => self.timeout = Some(seconds(&number(name)?)?),
            "--count" => {
                let value = number(name)?;
                self.count = Some(value.parse().ok().filter(|&count| count > 0).ok_or_else(|| format!("--count {value}: not a count"))?);
            }
            _ if joined.is_some() => return Err(format!("unknown option {option}")),
            "--json" => self.json = true,
            "--raw" => self.raw = true,
            "--explain" => self.explain = true,
            "--daemon" => self.daemon = true,
            "--help" => self.help = true,
            "--version" => self.version = true,
            _ => return Err(format!("unknown option {option}")),
        }
        Ok(())
    }
}

fn seconds(value: &str) -> Result<Duration, String> {
    let seconds = value.parse().ok().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    seconds.ok_or_else(|| format!("--timeout {value}: not a number of seconds"))
}

fn text(argument: Vec<u8>) -> Result<String, String> {
    String::from_utf8(argument).map_err(|error| format!("{}: not UTF-8", String::from_utf8_lossy(error.as_bytes())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Arguments {
        parse(line.split_whitespace().map(Vec::from)).unwrap()
    }

    fn wrong(line: &str) -> Wrong {
        parse(line.split_whitespace().map(Vec::from)).unwrap_err()
    }

    fn set(key: &str, value: &str) -> Command {
        Command::Set(key.into(), Value::Bytes(value.into()))
    }

    #[test]
    fn openbsd_s_examples_mean_what_they_mean_there() {
        assert_eq!(parsed("guestinfo.hostname").command, Command::Get("guestinfo.hostname".into()));
        assert_eq!(parsed("guestinfo.ip 192.168.100.111").command, set("guestinfo.ip", "192.168.100.111"));
        let line = parsed("-qf /dev/pvbus1 -o- Auto/");
        assert_eq!((line.command, line.quiet, line.device.as_deref()), (Command::Get("Auto/".into()), true, Some("/dev/pvbus1")));
        assert!(line.openbsd && line.output.is_none());
        assert_eq!(parsed("-t").command, Command::Type);
        assert_eq!(parsed("-i- key").command, Command::Set("key".into(), Value::Stdin));
        assert_eq!(parsed("-i file key").command, Command::Set("key".into(), Value::File("file".into())));
    }

    #[test]
    fn key_and_value_and_input_together_are_wrong() {
        assert!(wrong("-i file key value").openbsd);
        assert!(wrong("").text.is_empty());
        assert!(!wrong("set key").openbsd);
    }

    #[test]
    fn value_may_look_like_an_option() {
        assert_eq!(parsed("key -t").command, set("key", "-t"));
        assert_eq!(parsed("set key --json").command, set("key", "--json"));
    }

    #[test]
    fn key_named_like_a_command_follows_two_hyphens_or_get() {
        assert_eq!(parsed("detect").command, Command::Detect);
        assert_eq!(parsed("-- detect").command, Command::Get("detect".into()));
        assert_eq!(parsed("get detect").command, Command::Get("detect".into()));
        assert_eq!(parsed("-- set get").command, set("set", "get"));
        // Only the first argument can be a command.
        assert_eq!(parsed("key ls").command, set("key", "ls"));
    }

    #[test]
    fn options_of_commands_come_anywhere() {
        for line in ["--json ls device", "ls --json device", "ls device --json"] {
            let line = parsed(line);
            assert_eq!((line.command, line.json, line.openbsd), (Command::List("device".into()), true, false));
        }
        let line = parsed("watch a b c d --count=3 --timeout 1.5");
        assert_eq!(line.command, Command::Watch(["a", "b", "c", "d"].map(Vec::from).to_vec()));
        assert_eq!((line.count, line.timeout), (Some(3), Some(Duration::from_millis(1500))));
    }

    #[test]
    fn nonsense_is_told() {
        assert_eq!(wrong("-x").text, "unknown option -x");
        assert_eq!(wrong("--frobnicate").text, "unknown option --frobnicate");
        assert_eq!(wrong("--json=1 k").text, "unknown option --json=1");
        assert_eq!(wrong("-f").text, "-f wants an argument");
        assert_eq!(wrong("watch k --count 0").text, "--count 0: not a count");
        assert_eq!(wrong("--timeout -1 k").text, "--timeout -1: not a number of seconds");
        assert_eq!(wrong("detect all").text, "too many arguments: all");
        assert_eq!(wrong("a b c").text, "too many arguments: c");
        assert!(!wrong("watch").openbsd);
    }

    #[test]
    fn bytes_of_key_and_value_are_kept() {
        let bytes = b"\xff\n".to_vec();
        let line = parse([bytes.clone(), bytes.clone()]).unwrap();
        assert_eq!(line.command, Command::Set(bytes.clone(), Value::Bytes(bytes)));
    }
}
