//! A running machine from outside: its keys, its power and its state through the control socket, and keys as fw_cfg files.

// Tests fail by panicking; the lint knows only functions marked as tests.
#![allow(clippy::unwrap_used)]

#[path = "common/xenstore/mod.rs"]
mod clients;
#[path = "common/mod.rs"]
mod common;
mod guests;
#[path = "rig/initrd.rs"]
mod initrd;

use std::io::{BufRead, BufReader, Lines, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use clients::Clients;
use guests::session::Session;
use tempfile::TempDir;

const PROMPT: &str = "pvbus# ";
/// A key that is only there to see whether a watch has begun.
const READY: &str = "ready/now";
/// What ends a command's status when there is no such key, and when the time ran out.
const NO_KEY: Option<i32> = Some(2);
const TIME_OUT: Option<i32> = Some(4);
/// A boot of Debian's kernel on the software CPU, when nothing else runs, takes seconds.
const PATIENCE: Duration = Duration::from_secs(300);

/// The embedded guest at its prompt, with a control socket.
struct Machine {
    directory: TempDir,
    tool: Tool,
    session: Session,
}

/// `vmctl` on a machine that runs already.
struct Tool {
    socket: PathBuf,
}

impl Machine {
    fn start(more: &[&str]) -> Machine {
        let directory = TempDir::new().unwrap();
        let socket = directory.path().join("control");
        let mut command = Command::new(env!("CARGO_BIN_EXE_vmctl"));
        command.args(["run", "--backend", "soft", "--cmdline", "prompt", "--dialect", "vmware", "--control"]).arg(&socket).args(more);
        let mut session = Session::start(command);
        session.wait_for(PROMPT);
        Machine { directory, tool: Tool { socket }, session }
    }

    /// Types a command in the guest and returns what it prints.
    fn guest(&mut self, command: &str) -> String {
        self.session.type_in(&format!("{command}\r"));
        self.session.wait_for("\r\n");
        self.session.wait_for(PROMPT)
    }
}

impl Tool {
    fn command(&self, verb: &[&str], more: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vmctl"));
        command.args(verb).arg("--control").arg(&self.socket).args(more).stdin(Stdio::null());
        command
    }

    /// `vmctl kv VERB`: status and what it printed.
    fn kv(&self, verb: &str, more: &[&str]) -> (Option<i32>, String, String) {
        finished(self.command(&["kv", verb], more))
    }

    fn stop(&self, more: &[&str]) -> (Option<i32>, String, String) {
        finished(self.command(&["stop"], more))
    }

    fn status(&self) -> serde_json::Value {
        let (status, output, errors) = finished(self.command(&["status"], &["--json"]));
        assert_eq!(status, Some(0), "{errors}");
        serde_json::from_str(&output).unwrap()
    }
}

fn finished(mut command: Command) -> (Option<i32>, String, String) {
    let output = command.output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

fn piped(mut command: Command, input: &[u8]) -> (Option<i32>, Vec<u8>) {
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(input).unwrap();
    let output = child.wait_with_output().unwrap();
    (output.status.code(), output.stdout)
}

#[test]
fn keys_go_both_ways_between_host_and_guest() {
    let mut machine = Machine::start(&["--kv", "guestinfo.hostname=web1"]);
    assert_eq!(machine.guest("hostctl guestinfo.hostname"), "web1\r\n");
    assert_eq!(machine.tool.kv("set", &["role", "database"]).0, Some(0));
    assert_eq!(machine.guest("hostctl guestinfo.role"), "database\r\n");
    machine.guest("hostctl guestinfo.app.state ready");
    assert_eq!(machine.tool.kv("get", &["app.state"]).1, "ready", "exactly the value when nobody looks");
    assert_eq!(machine.tool.kv("get", &["vm-data/app/state"]).1, "ready");
    assert_eq!(machine.tool.kv("rm", &["app.state"]).0, Some(0));
    let (status, output, errors) = machine.tool.kv("get", &["app.state"]);
    assert_eq!((status, output.as_str(), errors.as_str()), (NO_KEY, "", "vmctl: there is no key vm-data/app/state\n"));
    assert_eq!(machine.tool.kv("ls", &["vm-data/"]).1, "app\ngreeting\nhostname\nrole\n", "with a key of the demonstration's");
    assert_eq!(machine.tool.kv("ls", &["-R", "--json", "vm-data/hostname"]).1, "{\n  \"vm-data/hostname\": \"web1\"\n}\n");
}

#[test]
fn absolute_paths_are_those_of_the_whole_tree() {
    let mut machine = Machine::start(&["--kv", "/vm/x/name=elsewhere"]);
    assert_eq!(machine.tool.kv("set", &["/local/domain/1/vm-data/role", "database"]).0, Some(0));
    assert_eq!(machine.guest("hostctl guestinfo.role"), "database\r\n");
    assert_eq!(machine.tool.kv("get", &["role"]).1, "database");
    assert_eq!(machine.tool.kv("ls", &["/"]).1, "local\nvm\n");
    assert_eq!(machine.tool.kv("ls", &["-R", "/vm"]).1, "/vm/x/name\n");
    assert_eq!(machine.tool.kv("ls", &[]).1, "attr\ncontrol\ndata\nvm-data\n");
    assert_eq!(machine.tool.kv("rm", &["vm-data/"]).0, Some(0));
    assert_eq!(machine.guest("hostctl guestinfo.role again"), "", "the guest may write where it could before");
    assert_eq!(machine.tool.kv("ls", &["-R", "vm-data/"]).1, "vm-data/role\n");
}

#[test]
fn debians_clients_pass_on_the_socket_of_a_running_machine() {
    let directory = TempDir::new().unwrap();
    let clients = Clients { socket: directory.path().join("xenstored") };
    let _machine = Machine::start(&["--xenstore", clients.socket.to_str().unwrap()]);
    clients.write_read_list_and_remove();
    clients.watch();
    clients.test_xenstore();
    clients.pyxs();
}

#[test]
fn clients_of_xenstore_see_the_same_keys() {
    let directory = TempDir::new().unwrap();
    let socket = directory.path().join("xenstored");
    let mut machine = Machine::start(&["--xenstore", socket.to_str().unwrap()]);
    let client = |words: &[&str]| {
        let mut command = Command::new(format!("xenstore-{}", words[0]));
        command.arg("-s").args(&words[1..]).env("XENSTORED_PATH", &socket);
        finished(command)
    };
    assert_eq!(client(&["write", "/local/domain/1/vm-data/role", "database"]).0, Some(0));
    assert_eq!(machine.guest("hostctl guestinfo.role"), "database\r\n");
    machine.guest("hostctl guestinfo.app.state ready");
    assert_eq!(client(&["read", "/local/domain/1/vm-data/app/state"]).1, "ready\n");
    assert_eq!(client(&["list", "/local/domain/1"]).1, "attr\ncontrol\ndata\nvm-data\n");
    assert_eq!(client(&["rm", "/local/domain/1/vm-data/app"]).0, Some(0));
    assert_eq!(machine.tool.kv("get", &["app.state"]).0, NO_KEY);
    let (status, _, errors) = finished({
        let mut second = Command::new(env!("CARGO_BIN_EXE_vmctl"));
        second.args(["run", "--backend", "soft", "--xenstore"]).arg(&socket).stdin(Stdio::null());
        second
    });
    assert!(status == Some(1) && errors.contains("in use by a running program"), "{errors}");
    machine.session.type_in("poweroff\r");
    assert_eq!(machine.session.status(), Some(0));
    assert!(!socket.exists(), "the socket goes with the machine");
}

#[test]
fn binary_values_survive_files_pipes_and_json() {
    let machine = Machine::start(&[]);
    let bytes: Vec<u8> = (0..=255).collect();
    let file = machine.directory.path().join("bytes");
    std::fs::write(&file, &bytes).unwrap();
    assert_eq!(machine.tool.kv("set", &["a", "-i", file.to_str().unwrap()]).0, Some(0));
    assert_eq!(piped(machine.tool.command(&["kv", "get"], &["a"]), b""), (Some(0), bytes.clone()));
    assert_eq!(piped(machine.tool.command(&["kv", "set"], &["b", "-"]), &bytes).0, Some(0));
    assert_eq!(piped(machine.tool.command(&["kv", "get"], &["b"]), b"").1, bytes);
    assert!(machine.tool.kv("get", &["--json", "a"]).1.starts_with("{\"base64\":\"AAECAwQF"));
    assert_eq!(machine.tool.kv("set", &["c", "-5"]).0, Some(0));
    assert_eq!(machine.tool.kv("get", &["--json", "c"]).1, "\"-5\"\n");
}

#[test]
fn watch_prints_a_line_for_each_change_until_the_machine_ends() {
    let mut machine = Machine::start(&[]);
    let watch = Watch::start(&machine.tool, &["guestinfo.said", "data/"]);
    machine.guest("hostctl guestinfo.said \"two words\"");
    machine.tool.kv("set", &["data/x", "a\nb"]);
    machine.tool.kv("set", &["other", "unwatched"]);
    machine.tool.kv("rm", &["data/x"]);
    assert_eq!(machine.tool.stop(&["--force"]).0, Some(0));
    assert_eq!(machine.session.status(), Some(0));
    assert_eq!(watch.finish(), (Some(0), vec!["vm-data/said=two words".into(), "data/x=a\\nb".into(), "data/x removed".into()]));
}

#[test]
fn watch_ends_after_a_count_or_a_time() {
    let machine = Machine::start(&[]);
    let mut watch = machine.tool.command(&["kv", "watch", "--json"], &["said", "--count", "1"]).stdout(Stdio::piped()).spawn().unwrap();
    while watch.try_wait().unwrap().is_none() {
        machine.tool.kv("set", &["said", "hello"]);
    }
    let output = watch.wait_with_output().unwrap();
    assert_eq!((output.status.code(), output.stdout), (Some(0), b"{\"path\":\"vm-data/said\",\"value\":\"hello\"}\n".to_vec()));
    assert_eq!(machine.tool.kv("watch", &["said", "--count", "1", "--timeout", "0.2"]).0, TIME_OUT);
    assert_eq!(machine.tool.kv("watch", &["said", "--timeout", "0.2"]).0, Some(0));
}

/// `vmctl kv watch` in the background.
struct Watch {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Watch {
    /// Starts it and waits until it is told of changes.
    fn start(tool: &Tool, paths: &[&str]) -> Watch {
        let mut child = tool.command(&["kv", "watch", READY], paths).stdout(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        std::thread::scope(|scope| {
            let first = scope.spawn(|| lines.next());
            while !first.is_finished() {
                tool.kv("set", &[READY, "yes"]);
            }
        });
        Watch { child, lines }
    }

    /// Waits for its end; its status and what it told.
    fn finish(mut self) -> (Option<i32>, Vec<String>) {
        let lines = self.lines.map_while(Result::ok).filter(|line| !line.starts_with(READY)).collect();
        (self.child.wait().unwrap().code(), lines)
    }
}

#[test]
fn store_is_written_at_the_end_and_outlives_reboots() {
    let out = TempDir::new().unwrap();
    let file = out.path().join("store.json");
    let mut machine = Machine::start(&["--kv", "a=@@at", "--kv", "data/b=@/dev/null", "--kv-out", file.to_str().unwrap()]);
    machine.guest("hostctl guestinfo.said kept");
    assert_eq!(machine.tool.stop(&["--reboot", "--force"]).0, Some(0));
    machine.session.wait_for(PROMPT);
    assert_eq!(machine.guest("hostctl guestinfo.said"), "kept\r\n");
    assert_eq!(machine.tool.status()["boots"], 2);
    machine.session.type_in("poweroff\r");
    assert_eq!(machine.session.status(), Some(0));
    let store: serde_json::Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    assert_eq!((&store["vm-data/a"], &store["data/b"], &store["vm-data/said"]), (&"@at".into(), &"".into(), &"kept".into()));
    assert!(!machine.tool.socket.exists(), "the socket goes with the machine");
}

#[test]
fn status_tells_what_the_machine_is_and_listens_to() {
    let uuid = "564d5868-0001-4002-8003-00000000002a";
    let machine = Machine::start(&["--uuid", uuid, "--memory", "128M"]);
    let status = machine.tool.status();
    assert_eq!(status["uuid"], uuid);
    assert_eq!((&status["memory"], &status["cpus"], &status["backend"]), (&(128 << 20).into(), &1.into(), &"soft".into()));
    assert_eq!(status["dialects"], serde_json::json!(["vmware"]));
    assert_eq!(status["guest"]["power_button"], true);
    assert_eq!(status["guest"]["vmware_tools"]["run"], true);
    let text = finished(machine.tool.command(&["status"], &[])).1;
    assert!(text.contains("memory        128M\n") && text.contains("vmware tools  run"), "{text}");
}

#[test]
fn guest_is_asked_by_what_it_listens_to() {
    let mut machine = Machine::start(&[]);
    // The tools ask for requests about once a second.
    let (status, _, errors) = machine.tool.stop(&["--reboot", "--wait", "30"]);
    assert_eq!((status, errors.as_str()), (Some(0), "vmctl: asked the guest to reboot, by vmware\nvmctl: the machine has rebooted\n"));
    machine.session.wait_for(PROMPT);
    let refused = |more: &[&str], words: &str| {
        let (status, _, errors) = machine.tool.stop(more);
        assert!(status == Some(1) && errors.contains(words), "{errors}");
    };
    refused(&["--via", "openbsd"], "started without the dialect openbsd");
    refused(&["--via", "acpi", "--reboot"], "cannot be asked to reboot by acpi; --force");
    assert_eq!(machine.tool.stop(&["--via", "acpi", "--wait", "30"]).0, Some(0));
    assert_eq!(machine.session.status(), Some(0));
}

#[test]
fn refusal_of_the_guest_is_shown() {
    let machine = Machine::start(&[]);
    let (status, _, errors) = finished(machine.tool.command(&["sync"], &[]));
    assert_eq!((status, errors.as_str()), (Some(0), "vmctl: asked the guest to set its clock, by vmware\n"));
    let last_request = || machine.tool.status()["guest"]["vmware_tools"]["last_request"].as_str().unwrap_or_default().to_owned();
    let deadline = Instant::now() + PATIENCE;
    while !last_request().contains("refused") && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(last_request(), "setting of the clock refused: ERROR Unknown command", "our driver sets no clock");
}

#[test]
fn hostile_clients_do_not_stop_the_machine_or_each_other() {
    let mut machine = Machine::start(&[]);
    std::thread::scope(|scope| {
        for number in 0..4u8 {
            let socket = &machine.tool.socket;
            scope.spawn(move || {
                for round in 0..20 {
                    let mut stream = UnixStream::connect(socket).unwrap();
                    let garbage: Vec<u8> = (0..10_000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8 ^ number ^ round).collect();
                    // The server closes whenever it has seen enough.
                    let _ = stream.write_all(&garbage);
                }
            });
        }
        for number in 0..4 {
            let tool = &machine.tool;
            scope.spawn(move || {
                for round in 0..5 {
                    let (key, value) = (format!("k{number}"), round.to_string());
                    assert_eq!(tool.kv("set", &[&key, &value]).0, Some(0));
                    assert_eq!(tool.kv("get", &[&key]).1, value);
                }
            });
        }
    });
    assert_eq!(machine.guest("hostctl guestinfo.k3"), "4\r\n");
}

#[test]
fn socket_errors_say_what_to_do() {
    let machine = Machine::start(&[]);
    let other = TempDir::new().unwrap();
    let refused = |mut command: Command, words: &str| {
        let output = command.stdin(Stdio::null()).output().unwrap();
        let errors = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.code() == Some(1) && errors.contains(words), "{errors}");
    };
    let run = |socket: &Path| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vmctl"));
        command.args(["run", "--backend", "soft", "--control"]).arg(socket);
        command
    };
    refused(run(&machine.tool.socket), "in use by a running program");
    let file = guests::write(other.path(), "file", b"precious");
    refused(run(&file), "exists and is not a socket");
    refused(run(&other.path().join("absent/control")), "No such file");
    let status = |socket: &Path| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vmctl"));
        command.args(["status", "--control"]).arg(socket);
        command
    };
    refused(status(&other.path().join("nothing")), "there is no such socket");
    refused(status(&file), "exists and is not a socket");
    assert_eq!(std::fs::read(&file).unwrap(), b"precious");
    assert!(machine.tool.status()["pid"].is_number(), "the machine that was there goes on");
}

#[test]
fn socket_of_a_killed_machine_is_used_again() {
    let machine = Machine::start(&[]);
    let Machine { directory, tool: Tool { socket }, session } = machine;
    Command::new("kill").args(["-9", &session.id().to_string()]).status().unwrap();
    drop(session);
    assert!(socket.exists());
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmctl"));
    command.args(["run", "--backend", "soft", "--control"]).arg(&socket);
    let run = common::run(command, PATIENCE);
    assert_eq!(run.status, Some(0), "{run}");
    drop(directory);
}

#[test]
fn linux_without_a_button_driver_is_stopped_by_force() {
    let directory = TempDir::new().unwrap();
    let socket = directory.path().join("control");
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmctl"));
    command.args(["run", "--backend", "soft", "--cmdline", "console=ttyS0 quiet test=shell", "--control"]).arg(&socket);
    command.arg("--kernel").arg(common::guest("vmlinuz")).arg("--initrd").arg(common::guest("initrd-busybox.gz"));
    let mut machine = common::Machine::start(command);
    machine.wait_for("/ #", PATIENCE);
    let stop = |more: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vmctl"));
        command.args(["stop", "--control"]).arg(&socket).args(more);
        finished(command)
    };
    assert!(stop(&["--via", "acpi"]).2.contains("does not listen to its power button"));
    assert!(stop(&["--wait", "1"]).2.contains("--force does it without the guest"));
    assert_eq!(stop(&["--wait", "1", "--force"]).0, Some(0));
    assert_eq!(machine.end(PATIENCE).status, Some(0));
}

#[test]
fn linux_reads_keys_as_fw_cfg_files() {
    let directory = TempDir::new().unwrap();
    let mut initrd = initrd::Initrd::default();
    for name in ["bin", "sys"] {
        initrd.directory(name);
    }
    initrd.file("bin/busybox", 0o755, &std::fs::read("/bin/busybox").unwrap());
    initrd.file("qemu_fw_cfg.ko", 0o644, &std::fs::read(module("drivers/firmware/qemu_fw_cfg.ko")).unwrap());
    initrd.script(
        "export PATH=/bin\nbusybox mount -t sysfs sys /sys\nbusybox insmod /qemu_fw_cfg.ko\n\
         cd /sys/firmware/qemu_fw_cfg/by_name/opt\n\
         for file in org.pvbus/hostname org.pvbus/a/b org.example/config; do echo \"$file: $(busybox cat $file/raw)\"; done",
    );
    let image = guests::write(directory.path(), "initrd", &initrd.finish());
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmctl"));
    command.args(["run", "--backend", "soft", "--dialect", "none", "--cmdline", "console=ttyS0 quiet panic=-1"]);
    command.args(["--kv", "hostname=web1", "--kv", "guestinfo.a.b=below", "--fw-cfg", "name=opt/org.example/config,string=one,,two"]);
    command.arg("--kernel").arg(common::guest("vmlinuz")).arg("--initrd").arg(image);
    let run = common::run(command, PATIENCE);
    run.expect(&["org.pvbus/hostname: web1", "org.pvbus/a/b: below", "org.example/config: one,two"]);
}

/// A module of Debian's kernel.
fn module(name: &str) -> PathBuf {
    let versions = std::fs::read_dir(common::guest("lib/modules")).unwrap();
    let version = versions.flatten().next().expect("a kernel's modules").path();
    version.join("kernel").join(name)
}
