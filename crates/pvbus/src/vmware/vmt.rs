//! Device vmt0: VMware's tools in the kernel.
//!
//! It answers the host's requests (power, backup, addresses), tells the host what the guest is, brings the host's time, and opens the
//! information store. Everything that goes to the host waits in one queue and is sent in order.
//!
//! OpenBSD `sys/dev/pv/vmt.c` is the model.

use alloc::boxed::Box;
use alloc::collections::{BTreeMap, VecDeque};
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::net::IpAddr;
use core::task::Poll;

use abi::vmware::rpc::{self as words, guest_info, state_change, vmbackup};

use super::backdoor::{Backdoor, BackdoorError};
use super::channel::{Channel, ChannelError};
use super::guestinfo::Guestinfo;
use super::nic;
use super::quiesce::{Quiesce, Step};
use super::rpci::{Call, RpcError, Rpci};
use super::tclo::{Incoming, Tclo};
use crate::detect::{Interface, Kind};
use crate::driver::{Driver, Event, GuestInfo, News, TimeOfDay};
use crate::hal::{Hal, MILLISECOND, Nanos, SECOND};
use crate::store::Store;

/// How often the host hears of the guest and is asked for the time.
const PERIOD: Nanos = 15 * SECOND;
/// Most requests of the host answered in one poll.
const REQUESTS: usize = 16;
/// Most messages waiting for the host. A host that takes none loses the newest.
const QUEUE: usize = 64;

/// The device.
pub struct Vmt<'h> {
    rpci: Rpci<'h>,
    tclo: Tclo<'h>,
    queue: VecDeque<Vec<u8>>,
    call: Option<Call<'h>>,
    /// Whether the host failed to answer, so that it is told once.
    silent: bool,
    guest: Option<GuestInfo>,
    /// What the host heard last of each kind of guest information.
    told: BTreeMap<u8, Vec<u8>>,
    quiesce: Quiesce,
    /// Events that came up while hearing news.
    pending: Vec<Event>,
    set_time: bool,
    next_report: Nanos,
}

impl<'h> Vmt<'h> {
    /// Finds the backdoor and sees whether the host has GuestRPC.
    ///
    /// # Errors
    /// [`AttachError`].
    pub fn attach(hal: &'h dyn Hal, interface: &Interface) -> Result<Vmt<'h>, AttachError> {
        let backdoor = Backdoor::find(hal, Some(interface)).map_err(AttachError::Backdoor)?;
        Channel::open(backdoor, abi::vmware::message::RPCI).map_err(AttachError::Channel)?;
        let mut vmt = Vmt {
            rpci: Rpci::new(backdoor),
            tclo: Tclo::new(backdoor),
            queue: VecDeque::new(),
            call: None,
            silent: false,
            guest: None,
            told: BTreeMap::new(),
            quiesce: Quiesce::Idle,
            pending: Vec::new(),
            set_time: true,
            next_report: 0,
        };
        vmt.say(format!("{} 1", words::CAPABILITY_HGFS_SERVER));
        Ok(vmt)
    }

    fn say(&mut self, request: impl Into<Vec<u8>>) {
        if self.queue.len() < QUEUE {
            self.queue.push_back(request.into());
        }
    }

    /// Sends what waits. Returns when to go on, if the host has not answered yet.
    fn send(&mut self, now: Nanos, events: &mut Vec<Event>) -> Option<Nanos> {
        loop {
            if self.call.is_none() {
                let request = self.queue.pop_front()?;
                self.call = Some(self.rpci.begin(&request, now));
            }
            let call = self.call.as_mut()?;
            match call.poll(now) {
                Poll::Pending => return Some(call.next()),
                // What the host refuses, or has no room for, it need not hear.
                Poll::Ready(Ok(_) | Err(RpcError::Refused(_) | RpcError::Malformed | RpcError::Channel(ChannelError::TooLong))) => {
                    self.silent = false;
                }
                Poll::Ready(Err(error)) => {
                    if !self.silent {
                        events.push(Event::Message(format!("vmt0: {error}")));
                    }
                    self.silent = true;
                    // Rather all of it anew later than half of it.
                    self.queue.clear();
                    self.told.clear();
                }
            }
            self.call = None;
        }
    }

    /// Answers the host's requests.
    fn answer_all(&mut self, now: Nanos, events: &mut Vec<Event>) {
        for _ in 0..REQUESTS {
            match self.tclo.poll(now) {
                Incoming::Request(request) => {
                    let text = String::from_utf8_lossy(request.strip_suffix(b"\0").unwrap_or(&request)).into_owned();
                    let reply = self.answer(&text, now, events);
                    self.tclo.reply(reply);
                }
                Incoming::Contended => {
                    events.push(Event::Message("vmt0: another program answers the host's requests (vmtoolsd?)".to_string()));
                    return;
                }
                Incoming::Nothing | Incoming::Lost(_) => return,
            }
        }
    }

    fn answer(&mut self, request: &str, now: Nanos, events: &mut Vec<Event>) -> &'static str {
        match request {
            words::RESET => return words::RESET_REPLY,
            words::PING => {}
            words::CAPABILITIES_REGISTER => self.register(now),
            words::OS_HALT => self.change(state_change::HALT, Event::Shutdown(Kind::Vmware), events),
            words::OS_REBOOT => self.change(state_change::REBOOT, Event::Reboot(Kind::Vmware), events),
            words::OS_POWER_ON => self.say(state(state_change::POWER_ON)),
            words::OS_RESUME => {
                self.change(state_change::RESUME, Event::Resume(Kind::Vmware), events);
                self.told.clear();
                self.set_time = true;
                self.next_report = now;
            }
            words::OS_SUSPEND => self.change(state_change::SUSPEND, Event::Suspend(Kind::Vmware), events),
            words::BROADCAST_IP => match self.first_address() {
                Some(address) => self.say(format!("{} {} {address}", words::INFO_SET, words::GUESTINFO_IP)),
                None => return words::ERROR_NO_ADDRESS,
            },
            vmbackup::START if self.step(Step::Start, now, events) => {}
            vmbackup::SNAPSHOT_DONE if self.step(Step::SnapshotDone, now, events) => {}
            vmbackup::ABORT if self.step(Step::Abort, now, events) => {}
            _ => return words::ERROR_UNKNOWN,
        }
        words::OK
    }

    fn change(&mut self, number: u8, event: Event, events: &mut Vec<Event>) {
        self.say(state(number));
        events.push(event);
    }

    fn register(&mut self, now: Nanos) {
        self.say(words::CAPABILITY_UNIFIED_LOOP);
        // The host wants the blank.
        self.say(format!("{} ", words::CAPABILITY_STATE_CHANGE));
        self.say(format!("{} {}", words::SET_VERSION, words::VERSION_UNMANAGED));
        self.told.clear();
        self.next_report = now;
    }

    fn step(&mut self, step: Step, now: Nanos, events: &mut Vec<Event>) -> bool {
        let mut requests = Vec::new();
        let done = self.quiesce.on(step, now, &mut requests, events);
        requests.into_iter().for_each(|request| self.say(request));
        done
    }

    /// What is due every [`PERIOD`].
    fn report(&mut self, now: Nanos, events: &mut Vec<Event>) {
        if now < self.next_report {
            return;
        }
        self.next_report = now.saturating_add(PERIOD);
        if let Ok(Some(time)) = self.rpci.backdoor().time() {
            events.push(Event::Time(TimeOfDay {
                source: Kind::Vmware,
                seconds: time.seconds,
                nanoseconds: time.microseconds * 1000,
                read_at: self.rpci.backdoor().hal().now(),
                set: core::mem::take(&mut self.set_time),
            }));
        }
        if let Some(guest) = &self.guest {
            let uptime = now.saturating_sub(guest.started) / (10 * MILLISECOND);
            self.tell_guest();
            self.say(format!("{}  {} {uptime}", words::SET_GUEST_INFO, guest_info::UPTIME));
        }
    }

    /// Tells the host what it does not know yet of the guest.
    fn tell_guest(&mut self) {
        let Some(guest) = &self.guest else { return };
        let texts = [
            (guest_info::DNS_NAME, guest.hostname.as_bytes().to_vec()),
            (guest_info::OS_NAME_FULL, guest.os_name_full.as_bytes().to_vec()),
            (guest_info::OS_NAME, guest.os_name.as_bytes().to_vec()),
            (guest_info::NIC_V3, nic::encode(&guest.nics)),
        ];
        for (kind, value) in texts {
            if value.is_empty() || self.told.get(&kind) == Some(&value) {
                continue;
            }
            let mut request = format!("{}  {kind} ", words::SET_GUEST_INFO).into_bytes();
            request.extend_from_slice(&value);
            self.say(request);
            self.told.insert(kind, value);
        }
    }

    fn first_address(&self) -> Option<IpAddr> {
        let addresses = self.guest.iter().flat_map(|guest| &guest.nics).flat_map(|nic| &nic.addresses);
        addresses.map(|address| address.ip).find(|ip| ip.is_ipv4() && !ip.is_loopback())
    }
}

impl<'h> Driver<'h> for Vmt<'h> {
    fn poll(&mut self, now: Nanos, events: &mut Vec<Event>) -> Option<Nanos> {
        events.append(&mut self.pending);
        self.answer_all(now, events);
        self.step(Step::Tick, now, events);
        self.report(now, events);
        let sending = self.send(now, events);
        let others = [sending, self.quiesce.next(), Some(self.next_report)];
        others.into_iter().flatten().chain([self.tclo.next()]).min()
    }

    fn hear(&mut self, news: &News, now: Nanos) {
        let mut events = core::mem::take(&mut self.pending);
        match news {
            News::Guest(guest) => {
                self.guest = Some(guest.clone());
                self.tell_guest();
            }
            News::Frozen(at_rest) => {
                self.step(Step::Frozen(*at_rest), now, &mut events);
            }
            News::GoingDown { .. } => {
                self.tclo.close();
                self.say(format!("{} 0", words::CAPABILITY_HGFS_SERVER));
                self.send(now, &mut events);
            }
        }
        self.pending = events;
    }

    fn store(&self) -> Option<Box<dyn Store + 'h>> {
        Some(Box::new(Guestinfo::new(self.rpci)))
    }
}

fn state(number: u8) -> String {
    format!("{} 1 {number}", words::STATE_CHANGE_STATUS)
}

/// Why there is no vmt0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AttachError {
    /// There is no backdoor.
    Backdoor(BackdoorError),
    /// The host has no GuestRPC.
    Channel(ChannelError),
}

impl core::fmt::Display for AttachError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            AttachError::Backdoor(error) => write!(f, "{error}"),
            AttachError::Channel(error) => write!(f, "GuestRPC does not work: {error}"),
        }
    }
}

impl core::error::Error for AttachError {}
