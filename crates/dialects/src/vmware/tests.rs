//! The dialect as its clients use it: open-vm-tools, the Rust client of Afterburn, OpenBSD's driver, and clients that mean harm.

use std::time::Duration;

use abi::vmware::message::{self as steps, status};
use proptest::prelude::*;
use vmm::registers::{RAX, RBX, RCX, RDI, RDX, RSI};
use vmm::time::StepClock;

use super::*;
use crate::store::Client as StoreClient;
use crate::store::testing::{GUEST_KEYS, MapStore};
use backdoor::{high, with_high};

struct Host {
    vmware: Vmware,
    store: Arc<MapStore>,
    clock: Arc<StepClock>,
}

fn host() -> Host {
    let store = Arc::new(MapStore::default());
    let clock = Arc::new(StepClock::new(Duration::from_secs(1_700_000_000)));
    let platform = Platform { tsc_hz: 1_000_000_000, bus_hz: 1_000_000_000, memory: 1 << 30, uuid: [7; 16] };
    let mut seed = 0x1234_5678_9abc_def0_u64;
    let random = Box::new(move || {
        seed = seed.rotate_left(7).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        seed
    });
    Host { vmware: Vmware::new(platform, clock.clone(), store.clone(), random), store, clock }
}

impl Host {
    fn put(&self, path: &str, value: &[u8]) {
        self.store.write(StoreClient::Host, path, value).unwrap();
    }

    fn value(&self, path: &str) -> String {
        String::from_utf8(self.store.read(StoreClient::Host, path).unwrap()).unwrap()
    }
}

/// How a client makes its calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Style {
    /// IN, and strings when the host offers them: open-vm-tools, vmw-guestinfo (Ignition).
    OpenVmTools,
    /// IN only: a client that ignores the offer.
    LowBandwidth,
    /// VMCALL or VMMCALL only.
    Hypercall,
    /// OUT, and strings always: vmw_backdoor-rs (Afterburn).
    Rust,
    /// IN, and strings always, whose status must be exactly 0x00010000: OpenBSD.
    OpenBsd,
}

const STYLES: [Style; 5] = [Style::OpenVmTools, Style::LowBandwidth, Style::Hypercall, Style::Rust, Style::OpenBsd];

fn gpr(frame: &Frame) -> [u64; 16] {
    let mut gpr = [0xffff_ffff_0000_0000; 16];
    let zero =
        Frame { eax: !frame.eax, ebx: !frame.ebx, ecx: !frame.ecx, edx: !frame.edx, esi: !frame.esi, edi: !frame.edi, ebp: !frame.ebp };
    frame.write_changes(&zero, &mut gpr);
    gpr
}

/// One call of a low-bandwidth kind.
fn low(vmware: &Vmware, style: Style, frame: &Frame) -> Frame {
    let mut gpr = gpr(&Frame { eax: words::MAGIC, edx: with_high(words::PORT.into(), high(frame.edx)), ..*frame });
    if style == Style::Hypercall {
        gpr[RDX] &= 0xffff_0000;
        let mut call = Hypercall { gpr, cpl: 3, long_mode: true, ..Hypercall::default() };
        assert!(vmware.hypercall(0, &mut call));
        return Frame::of(&call.gpr);
    }
    let mut call =
        PortCall { gpr, port: words::PORT, size: 4, write: style == Style::Rust, string: false, data: words::MAGIC, ..PortCall::default() };
    vmware.port_call(0, &mut call);
    Frame::of(&call.gpr)
}

struct Client<'a> {
    vmware: &'a Vmware,
    style: Style,
    id: u16,
    cookie: [u32; 2],
}

impl<'a> Client<'a> {
    fn open(vmware: &'a Vmware, style: Style, protocol: u32) -> Client<'a> {
        let frame = low(vmware, style, &Frame { ebx: protocol | steps::COOKIE, ecx: words::MESSAGE.into(), ..Frame::default() });
        assert_eq!(high(frame.ecx), status::SUCCESS);
        Client { vmware, style, id: high(frame.edx), cookie: [frame.esi, frame.edi] }
    }

    fn step(&self, step: u16, ebx: u32) -> Frame {
        let [esi, edi] = self.cookie;
        let ecx = u32::from(step) << 16 | u32::from(words::MESSAGE);
        low(self.vmware, self.style, &Frame { ebx, ecx, edx: with_high(0, self.id), esi, edi, ..Frame::default() })
    }

    /// A string instruction of `data.len()` bytes; gives EBX afterwards.
    fn string(&self, write: bool, data: &mut [u8]) -> u32 {
        let [cookie_high, cookie_low] = self.cookie;
        let (ebp, esi, edi) = if write { (cookie_high, 0, cookie_low) } else { (cookie_low, cookie_high, 0) };
        let edx = with_high(words::PORT_HB.into(), self.id);
        let mut gpr = gpr(&Frame { eax: words::MAGIC, ebx: 0x0001_0000, ecx: data.len() as u32, edx, esi, edi, ebp });
        let fixed = gpr;
        for byte in data {
            let mut call =
                PortCall { gpr, port: words::PORT_HB, size: 1, write, string: true, data: (*byte).into(), ..PortCall::default() };
            self.vmware.port_call(0, &mut call);
            *byte = call.data as u8;
            gpr = call.gpr;
            for register in [RAX, RCX, RDX, RSI, RDI] {
                assert_eq!(gpr[register], fixed[register], "the instruction's own registers and the cookie stay");
            }
        }
        gpr[RBX] as u32
    }

    fn send(&self, message: &[u8]) {
        let status = high(self.step(steps::SENDSIZE, message.len() as u32).ecx);
        assert_eq!(status, status::SUCCESS | status::HB);
        if self.uses_strings() && !message.is_empty() {
            assert_eq!(self.string(true, &mut message.to_vec()), 0x0001_0000);
            return;
        }
        for piece in message.chunks(4) {
            let mut word = [0; 4];
            word[..piece.len()].copy_from_slice(piece);
            assert_eq!(high(self.step(steps::SENDPAYLOAD, u32::from_le_bytes(word)).ecx), status::SUCCESS);
        }
    }

    fn receive(&self) -> Option<Vec<u8>> {
        let frame = self.step(steps::RECVSIZE, 0);
        assert_ne!(high(frame.ecx) & status::SUCCESS, 0);
        if high(frame.ecx) & status::DORECV == 0 {
            return None;
        }
        assert_eq!(high(frame.edx), steps::TYPE_SENDSIZE);
        let mut message = vec![0; frame.ebx as usize];
        if self.uses_strings() {
            assert_eq!(self.string(false, &mut message), 0x0001_0000);
        } else {
            for piece in message.chunks_mut(4) {
                let frame = self.step(steps::RECVPAYLOAD, status::SUCCESS.into());
                assert_eq!((high(frame.ecx), high(frame.edx)), (status::SUCCESS, steps::TYPE_SENDPAYLOAD));
                piece.copy_from_slice(&frame.ebx.to_le_bytes()[..piece.len()]);
            }
        }
        assert_eq!(high(self.step(steps::RECVSTATUS, status::SUCCESS.into()).ecx), status::SUCCESS);
        Some(message)
    }

    fn uses_strings(&self) -> bool {
        !matches!(self.style, Style::LowBandwidth | Style::Hypercall)
    }

    /// A request and its answer.
    fn rpc(&self, request: &[u8]) -> String {
        self.send(request);
        String::from_utf8(self.receive().unwrap()).unwrap()
    }
}

/// A request over a channel of its own, as vmware-rpctool does it.
fn rpctool(host: &Host, request: &str) -> String {
    let client = Client::open(&host.vmware, Style::OpenVmTools, steps::RPCI);
    let answer = client.rpc(request.as_bytes());
    assert_eq!(high(client.step(steps::CLOSE, 0).ecx), status::SUCCESS);
    answer
}

#[test]
fn leaf_carries_signature_and_frequencies_at_any_base() {
    let mut table = CpuidTable::default();
    host().vmware.add_cpuid(0x4000_0100, &mut table);
    let base = table.get(0x4000_0100, 0).unwrap();
    assert_eq!((base.eax, base.ebx, base.ecx, base.edx), (0x4000_0110, 0x6177_4d56, 0x4d56_6572, 0x6572_6177));
    let frequency = table.get(0x4000_0110, 0).unwrap();
    assert_eq!((frequency.eax, frequency.ebx, frequency.ecx, frequency.edx), (1_000_000, 1_000_000, 0, 0));
}

#[test]
fn commands_work_by_in_out_and_hypercall() {
    let host = host();
    for style in STYLES {
        let frame = low(&host.vmware, style, &Frame { ebx: 5, ecx: 0xffff_000a, ..Frame::default() });
        assert_eq!((frame.eax, frame.ebx, frame.ecx), (6, words::MAGIC, 2), "{style:?}");
    }
}

#[test]
fn without_the_magic_number_there_is_no_port() {
    let vmware = host().vmware;
    let gpr = gpr(&Frame { eax: 0x1234, ecx: words::GETVERSION.into(), ..Frame::default() });
    for port in [words::PORT, words::PORT_HB] {
        let before = PortCall { gpr, port, size: 4, write: false, ..PortCall::default() };
        let mut call = before;
        vmware.port_call(0, &mut call);
        assert_eq!((call.gpr[RAX], call.gpr[RBX]), (u32::MAX.into(), gpr[RBX]));
        let before = PortCall { write: true, ..before };
        call = before;
        vmware.port_call(0, &mut call);
        assert_eq!(call, before);
        call = PortCall { string: true, ..before };
        call.write = false;
        vmware.port_call(0, &mut call);
        assert_eq!((call.data, call.gpr), (u32::MAX, gpr));
    }
    let mut call = Hypercall { gpr, ..Hypercall::default() };
    assert!(!vmware.hypercall(0, &mut call), "somebody else's");
}

#[test]
fn hypercall_of_high_bandwidth_fails_without_harm() {
    let vmware = host().vmware;
    let mut call =
        Hypercall { gpr: gpr(&Frame { eax: words::MAGIC, ebx: 0x0001_0000, edx: 3, ..Frame::default() }), ..Hypercall::default() };
    assert!(vmware.hypercall(0, &mut call));
    assert_eq!(call.gpr[RBX] as u32 >> 16 & 1, 0);
}

#[test]
fn every_kind_of_client_reads_and_writes_keys() {
    for style in STYLES {
        let host = host();
        host.put("vm-data/metadata", b"instance-id: a b c\n");
        let client = Client::open(&host.vmware, style, steps::RPCI);
        assert_eq!(client.rpc(b"info-get guestinfo.metadata"), "1 instance-id: a b c\n", "{style:?}");
        assert_eq!(client.rpc(b"info-get guestinfo.userdata"), "0 No value found");
        assert_eq!(client.rpc(b"info-set guestinfo.a.b value with  spaces "), "1 ");
        assert_eq!(host.value("vm-data/a/b"), "value with  spaces ");
        assert_eq!(client.rpc(b"info-get guestinfo.a.b"), "1 value with  spaces ");
    }
}

#[test]
fn messages_of_every_length_survive() {
    let host = host();
    for style in STYLES {
        let client = Client::open(&host.vmware, style, steps::RPCI);
        for length in (1..40).chain([1021, 4095, 4096, 60_001]) {
            let value: Vec<u8> = (0..length).map(|n| b'!' + (n % 90) as u8).collect();
            assert_eq!(client.rpc(&[b"info-set guestinfo.k ", &value[..]].concat()), "1 ");
            assert_eq!(host.store.read(StoreClient::Host, "vm-data/k").unwrap(), value, "{style:?} {length}");
            assert_eq!(client.rpc(b"info-get guestinfo.k").as_bytes(), [b"1 ", &value[..]].concat());
        }
    }
}

#[test]
fn large_value_of_the_host_reaches_the_guest_whole() {
    let host = host();
    let value = vec![0xfe; crate::store::MAX_VALUE];
    host.put("vm-data/big", &value);
    let client = Client::open(&host.vmware, Style::OpenVmTools, steps::RPCI);
    client.send(b"info-get guestinfo.big");
    assert_eq!(client.receive().unwrap(), [b"1 ", &value[..]].concat());
}

#[test]
fn requests_may_end_in_nuls() {
    let host = host();
    let client = Client::open(&host.vmware, Style::OpenBsd, steps::RPCI);
    let mut buffer = b"info-set guestinfo.k v".to_vec();
    buffer.resize(4096, 0);
    assert_eq!(client.rpc(&buffer), "1 ");
    assert_eq!(host.value("vm-data/k"), "v");
    assert_eq!(client.rpc(b"info-get guestinfo.k\0"), "1 v");
}

#[test]
fn binary_values_survive() {
    let host = host();
    let client = Client::open(&host.vmware, Style::OpenVmTools, steps::RPCI);
    assert_eq!(client.rpc(b"info-set guestinfo.k a\0\xff\x80b"), "1 ");
    assert_eq!(host.store.read(StoreClient::Host, "vm-data/k").unwrap(), b"a\0\xff\x80b");
}

#[test]
fn message_may_be_sent_partly_by_each_way() {
    let host = host();
    let request = b"info-set guestinfo.k mixed";
    for cut in (0..request.len()).step_by(4) {
        let client = Client::open(&host.vmware, Style::LowBandwidth, steps::RPCI);
        client.step(steps::SENDSIZE, request.len() as u32);
        for piece in request[..cut].chunks(4) {
            client.step(steps::SENDPAYLOAD, u32::from_le_bytes(piece.try_into().unwrap()));
        }
        for byte in &request[cut..] {
            assert_eq!(client.string(true, &mut [*byte]), 0x0001_0000);
        }
        assert_eq!(client.receive().unwrap(), b"1 ");
        client.step(steps::CLOSE, 0);
    }
}

#[test]
fn keys_of_all_known_clients_are_found() {
    let host = host();
    let keys = [
        // cloud-init: DataSourceVMware and DataSourceOVF, which ask by vmware-rpctool or vmtoolsd --cmd.
        ("guestinfo.metadata", "vm-data/metadata"),
        ("guestinfo.userdata.encoding", "vm-data/userdata/encoding"),
        ("guestinfo.vendordata", "vm-data/vendordata"),
        ("guestinfo.ovfEnv", "vm-data/ovfEnv"),
        // Ignition.
        ("guestinfo.ignition.config.data", "vm-data/ignition/config/data"),
        ("guestinfo.ovfenv", "vm-data/ovfEnv"),
        // Afterburn.
        ("guestinfo.afterburn.initrd.network-kargs", "vm-data/afterburn/initrd/network-kargs"),
        ("guestinfo.talos.config", "vm-data/talos/config"),
    ];
    for (key, path) in keys {
        host.put(path, key.as_bytes());
        assert_eq!(rpctool(&host, &format!("info-get {key}")), format!("1 {key}"));
    }
    // cloud-init redacts so, Ignition so.
    assert_eq!(rpctool(&host, "info-set guestinfo.userdata ---"), "1 ");
    assert_eq!(rpctool(&host, "info-set guestinfo.vendordata  "), "1 ");
    assert_eq!(host.value("vm-data/vendordata"), " ");
    assert_eq!(rpctool(&host, "info-set guestinfo.ignition.config.data e30K"), "1 ");
    assert_eq!(rpctool(&host, "info-set guestinfo.cloudinit.updates.supported network"), "1 ");
    assert_eq!(host.value("vm-data/cloudinit/updates/supported"), "network");
}

#[test]
fn bad_requests_are_refused_in_words() {
    let host = host();
    for (request, answer) in [
        ("", "0 Unknown command"),
        ("\0\0", "0 Unknown command"),
        ("unknown thing", "0 Unknown command"),
        ("INFO-GET guestinfo.a", "0 Unknown command"),
        ("info-get", "0 No value found"),
        ("info-get ", "0 No value found"),
        ("info-get machine.id", "0 No value found"),
        ("info-get guestinfo.", "0 No value found"),
        ("machine.id.get", "0 No machine id"),
        ("SetGuestInfo  99 x", "0 Unknown guest info"),
        ("SetGuestInfo", "0 Unknown guest info"),
        ("vmx.capability.dnd_version", "0 Unknown command"),
    ] {
        assert_eq!(rpctool(&host, request), answer, "{request:?}");
    }
    for request in ["info-set", "info-set machine.id 5", "info-set guestinf.a b"] {
        assert!(rpctool(&host, request).starts_with("0 "), "{request}");
    }
}

#[test]
fn guests_share_of_the_store_is_bounded() {
    let host = host();
    let refused = (0..).find(|n| rpctool(&host, &format!("info-set guestinfo.k{n} v")) != "1 ");
    assert_eq!(refused, Some(GUEST_KEYS));
    assert_eq!(rpctool(&host, "info-set guestinfo.k0 other"), "1 ");
}

#[test]
fn reports_of_the_tools_reach_the_store() {
    let host = host();
    let client = Client::open(&host.vmware, Style::OpenVmTools, steps::RPCI);
    for (request, name, value) in [
        (&b"SetGuestInfo  1 host.example"[..], "dns-name", &b"host.example"[..]),
        (b"SetGuestInfo  5 Debian GNU/Linux 12 (bookworm)\0", "os-name-full", b"Debian GNU/Linux 12 (bookworm)"),
        (b"SetGuestInfo  6 debian12-64", "os-name", b"debian12-64"),
        (b"SetGuestInfo  7 12345", "uptime", b"12345"),
        (b"SetGuestInfo  10 \0\0\0\x03\0\0\0\0", "nics-v3", b"\0\0\0\x03\0\0\0\0"),
        (b"SetGuestDiskInfo {\"version\":\"1\"}", "disk-details", b"{\"version\":\"1\"}"),
        (b"tools.set.version 2147483647", "tools-version", b"2147483647"),
        (b"tools.set.versiontype 12352 4", "tools-version", b"12352"),
    ] {
        assert_eq!(client.rpc(request), "1 ");
        assert_eq!(host.store.read(StoreClient::Host, &format!("{REPORTS}/{name}")).unwrap(), value, "{name}");
    }
}

#[test]
fn what_open_vm_tools_and_openbsd_announce_is_acknowledged() {
    let host = host();
    for request in [
        "log toolbox: Version: 12.2.0",
        "tools.capability.hgfs_server toolbox 1",
        "tools.capability.statechange ",
        "tools.capability.guest_conf_directory /etc/vmware-tools",
        "tools.capability.auto_upgrade 2",
        "vmx.capability.unified_loop toolbox",
        "vmx.set_option synctime 0 1",
        "tools.os.statechange.status 1 3",
        "tools.os.statechange.status",
        "disk.wiper.enable ",
        "deployPkg.update.state 4",
        "guest.upgrader_send_cmd_line_args -p",
    ] {
        assert_eq!(rpctool(&host, request), "1 ", "{request}");
    }
}

/// The tools' daemon: sends its reply to the last request and gives the next.
fn poll(tools: &Client<'_>, reply: &str) -> Option<String> {
    tools.send(reply.as_bytes());
    tools.receive().map(|request| String::from_utf8(request).unwrap())
}

#[test]
fn tools_are_greeted_and_halt_the_guest() {
    let host = host();
    let tools = Client::open(&host.vmware, Style::OpenVmTools, steps::TCLO);
    assert_eq!(host.vmware.request(PowerRequest::Halt), Err(PowerError::NoTools));
    assert_eq!(poll(&tools, "").unwrap(), "reset");
    assert_eq!(poll(&tools, "OK ATR toolbox").unwrap(), "ping");
    assert_eq!(poll(&tools, "OK ").unwrap(), "Capabilities_Register");
    assert_eq!(rpctool(&host, "tools.capability.statechange "), "1 ");
    assert_eq!(poll(&tools, "OK ").unwrap(), "Set_Option broadcastIP 1");
    assert_eq!(rpctool(&host, "info-set guestinfo.ip 10.0.2.15"), "1 ");
    assert_eq!(host.value("vm-data/ip"), "10.0.2.15");
    assert_eq!(poll(&tools, "OK ").unwrap(), "OS_PowerOn");
    assert_eq!(rpctool(&host, "tools.os.statechange.status 1 3"), "1 ");
    host.clock.advance_to(77);
    assert_eq!(poll(&tools, "OK "), None);
    let status = ToolsStatus { are_running: true, take_power_requests: true, last_heard: Some(77), power: None };
    assert_eq!(host.vmware.tools(), status);

    host.vmware.request(PowerRequest::Halt).unwrap();
    assert_eq!(poll(&tools, "").unwrap(), "OS_Halt");
    host.clock.advance_to(88);
    assert_eq!(poll(&tools, "OK "), None);
    let power = |progress, since| Some(PowerStatus { request: PowerRequest::Halt, progress, since });
    assert_eq!(host.vmware.tools().power, power(Progress::Accepted, 88));
    assert_eq!(rpctool(&host, "tools.os.statechange.status 1 1"), "1 ");
    assert_eq!(host.vmware.tools().power, power(Progress::Done, 88));

    host.vmware.reset();
    assert_eq!(host.vmware.tools(), ToolsStatus::default());
    assert_eq!(high(tools.step(steps::SENDSIZE, 0).ecx), status::CLOSED);
}

#[test]
fn request_given_up_half_way_is_sent_again_from_its_beginning() {
    let host = host();
    let tools = Client::open(&host.vmware, Style::LowBandwidth, steps::TCLO);
    tools.send(b"");
    tools.step(steps::RECVSIZE, 0);
    assert_eq!(tools.step(steps::RECVPAYLOAD, 1).ebx.to_le_bytes(), *b"rese");
    assert_eq!(tools.receive().unwrap(), b"reset");
}

#[test]
fn steps_that_do_not_fit_ask_for_a_new_beginning() {
    let host = host();
    let client = Client::open(&host.vmware, Style::LowBandwidth, steps::RPCI);
    for step in [steps::SENDPAYLOAD, steps::RECVPAYLOAD, steps::RECVSTATUS] {
        assert_eq!(high(client.step(step, 1).ecx), status::CHECKPOINT, "{step}");
    }
    for write in [true, false] {
        assert_eq!(high(client.string(write, &mut [0; 3])), status::CHECKPOINT);
    }
    assert_eq!(high(client.step(steps::RECVSIZE, 0).ecx), status::SUCCESS);
    assert_eq!(high(client.step(7, 0).ecx), 0);
    assert_eq!(client.rpc(b"info-get guestinfo.a"), "0 No value found", "the channel still works");
}

#[test]
fn payload_beyond_the_announced_length_is_refused() {
    let host = host();
    let client = Client::open(&host.vmware, Style::LowBandwidth, steps::RPCI);
    client.step(steps::SENDSIZE, 3);
    assert_eq!(high(client.step(steps::SENDPAYLOAD, 0x4141_4141).ecx), status::SUCCESS);
    assert_eq!(high(client.step(steps::SENDPAYLOAD, 0x4141_4141).ecx), status::CHECKPOINT);
    assert_eq!(client.receive().unwrap(), b"0 Unknown command");
    client.send(b"info-get guestinfo.a");
    let length = client.step(steps::RECVSIZE, 0).ebx as usize;
    for _ in 0..length.div_ceil(4) {
        assert_eq!(high(client.step(steps::RECVPAYLOAD, 1).ecx), status::SUCCESS);
    }
    assert_eq!(high(client.step(steps::RECVPAYLOAD, 1).ecx), 0);
}

#[test]
fn message_that_is_too_long_is_refused() {
    let host = host();
    let client = Client::open(&host.vmware, Style::LowBandwidth, steps::RPCI);
    let most = steps::MAX_GUEST_MESSAGE as u32;
    assert_eq!(high(client.step(steps::SENDSIZE, most + 1).ecx), 0);
    assert_eq!(high(client.step(steps::SENDSIZE, u32::MAX).ecx), 0);
    assert_eq!(high(client.step(steps::SENDSIZE, most).ecx), status::SUCCESS | status::HB);
}

#[test]
fn channel_needs_its_cookie() {
    let host = host();
    let mut client = Client::open(&host.vmware, Style::OpenVmTools, steps::RPCI);
    let other = Client::open(&host.vmware, Style::OpenVmTools, steps::RPCI);
    assert_ne!(client.cookie, other.cookie);
    client.id = other.id;
    for step in [steps::SENDSIZE, steps::RECVSIZE, steps::CLOSE] {
        assert_eq!(high(client.step(step, 0).ecx), status::CLOSED);
    }
    for write in [true, false] {
        assert_eq!(high(client.string(write, &mut [0])), status::CLOSED);
    }
    assert_eq!(other.rpc(b"info-get guestinfo.a"), "0 No value found");
}

#[test]
fn channel_opened_without_cookie_needs_none() {
    let host = host();
    let frame = low(&host.vmware, Style::OpenVmTools, &Frame { ebx: steps::RPCI, ecx: words::MESSAGE.into(), ..Frame::default() });
    let client = Client { vmware: &host.vmware, style: Style::OpenVmTools, id: high(frame.edx), cookie: [5, 6] };
    assert_eq!(client.rpc(b"info-get guestinfo.a"), "0 No value found");
}

#[test]
fn message_under_way_goes_on_in_a_restored_machine() {
    let host = host();
    let client = Client::open(&host.vmware, Style::LowBandwidth, steps::RPCI);
    client.step(steps::SENDSIZE, 6);
    client.step(steps::SENDPAYLOAD, u32::from_le_bytes(*b"mach"));
    let saved = host.vmware.state();

    let other = self::host();
    other.vmware.restore(&saved).unwrap();
    assert_eq!(other.vmware.state(), saved);
    let client = Client { vmware: &other.vmware, ..client };
    client.step(steps::SENDPAYLOAD, u32::from_le_bytes(*b"in\0\0"));
    assert_eq!(client.receive().unwrap(), b"0 Unknown command");
}

#[test]
fn state_that_no_guest_could_cause_is_refused() {
    let host = host();
    let client = Client::open(&host.vmware, Style::LowBandwidth, steps::RPCI);
    client.step(steps::SENDSIZE, 6);
    let before = host.vmware.state();
    for (from, to) in [("\"length\":6", "\"length\":65537"), ("\"length\":6", "\"length\":0")] {
        let text = serde_json::to_string(&before).unwrap();
        assert!(text.contains(from));
        let state = serde_json::from_str(&text.replace(from, to)).unwrap();
        assert!(matches!(host.vmware.restore(&state), Err(RestoreError::Impossible { .. })));
    }
    assert_eq!(host.vmware.state(), before);
}

#[test]
fn unknown_protocols_are_not_opened() {
    let host = host();
    for protocol in [0, steps::COOKIE, steps::RPCI + 1] {
        let frame = low(&host.vmware, Style::OpenVmTools, &Frame { ebx: protocol, ecx: words::MESSAGE.into(), ..Frame::default() });
        assert_eq!(high(frame.ecx), 0);
    }
}

#[test]
fn closed_channel_stays_closed() {
    let host = host();
    let client = Client::open(&host.vmware, Style::OpenVmTools, steps::RPCI);
    assert_eq!(high(client.step(steps::CLOSE, 0).ecx), status::SUCCESS);
    assert_eq!(high(client.step(steps::CLOSE, 0).ecx), status::CLOSED);
    assert_eq!(high(client.step(steps::SENDSIZE, 4).ecx), status::CLOSED);
}

/// Registers with what clients have there, or anything.
fn any_gpr() -> impl Strategy<Value = [u64; 16]> {
    let eax = prop_oneof![9 => Just(words::MAGIC), 1 => any::<u32>()];
    let ebx = prop_oneof![Just(steps::RPCI), Just(steps::TCLO), Just(0x0001_0000), 0..8u32, any::<u32>()];
    let ecx = prop_oneof![4 => (0..8u32).prop_map(|step| step << 16 | 30), 1 => any::<u32>()];
    let edx = prop_oneof![9 => (0..4u32).prop_map(|id| id << 16), 1 => any::<u32>()];
    (eax, ebx, ecx, edx).prop_map(|(eax, ebx, ecx, edx)| gpr(&Frame { eax, ebx, ecx, edx, ..Frame::default() }))
}

fn any_call() -> impl Strategy<Value = PortCall> {
    let port = prop_oneof![3 => Just(words::PORT), 1 => Just(words::PORT_HB)];
    let data = prop_oneof![Just(u32::from(b' ')), any::<u32>()];
    (any_gpr(), port, prop::sample::select(vec![1, 2, 4, 4, 4]), any::<bool>(), any::<bool>(), data)
        .prop_map(|(gpr, port, size, write, string, data)| PortCall { gpr, port, size, write, string, data, ..PortCall::default() })
}

proptest! {
    #[test]
    fn nothing_a_guest_calls_does_harm(calls in prop::collection::vec(any_call(), 0..300)) {
        let host = host();
        for call in calls {
            let mut answered = call;
            host.vmware.port_call(0, &mut answered);
            prop_assert_eq!(&answered.gpr[8..], &call.gpr[8..]);
            let mut hypercall = Hypercall { gpr: call.gpr, ..Hypercall::default() };
            host.vmware.hypercall(0, &mut hypercall);
            if call.write {
                prop_assert_eq!(answered.data, call.data);
            }
        }
    }

    #[test]
    fn any_request_has_an_answer(request in prop::collection::vec(any::<u8>(), 0..200), command in 0..4usize) {
        let host = host();
        let command = [&b""[..], b"info-set guestinfo.", b"info-get ", b"SetGuestInfo  "][command];
        let client = Client::open(&host.vmware, Style::OpenVmTools, steps::RPCI);
        client.send(&[command, &request].concat());
        let answer = client.receive().unwrap();
        prop_assert!(answer.starts_with(b"1 ") || answer.starts_with(b"0 "));
    }
}
