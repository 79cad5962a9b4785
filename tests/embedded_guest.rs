//! The embedded guest: on our own machine, where a person types at its prompt, and on QEMU, which knows nothing of us.

// Tests fail by panicking; the lint knows only functions marked as tests.
#![allow(clippy::unwrap_used)]

#[path = "common/mod.rs"]
mod common;
mod guests;
#[path = "common/tap.rs"]
mod tap;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant, SystemTime};

use guests::processor_time;
use guests::session::Session;
use tap::Tap;
use tempfile::TempDir;

const PROMPT: &str = "pvbus# ";
/// Seconds of a day.
const DAY: f64 = 86_400.0;

/// The guest as a file.
fn kernel(directory: &Path) -> PathBuf {
    guests::write(directory, "guest", embedded::GUEST)
}

/// `vmctl run` on the software CPU with the guest at its prompt, and `more` options.
fn vmctl(directory: &Path, more: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmctl"));
    command.args(["run", "--backend", "soft", "--cmdline", "prompt", "--kernel"]).arg(kernel(directory)).args(more);
    command
}

/// Types a command and returns what it prints.
#[track_caller]
fn answer(session: &mut Session, command: &str) -> String {
    session.type_in(&format!("{command}\r"));
    session.wait_for("\r\n");
    session.wait_for(PROMPT)
}

/// Waits for the prompt and for what another thread makes the guest say before it or behind it; returns what the guest said up to the prompt.
#[track_caller]
fn prompt_and(session: &mut Session, said: &str) -> String {
    let boot = session.wait_for(PROMPT);
    if !boot.contains(said) {
        session.wait_for(said);
    }
    boot
}

#[test]
fn prompt_runs_commands_and_powers_off() {
    let directory = TempDir::new().unwrap();
    let mut guest = Session::start(vmctl(directory.path(), &[]));
    let boot = guest.wait_for(PROMPT);
    for line in ["pvbus guest ", "cpu0 at mainbus0: pvbus software x86-64 processor", "pvbus0 at mainbus0: KVM\r\n"] {
        assert!(boot.contains(line), "no «{line}» in:\n{boot}");
    }
    assert!(answer(&mut guest, "dmesg").contains("pvbus0 at mainbus0: KVM\r\n"));
    assert!(answer(&mut guest, "pvbus").contains("mainbus0\r\n  pvbus0\r\n    pvclock0\r\n/dev/pvbus0: KVM, leaves 0x40000000 to"));
    assert!(answer(&mut guest, "mem").starts_with("523903 KiB of RAM, "));
    assert!(answer(&mut guest, "pci").contains("0:0:0 8086:1237 class 060000\r\n"));
    assert_eq!(answer(&mut guest, "hostctl -t"), "/dev/pvbus0: KVM\r\n");
    assert_eq!(answer(&mut guest, "hostctl -f /dev/pvbus7 key"), "hostctl: /dev/pvbus7: there is no such device\r\n");
    assert_eq!(answer(&mut guest, "hostctl key"), "hostctl: KVM has no information store\r\n");
    assert_eq!(answer(&mut guest, "hostctl"), "usage: hostctl [-qt] [-f device] key [value]\r\n");
    assert_eq!(answer(&mut guest, "mem 1"), "usage: mem \r\n");
    assert_eq!(answer(&mut guest, "nonsense"), "nonsense: no such command; type help for a list\r\n");
    let help = answer(&mut guest, "help");
    let commands = "clock disk dmesg help hostctl http interrupts mem net pci ping poweroff pvbus reboot traffic";
    assert!(commands.split(' ').all(|name| help.contains(name)), "{help}");
    guest.type_in("poweroff\r");
    assert_eq!(guest.status(), Some(0));
}

#[test]
fn lines_can_be_edited() {
    let directory = TempDir::new().unwrap();
    let mut guest = Session::start(vmctl(directory.path(), &[]));
    guest.wait_for(PROMPT);
    assert!(answer(&mut guest, "memx\x7f").contains(" KiB of RAM"), "backspace");
    assert!(answer(&mut guest, "nonsense\x15mem").contains(" KiB of RAM"), "Ctrl-U");
    assert!(answer(&mut guest, "\x1b[A").contains(" KiB of RAM"), "arrow up");
    guest.type_in("poweroff\x03");
    guest.wait_for(PROMPT);
    assert!(answer(&mut guest, "mem").contains(" KiB of RAM"), "Ctrl-C");
}

#[test]
fn idle_prompt_leaves_the_host_alone() {
    let directory = TempDir::new().unwrap();
    let mut guest = Session::start(vmctl(directory.path(), &["--dialect", "all"]));
    guest.wait_for(PROMPT);
    let before = processor_time(guest.id());
    std::thread::sleep(Duration::from_secs(2));
    let used = processor_time(guest.id()) - before;
    assert!(used < 0.2, "it used {used} seconds of processor time in two seconds");
}

#[test]
fn clocks_agree_with_the_hosts() {
    let directory = TempDir::new().unwrap();
    let mut guest = Session::start(vmctl(directory.path(), &["--dialect", "openbsd,kvm"]));
    guest.wait_for(PROMPT);
    let clocks = answer(&mut guest, "clock");
    let uptime = |name| {
        let line: &str = clocks.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_else(|| panic!("no {name} in:\n{clocks}"));
        line.split_whitespace().next().unwrap().parse::<f64>().unwrap()
    };
    let ahead = uptime("pvclock0") - uptime("uptime");
    assert!((0.0..5.0).contains(&ahead), "pvclock counts from power-on, we from our first instruction: {clocks}");
    let host = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs_f64() % DAY;
    for name in ["KVM", "OpenBSD", "pvclock0", "rtc"] {
        let line = clocks.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("no {name} in:\n{clocks}"));
        let time = line.split(' ').find(|word| word.matches(':').count() == 2).unwrap_or_else(|| panic!("no time of day: {line}"));
        let time = time.split(':').map(|part| part.parse::<f64>().unwrap()).fold(0.0, |sum, part| sum * 60.0 + part);
        let behind = (host - time).rem_euclid(DAY);
        assert!(!(5.0..DAY - 5.0).contains(&behind), "{name} is {behind} s behind the host:\n{clocks}");
    }
}

#[test]
fn reboot_starts_the_machine_again() {
    let directory = TempDir::new().unwrap();
    let mut guest = Session::start(vmctl(directory.path(), &[]));
    for _ in 0..3 {
        guest.wait_for("pvbus guest ");
        guest.wait_for(PROMPT);
        guest.type_in("reboot\r");
    }
    drop(guest);
    let mut guest = Session::start(vmctl(directory.path(), &["--no-reboot"]));
    guest.wait_for(PROMPT);
    guest.type_in("reboot\r");
    assert_eq!(guest.status(), Some(0));
}

#[test]
fn host_asks_and_the_guest_goes_down() {
    for (way, dialect, said) in [
        ("acpi", "none", "because the power button was pressed"),
        ("openbsd", "openbsd", "in response to request from OpenBSD host"),
        ("xen", "xen", "in response to request from Xen host"),
        ("hyperv", "hyperv", "in response to request from Hyper-V host"),
    ] {
        let directory = TempDir::new().unwrap();
        let socket = directory.path().join("control");
        let mut guest = Session::start(vmctl(directory.path(), &["--dialect", dialect, "--control", socket.to_str().unwrap()]));
        guest.wait_for(PROMPT);
        // Some drivers agree with the host on a version only after the prompt is there.
        let mut stop = Command::new(env!("CARGO_BIN_EXE_vmctl"));
        let stopped = stop.args(["stop", "--via", way, "--wait", "60", "--control"]).arg(&socket).status().unwrap();
        assert!(stopped.success(), "{way}");
        guest.wait_for(&format!("Shutting down {said}\r\n"));
        assert_eq!(guest.status(), Some(0), "{way}");
    }
}

#[test]
fn guest_that_is_still_booting_is_asked_until_it_listens() {
    let directory = TempDir::new().unwrap();
    let socket = directory.path().join("control");
    let mut guest = Session::start(vmctl(directory.path(), &["--dialect", "hyperv", "--control", socket.to_str().unwrap()]));
    guest.wait_for("pvbus0 at mainbus0");
    let mut stop = Command::new(env!("CARGO_BIN_EXE_vmctl"));
    let stopped = stop.args(["stop", "--via", "hyperv", "--wait", "60", "--control"]).arg(&socket).status().unwrap();
    assert!(stopped.success());
    guest.wait_for("Shutting down in response to request from Hyper-V host\r\n");
    assert_eq!(guest.status(), Some(0));
}

#[test]
fn xen_domain_reads_and_writes_keys_and_its_disk() {
    let directory = TempDir::new().unwrap();
    let disk = directory.path().join("disk.raw");
    let mut bytes = vec![0; 1 << 20];
    bytes[7 * 512..][..16].copy_from_slice(b"sector number 7.");
    std::fs::write(&disk, bytes).unwrap();
    let disk = format!("{},bus=xen", disk.display());
    let mut guest = Session::start(vmctl(directory.path(), &["--dialect", "xen", "--disk", &disk]));
    let boot = prompt_and(&mut guest, "xbf0 at xen0: disk, 1MB, 512 bytes/sector, 2048 sectors\r\n");
    assert!(boot.contains("xen0 at pvbus0: features 0x30c, 64 grant table frames, event channel 1\r\n"), "{boot}");
    assert_eq!(answer(&mut guest, "hostctl -f /dev/pvbus0 name"), "machine\r\n");
    assert_eq!(answer(&mut guest, "hostctl data/said \"by the guest\""), "");
    assert_eq!(answer(&mut guest, "hostctl /local/domain/1/data/said"), "by the guest\r\n");
    assert_eq!(answer(&mut guest, "hostctl device/vbd"), "51712\r\n", "a directory is listed by reading it");
    assert_eq!(answer(&mut guest, "hostctl name x"), "hostctl: the host does not allow it\r\n");
    assert_eq!(answer(&mut guest, "disk"), "xbf0: 2048 sectors of 512 bytes, read and write\r\n");
    assert!(answer(&mut guest, "disk xbf0 7").contains("|sector.number.7.|\r\n"));
    assert_eq!(answer(&mut guest, "disk xbf0 2048"), "disk: not inside of the disk, or not in whole sectors\r\n");
    assert!(answer(&mut guest, "traffic sequential xbf0 read 3").starts_with("xbf0: 1048576 bytes in "));
    assert!(answer(&mut guest, "traffic random xbf0 write 999").starts_with("xbf0: 4096 bytes in "));
    assert!(answer(&mut guest, "disk xbf0 7").contains("00 00 00 00"), "999 of 256 places are all");
    assert_eq!(answer(&mut guest, "traffic random xbf1 read 1"), "traffic: xbf1: there is no such device\r\n");
    assert_eq!(answer(&mut guest, "traffic"), "usage: traffic random|sequential disk read|write count\r\n");
    guest.type_in("poweroff\r");
    assert_eq!(guest.status(), Some(0));
}

#[test]
fn xen_domain_fetches_pages_over_its_network() {
    let directory = TempDir::new().unwrap();
    let small = common::serve(b"a page of the host\x1b[2J".to_vec());
    let large = common::serve((0..4_000_000_u32).map(|at| at as u8).collect());
    let mut guest = Session::start(vmctl(directory.path(), &["--dialect", "xen", "--nic", "user,bus=xen,mac=52:54:00:aa:bb:cc"]));
    prompt_and(&mut guest, "xnf0 at xen0: address 52:54:00:aa:bb:cc\r\n");
    let page = answer(&mut guest, &format!("http http://gateway:{small}/index.html"));
    assert!(page.contains("a page of the host\\u{1b}[2J\r\n200 OK, 22 bytes in "), "{page}");
    let page = answer(&mut guest, &format!("http -q gateway:{large}"));
    assert!(page.starts_with("200 OK, 4000000 bytes in "), "{page}");
    let net = answer(&mut guest, "net");
    assert!(net.starts_with("xnf0: 52:54:00:aa:bb:cc, MTU 1500\r\n    ") && net.contains(", gateway "), "{net}");
    assert!(answer(&mut guest, "dmesg").contains(" by DHCP\r\n"));
    assert_eq!(answer(&mut guest, "http nowhere"), "usage: http [-q] [http://]host[:port][/path]\r\n");
    guest.type_in("poweroff\r");
    assert_eq!(guest.status(), Some(0));
}

/// Types a command until its answer is as expected, twice: what the guest says by itself meanwhile may seem to be a part of one.
#[track_caller]
fn until(session: &mut Session, command: &str, is_expected: impl Fn(&str) -> bool) -> String {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let mut text = answer(session, command);
        if is_expected(&text) {
            text = answer(session, command);
            if is_expected(&text) {
                return text;
            }
        }
        assert!(Instant::now() < deadline, "{command} still says:\n{text}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// A disk of a MiB whose sector 7 says so.
fn disk_file(directory: &Path, name: &str) -> PathBuf {
    let mut bytes = vec![0; 1 << 20];
    bytes[7 * 512..][..16].copy_from_slice(b"sector number 7.");
    guests::write(directory, name, &bytes)
}

#[test]
fn hyperv_guest_uses_keys_disk_and_network() {
    let directory = TempDir::new().unwrap();
    let page = common::serve(b"a page of the host".to_vec());
    let disk = format!("{},bus=hyperv", disk_file(directory.path(), "disk.raw").display());
    let options =
        ["--dialect", "hyperv", "--kv", "vm-data/greeting=hello", "--disk", &disk, "--nic", "user,bus=hyperv,mac=52:54:00:aa:bb:cc"];
    let mut guest = Session::start(vmctl(directory.path(), &options));
    let boot = guest.wait_for(PROMPT);
    assert!(boot.contains("pvbus0 at mainbus0: Hyper-V 10.0\r\nhyperv0 at pvbus0: protocol 5.3, features 0x"), "{boot}");
    assert!(boot.contains("hyperv0: heartbeat, kvp, shutdown, timesync, vss\r\n"), "{boot}");
    let dmesg = until(&mut guest, "dmesg", |text| text.contains(" by DHCP\r\n") && text.contains("\r\nsd0: "));
    for line in [
        "hvs0 at hyperv0 channel ",
        ": scsi, protocol 6.2\r\n",
        "sd0 at hvs0 targ 0 lun 0: <Msft, Virtual Disk, 1.0>\r\nsd0: 1MB, 512 bytes/sector, 2048 sectors, thin\r\n",
        ": NVS 6.1 NDIS 6.30, address 52:54:00:aa:bb:cc\r\n",
    ] {
        assert!(dmesg.contains(line), "no «{line}» in:\n{dmesg}");
    }
    assert_eq!(answer(&mut guest, "disk"), "sd0: 2048 sectors of 512 bytes, read and write\r\n");
    assert!(answer(&mut guest, "disk sd0 7").contains("|sector.number.7.|\r\n"));
    let fetched = answer(&mut guest, &format!("http http://gateway:{page}/"));
    assert!(fetched.contains("a page of the host\r\n200 OK, 18 bytes in "), "{fetched}");
    until(&mut guest, "hostctl External/greeting", |text| text == "hello\r\n");
    assert_eq!(answer(&mut guest, "hostctl Guest/Parameters/VirtualMachineName"), "machine\r\n");
    // The same as Linux' daemon and OpenBSD tell.
    let auto = "FullyQualifiedDomainName IntegrationServicesVersion NetworkAddressIPv4 NetworkAddressIPv6 OSBuildNumber OSName OSMajorVersion \
        OSMinorVersion OSVersion ProcessorArchitecture";
    assert_eq!(answer(&mut guest, "hostctl Auto/").split_ascii_whitespace().collect::<Vec<_>>().join(" "), auto);
    assert_eq!(answer(&mut guest, "hostctl External/greeting x"), "hostctl: the host does not allow it\r\n");
    let clocks = until(&mut guest, "clock", |text| text.contains("Hyper-V   2"));
    assert!(clocks.contains(" s by the reference counter, ") && clocks.contains(" s by the TSC page\r\n"), "{clocks}");
    assert!(answer(&mut guest, "interrupts").lines().any(|line| line.starts_with("upcall ")), "the host interrupts by its controller");
    guest.type_in("poweroff\r");
    assert_eq!(guest.status(), Some(0));
}

#[test]
fn guest_that_waits_for_its_disk_lets_the_host_work() {
    for (dialect, disk) in [("xen", "xbf0"), ("hyperv", "sd0")] {
        let directory = TempDir::new().unwrap();
        let messages = directory.path().join("messages");
        let option = format!("{},bus={dialect}", disk_file(directory.path(), "disk.raw").display());
        let mut command = vmctl(directory.path(), &["--dialect", dialect, "--disk", &option, "--stats"]);
        command.stderr(File::create(&messages).unwrap());
        let mut guest = Session::start(command);
        guest.wait_for(PROMPT);
        until(&mut guest, "disk", |text| text.starts_with(disk));
        assert!(answer(&mut guest, &format!("traffic random {disk} read 1000")).starts_with(disk));
        guest.type_in("poweroff\r");
        assert_eq!(guest.status(), Some(0));
        let stats = std::fs::read_to_string(&messages).unwrap();
        let instructions = stats.lines().find_map(|line| line.strip_prefix("instructions")).unwrap_or_else(|| panic!("{stats}"));
        // 4 million with those of the start. A loop that asks until the answer is there has that many for each 300 requests.
        assert!(instructions.trim().parse::<u64>().unwrap() < 8_000_000, "{dialect}:\n{stats}");
    }
}

#[test]
fn hyperv_disks_and_cards_come_and_go_while_the_guest_runs() {
    let directory = TempDir::new().unwrap();
    let socket = directory.path().join("control");
    let disk = disk_file(directory.path(), "disk.raw");
    let mut guest = Session::start(vmctl(directory.path(), &["--dialect", "hyperv", "--control", socket.to_str().unwrap()]));
    guest.wait_for(PROMPT);
    let host = |arguments: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_vmctl")).args(arguments).arg("--control").arg(&socket).output().unwrap();
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    };
    let device = host(&["disk", "add", &format!("{},bus=hyperv", disk.display())]);
    guest.wait_for("sd0: 1MB, 512 bytes/sector, 2048 sectors, thin\r\n");
    assert!(answer(&mut guest, "disk sd0 7").contains("|sector.number.7.|\r\n"));
    host(&["disk", "rm", &device]);
    guest.wait_for("sd0 detached\r\n");
    let card = host(&["nic", "add", "user,bus=hyperv"]);
    guest.wait_for(" by DHCP\r\n");
    host(&["nic", "rm", &card]);
    guest.wait_for("hvn0 detached\r\n");
    assert_eq!(answer(&mut guest, "disk"), "");
}

/// Every interface and every device of pvbus(4), each of which works.
#[test]
fn all_dialects_are_one_tree() {
    let directory = TempDir::new().unwrap();
    let [xen, hyperv] = ["xen", "hyperv"].map(|bus| format!("{},bus={bus}", disk_file(directory.path(), bus).display()));
    let socket = directory.path().join("control");
    let mut options = vec!["--dialect", "all", "--kv", "greeting=hello", "--control", socket.to_str().unwrap()];
    options.extend(["--disk", &xen, "--disk", &hyperv, "--nic", "user,bus=xen", "--nic", "user,bus=hyperv"]);
    let mut guest = Session::start(vmctl(directory.path(), &options));
    let boot = guest.wait_for(PROMPT);
    assert!(boot.contains("pvbus0 at mainbus0: KVM, Hyper-V 10.0, VMware, Xen 4.17, OpenBSD\r\n"), "{boot}");
    let tree = answer(&mut guest, "pvbus");
    for device in ["vmt0", "pvclock0", "xen0", "hyperv0", "vmmci0"] {
        assert!(tree.contains(&format!("  {device}\r\n")), "no {device} in:\n{tree}");
    }
    assert_eq!(tree.matches(", has a store\r\n").count(), 3, "{tree}");
    until(&mut guest, "dmesg", |text| text.matches(" by DHCP\r\n").count() == 2 && text.contains("\r\nsd0: ") && text.contains("xbf0 at "));
    until(&mut guest, "net", |text| text.matches(", gateway ").count() == 2);
    for disk in ["xbf0", "sd0"] {
        assert!(answer(&mut guest, &format!("disk {disk} 7")).contains("|sector.number.7.|\r\n"), "{disk}");
    }
    let minor = |kind: &str| {
        let line = tree.lines().find(|line| line.contains(&format!(": {kind}, leaves"))).unwrap();
        line.split(':').next().unwrap().to_owned()
    };
    // One store: the host's key by every interface, and the guest's keys for the host.
    for (kind, greeting, key, path) in [
        ("VMware", "guestinfo.greeting", "guestinfo.said", "vm-data/said"),
        ("Xen", "vm-data/greeting", "data/said", "data/said"),
        ("Hyper-V", "External/greeting", "Guest/said", "data/hyperv/Guest/said"),
    ] {
        let device = minor(kind);
        until(&mut guest, &format!("hostctl -f {device} {greeting}"), |text| text == "hello\r\n");
        assert_eq!(answer(&mut guest, &format!("hostctl -f {device} {key} by-{kind}")), "", "{kind}");
        assert_eq!(answer(&mut guest, &format!("hostctl -f {device} {key}")), format!("by-{kind}\r\n"));
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let mut get = Command::new(env!("CARGO_BIN_EXE_vmctl"));
            let got = get.args(["kv", "get", path, "--control"]).arg(&socket).output().unwrap();
            if got.stdout.trim_ascii() == format!("by-{kind}").as_bytes() {
                break;
            }
            assert!(Instant::now() < deadline, "{kind}: {got:?}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }
    guest.type_in("poweroff\r");
    assert_eq!(guest.status(), Some(0));
}

#[test]
fn xen_domain_answers_pings_and_hears_refusals() {
    let Some(tap) = Tap::new(&format!("pvbus{}", std::process::id()), "198.51.100.1/24") else {
        eprintln!("SKIPPED: a network between host and guest takes root, and /dev/net/tun");
        return;
    };
    let directory = TempDir::new().unwrap();
    let mut guest =
        Session::start(vmctl(directory.path(), &["--dialect", "xen", "--nic", &format!("tap:{},bus=xen,mac=52:54:00:aa:bb:cc", tap.0)]));
    prompt_and(&mut guest, "xnf0 at xen0: address 52:54:00:aa:bb:cc\r\n");
    assert_eq!(answer(&mut guest, "net 198.51.100.2/24 198.51.100.1"), "xnf0: 198.51.100.2/24, gateway 198.51.100.1\r\n");
    let pings = answer(&mut guest, "ping gateway 3");
    assert_eq!(pings.matches("64 bytes from 198.51.100.1: seq ").count(), 3, "{pings}");
    // While its prompt waits.
    let host = Command::new("busybox").args(["ping", "-c", "3", "-s", "1400", "198.51.100.2"]).output().unwrap();
    assert!(host.status.success(), "{}", String::from_utf8_lossy(&host.stdout));
    assert_eq!(answer(&mut guest, "http 198.51.100.1:9/"), "http: the connection was refused or broke off\r\n");
    assert_eq!(answer(&mut guest, "ping 198.51.100.99"), "ping: there is no answer\r\n");
    guest.type_in("poweroff\r");
    assert_eq!(guest.status(), Some(0));
}

#[test]
fn xen_domain_takes_and_gives_back_devices_while_it_runs() {
    let directory = TempDir::new().unwrap();
    let (disk, socket) = (directory.path().join("disk.raw"), directory.path().join("control"));
    std::fs::write(&disk, vec![b'x'; 1 << 20]).unwrap();
    let mut guest = Session::start(vmctl(directory.path(), &["--dialect", "xen", "--control", socket.to_str().unwrap()]));
    guest.wait_for(PROMPT);
    let device = |arguments: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_vmctl")).args(arguments).arg("--control").arg(&socket).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    };
    for round in 0..2 {
        let name = device(&["disk", "add", &format!("{},bus=xen", disk.display())]);
        guest.wait_for(&format!("xbf{round} at xen0: disk, 1MB, 512 bytes/sector, 2048 sectors\r\n"));
        assert!(answer(&mut guest, &format!("disk xbf{round} 2047")).contains("|xxxxxxxxxxxxxxxx|"));
        device(&["disk", "rm", &name]);
        guest.wait_for(&format!("xbf{round} detached\r\n"));
        assert_eq!(answer(&mut guest, "disk"), "");
        let name = device(&["nic", "add", "user,bus=xen"]);
        guest.wait_for(&format!("xnf{round} at xen0: address "));
        guest.wait_for(" by DHCP\r\n");
        device(&["nic", "rm", &name]);
        guest.wait_for(&format!("xnf{round} detached\r\n"));
        assert_eq!(answer(&mut guest, "net"), "");
    }
    guest.type_in("poweroff\r");
    assert_eq!(guest.status(), Some(0));
}

#[test]
fn memory_above_4_gib_is_used() {
    let directory = TempDir::new().unwrap();
    let mut guest = Session::start(vmctl(directory.path(), &["--memory", "5G"]));
    guest.wait_for(PROMPT);
    let memory = answer(&mut guest, "mem");
    let free: u64 = memory.split(", ").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap();
    assert!(free > 5 * 1020 * 1024, "{memory}");
}

#[test]
fn demonstration_ends_by_itself() {
    let run = guests::vmctl(&["run", "--backend", "soft"]);
    run.expect(0, &["pvbus0 at mainbus0: KVM", "pvbus# pvbus\r\nmainbus0\r\n  pvbus0\r\n"]);
}

/// QEMU's PC, with its own firmware, memory map, ACPI tables and interrupt controllers.
#[test]
fn qemu_starts_the_same_file() {
    let directory = TempDir::new().unwrap();
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args(["-M", "pc", "-accel", "tcg", "-cpu", "max", "-nographic", "-no-reboot", "-append", "prompt", "-kernel"]);
    let mut guest = Session::start({
        qemu.arg(kernel(directory.path()));
        qemu
    });
    let boot = guest.wait_for(PROMPT);
    assert!(boot.contains("pvbus0 at mainbus0: QEMU TCG\r\n"), "{boot}");
    assert!(answer(&mut guest, "pci").contains("0:1:1 8086:7010 class 010180"), "the PIIX3's IDE function");
    assert!(answer(&mut guest, "clock").contains("rtc       20"));
    guest.type_in("poweroff\r");
    assert_eq!(guest.status(), Some(0));
}
