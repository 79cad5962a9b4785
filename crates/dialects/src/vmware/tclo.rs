//! Requests of the host to the guest's tools: the greeting of a new client, and power operations.
//!
//! The guest polls for requests and sends its reply with the next poll; there is no second request before the reply. Texts and order:
//! open-vm-tools `lib/rpcIn/rpcin.c`, `services/vmtoolsd/toolsRpc.c` and `services/plugins/powerOps`, OpenBSD `sys/dev/pv/vmt.c`.
//!
//! ```text
//!   channel opens --> reset, ping, Capabilities_Register, Set_Option broadcastIP 1 (and again every 30 s)
//!                     tools.capability.statechange (RPCI) --> OS_PowerOn, once after power on
//!   PowerRequest  --> OS_Halt, OS_Reboot --reply "OK "--> Accepted --tools.os.statechange.status (RPCI)--> Done
//! ```

use abi::vmware::rpc::{self as words, state_change};
use serde::{Deserialize, Serialize};

use super::message::ChannelId;

/// What an accepted request's reply begins with.
const OK: &[u8] = b"OK";
/// Most bytes that are kept of a refusal.
const MAX_REASON: usize = 200;
/// What each new client is asked, in this order.
const GREETING: [Request; 4] = [Request::Reset, Request::Ping, Request::RegisterCapabilities, Request::BroadcastIp];

/// Nanoseconds between two questions for the guest's address: it may have none yet when the tools start, and get another one later. As often as
/// open-vm-tools reports by itself (`services/plugins/guestInfo/guestInfoServer.c`).
const ADDRESS_PERIOD: u64 = 30_000_000_000;

/// What the host can ask of a guest with tools.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum PowerRequest {
    /// Shut down and power off.
    Halt,
    /// Shut down and start again.
    Reboot,
    /// Take the host's time of day.
    SetClock,
}

/// Why a power request was not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PowerError {
    /// No tools run, or they have not answered the first request yet.
    #[error("no VMware tools run in the guest")]
    NoTools,
    /// `tools.capability.statechange` did not come.
    #[error("the guest's VMware tools do not take power requests")]
    NotTaken,
    /// One at a time.
    #[error("the guest's VMware tools have not answered the request before this one")]
    Busy,
}

/// How far a power request got.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Progress {
    /// The tools have not asked for it yet.
    Queued,
    /// They have it.
    Sent,
    /// They will do it.
    Accepted,
    /// They say that they have done their part; the guest's shutdown follows.
    Done,
    /// They will not, for this reason.
    Refused(String),
}

/// The last power request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PowerStatus {
    /// What was asked.
    pub request: PowerRequest,
    /// How far it got.
    pub progress: Progress,
    /// When it got there, in nanoseconds of the machine's clock.
    pub since: u64,
}

/// What is known of the tools in the guest.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ToolsStatus {
    /// Tools run: they have opened a channel for requests and answered the first one.
    pub are_running: bool,
    /// They take power requests.
    pub take_power_requests: bool,
    /// When they last asked for requests, in nanoseconds of the machine's clock. Idle tools ask about once a second.
    pub last_heard: Option<u64>,
    /// The last power request since the machine was reset.
    pub power: Option<PowerStatus>,
}

/// The host's end of the tools' channel.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Tclo {
    client: Option<Client>,
    /// The guest was told that it was powered on.
    told_power_on: bool,
    power: Option<PowerStatus>,
}

/// The tools that opened a channel last; any others get no requests.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Client {
    channel: ChannelId,
    /// How many of [`GREETING`] are through.
    greeted: usize,
    /// What they have to answer next.
    awaited: Option<Request>,
    state_change: bool,
    last_heard: Option<u64>,
    /// When they were last asked for the guest's address.
    address_asked: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum Request {
    Reset,
    Ping,
    RegisterCapabilities,
    BroadcastIp,
    PowerOn,
    Power(PowerRequest),
}

impl Request {
    fn text(self) -> String {
        match self {
            Request::Reset => words::RESET.into(),
            Request::Ping => words::PING.into(),
            Request::RegisterCapabilities => words::CAPABILITIES_REGISTER.into(),
            // Answered by `info-set guestinfo.ip`.
            Request::BroadcastIp => format!("{} broadcastIP 1", words::SET_OPTION),
            Request::PowerOn => words::OS_POWER_ON.into(),
            Request::Power(PowerRequest::Halt) => words::OS_HALT.into(),
            Request::Power(PowerRequest::Reboot) => words::OS_REBOOT.into(),
            Request::Power(PowerRequest::SetClock) => words::TIME_SYNCHRONIZE.into(),
        }
    }
}

impl Tclo {
    /// Tools have opened a channel.
    pub fn opened(&mut self, channel: ChannelId, now: u64) {
        self.abandon("other tools have taken over", now);
        self.client = Some(Client { channel, greeted: 0, awaited: None, state_change: false, last_heard: None, address_asked: now });
    }

    /// A channel is gone.
    pub fn closed(&mut self, channel: ChannelId, now: u64) {
        if self.client.as_ref().is_some_and(|client| client.channel == channel) {
            self.client = None;
            self.abandon("the tools have closed their channel", now);
        }
    }

    /// The tools' reply to the request before; empty when there was none.
    pub fn received(&mut self, channel: ChannelId, reply: &[u8], now: u64) {
        let Some(client) = self.client.as_mut().filter(|client| client.channel == channel) else { return };
        client.last_heard = Some(now);
        match client.awaited.take() {
            // Whoever does not understand the first request is asked again with the next poll.
            Some(Request::Reset) if !reply.starts_with(words::RESET_REPLY.as_bytes()) => {}
            Some(Request::Reset | Request::Ping | Request::RegisterCapabilities | Request::BroadcastIp) => {
                client.greeted = (client.greeted + 1).min(GREETING.len());
            }
            Some(Request::Power(_)) if reply.starts_with(OK) => self.proceed(Progress::Accepted, now),
            Some(Request::Power(_)) => {
                let reason = String::from_utf8_lossy(reply.get(..MAX_REASON).unwrap_or(reply)).into_owned();
                self.proceed(Progress::Refused(reason), now);
            }
            Some(Request::PowerOn) | None => {}
        }
    }

    /// The next request, when there is one and the one before was answered.
    pub fn offer(&mut self, channel: ChannelId, now: u64) -> Option<Vec<u8>> {
        let client = self.client.as_mut().filter(|client| client.channel == channel && client.awaited.is_none())?;
        let queued = self.power.as_ref().filter(|power| power.progress == Progress::Queued);
        let request = match (GREETING.get(client.greeted), queued) {
            (Some(greeting), _) => *greeting,
            (None, _) if client.state_change && !self.told_power_on => Request::PowerOn,
            (None, Some(power)) => Request::Power(power.request),
            (None, None) if now.saturating_sub(client.address_asked) >= ADDRESS_PERIOD => Request::BroadcastIp,
            (None, None) => return None,
        };
        client.awaited = Some(request);
        match request {
            Request::PowerOn => self.told_power_on = true,
            Request::BroadcastIp => client.address_asked = now,
            Request::Power(_) => self.proceed(Progress::Sent, now),
            _ => {}
        }
        Some(request.text().into_bytes())
    }

    /// RPCI `tools.capability.statechange`: whether power requests are taken.
    pub fn set_state_change(&mut self, capable: bool) {
        if let Some(client) = &mut self.client {
            client.state_change = capable;
        }
    }

    /// RPCI `tools.os.statechange.status`: the guest has done, or not, what the power request `number` wanted.
    pub fn state_changed(&mut self, success: bool, number: u8, now: u64) {
        let asked = match self.power.as_ref().map(|power| power.request) {
            Some(PowerRequest::Halt) => state_change::HALT,
            Some(PowerRequest::Reboot) => state_change::REBOOT,
            Some(PowerRequest::SetClock) | None => return,
        };
        if asked == number {
            self.proceed(if success { Progress::Done } else { Progress::Refused("the guest's script failed".into()) }, now);
        }
    }

    /// Queues a power request.
    pub fn request(&mut self, request: PowerRequest, now: u64) -> Result<(), PowerError> {
        let client = self.client.as_ref().filter(|client| client.greeted > 0).ok_or(PowerError::NoTools)?;
        if !client.state_change && request != PowerRequest::SetClock {
            return Err(PowerError::NotTaken);
        }
        if self.is_pending() {
            return Err(PowerError::Busy);
        }
        self.power = Some(PowerStatus { request, progress: Progress::Queued, since: now });
        Ok(())
    }

    /// What is known of the tools.
    pub fn status(&self) -> ToolsStatus {
        let client = self.client.as_ref();
        ToolsStatus {
            are_running: client.is_some_and(|client| client.greeted > 0),
            take_power_requests: client.is_some_and(|client| client.state_change),
            last_heard: client.and_then(|client| client.last_heard),
            power: self.power.clone(),
        }
    }

    fn is_pending(&self) -> bool {
        self.power.as_ref().is_some_and(|power| matches!(power.progress, Progress::Queued | Progress::Sent))
    }

    fn proceed(&mut self, progress: Progress, now: u64) {
        if let Some(power) = &mut self.power {
            (power.progress, power.since) = (progress, now);
        }
    }

    /// Nobody will answer a request that is pending.
    fn abandon(&mut self, why: &str, now: u64) {
        if self.is_pending() {
            self.proceed(Progress::Refused(why.into()), now);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHANNEL: ChannelId = 3;

    /// Tools that reply to each request in turn, and what they were asked.
    fn poll(tclo: &mut Tclo, reply: &str) -> Option<String> {
        tclo.received(CHANNEL, reply.as_bytes(), 10);
        tclo.offer(CHANNEL, 11).map(|text| String::from_utf8(text).unwrap())
    }

    /// A client that has been greeted, takes power requests and knows that it was powered on.
    fn greeted() -> Tclo {
        let mut tclo = Tclo::default();
        tclo.opened(CHANNEL, 1);
        assert_eq!(poll(&mut tclo, "").unwrap(), "reset");
        assert_eq!(poll(&mut tclo, "OK ATR toolbox").unwrap(), "ping");
        assert_eq!(poll(&mut tclo, "OK ").unwrap(), "Capabilities_Register");
        tclo.set_state_change(true);
        assert_eq!(poll(&mut tclo, "OK ").unwrap(), "Set_Option broadcastIP 1");
        assert_eq!(poll(&mut tclo, "ERROR Unable to find guest IP address").unwrap(), "OS_PowerOn");
        assert_eq!(poll(&mut tclo, "OK "), None);
        tclo
    }

    fn progress(tclo: &Tclo) -> Progress {
        tclo.status().power.unwrap().progress
    }

    #[test]
    fn address_is_asked_for_again_and_again() {
        let mut tclo = greeted();
        assert_eq!(tclo.offer(CHANNEL, ADDRESS_PERIOD + 10), None, "it was asked for at 11");
        let asked = |tclo: &mut Tclo, now| tclo.offer(CHANNEL, now).map(|text| String::from_utf8(text).unwrap());
        assert_eq!(asked(&mut tclo, ADDRESS_PERIOD + 11).unwrap(), "Set_Option broadcastIP 1");
        tclo.received(CHANNEL, b"OK ", ADDRESS_PERIOD + 12);
        assert_eq!(asked(&mut tclo, ADDRESS_PERIOD + 13), None);
        assert!(asked(&mut tclo, 2 * ADDRESS_PERIOD + 11).is_some());
    }

    #[test]
    fn halt_is_sent_accepted_and_done() {
        let mut tclo = greeted();
        tclo.request(PowerRequest::Halt, 5).unwrap();
        assert_eq!(tclo.status().power.unwrap(), PowerStatus { request: PowerRequest::Halt, progress: Progress::Queued, since: 5 });
        assert_eq!(poll(&mut tclo, "").unwrap(), "OS_Halt");
        assert_eq!(progress(&tclo), Progress::Sent);
        assert_eq!(poll(&mut tclo, "OK "), None);
        assert_eq!(progress(&tclo), Progress::Accepted);
        tclo.state_changed(true, state_change::REBOOT, 20);
        assert_eq!(progress(&tclo), Progress::Accepted, "that was about something else");
        tclo.state_changed(true, state_change::HALT, 21);
        assert_eq!(tclo.status().power.unwrap(), PowerStatus { request: PowerRequest::Halt, progress: Progress::Done, since: 21 });
        tclo.closed(CHANNEL, 22);
        assert_eq!(progress(&tclo), Progress::Done);
    }

    #[test]
    fn refusals_say_why() {
        let mut tclo = greeted();
        tclo.request(PowerRequest::Reboot, 5).unwrap();
        assert_eq!(poll(&mut tclo, "").unwrap(), "OS_Reboot");
        poll(&mut tclo, "ERROR Unknown command");
        assert_eq!(progress(&tclo), Progress::Refused("ERROR Unknown command".into()));
        tclo.request(PowerRequest::Reboot, 5).unwrap();
        poll(&mut tclo, "");
        poll(&mut tclo, "OK ");
        tclo.state_changed(false, state_change::REBOOT, 6);
        assert_eq!(progress(&tclo), Progress::Refused("the guest's script failed".into()));
    }

    #[test]
    fn clock_is_set_by_tools_that_take_no_power_requests() {
        let mut tclo = greeted();
        tclo.set_state_change(false);
        tclo.request(PowerRequest::SetClock, 5).unwrap();
        assert_eq!(poll(&mut tclo, "").unwrap(), "Time_Synchronize 1");
        tclo.state_changed(true, state_change::HALT, 6);
        assert_eq!(progress(&tclo), Progress::Sent);
        poll(&mut tclo, "OK ");
        assert_eq!(progress(&tclo), Progress::Accepted);
    }

    #[test]
    fn one_request_at_a_time() {
        let mut tclo = greeted();
        tclo.request(PowerRequest::Halt, 5).unwrap();
        assert_eq!(tclo.request(PowerRequest::Reboot, 5), Err(PowerError::Busy));
        assert_eq!(poll(&mut tclo, "").unwrap(), "OS_Halt");
        assert_eq!(tclo.offer(CHANNEL, 12), None, "not again before the reply");
        assert_eq!(tclo.request(PowerRequest::Reboot, 5), Err(PowerError::Busy));
        poll(&mut tclo, "OK ");
        tclo.request(PowerRequest::Reboot, 5).unwrap();
    }

    #[test]
    fn power_requests_need_tools_that_take_them() {
        let mut tclo = Tclo::default();
        assert_eq!(tclo.request(PowerRequest::Halt, 0), Err(PowerError::NoTools));
        tclo.opened(CHANNEL, 1);
        poll(&mut tclo, "");
        assert_eq!(tclo.request(PowerRequest::Halt, 0), Err(PowerError::NoTools));
        assert_eq!(tclo.status(), ToolsStatus { last_heard: Some(10), ..ToolsStatus::default() });
        poll(&mut tclo, "OK ATR toolbox");
        assert_eq!(tclo.request(PowerRequest::Halt, 0), Err(PowerError::NotTaken));
        tclo.set_state_change(true);
        tclo.request(PowerRequest::Halt, 0).unwrap();
    }

    #[test]
    fn reset_is_asked_until_it_is_understood() {
        let mut tclo = Tclo::default();
        tclo.opened(CHANNEL, 1);
        for reply in ["", "ERROR", "", "OK"] {
            assert_eq!(poll(&mut tclo, reply).unwrap(), "reset");
        }
        assert_eq!(poll(&mut tclo, "OK ATR toolbox-dnd").unwrap(), "ping");
    }

    #[test]
    fn new_tools_are_greeted_but_not_told_of_the_power_again() {
        let mut tclo = greeted();
        tclo.request(PowerRequest::Halt, 5).unwrap();
        tclo.opened(7, 30);
        assert_eq!(progress(&tclo), Progress::Refused("other tools have taken over".into()));
        assert_eq!(tclo.offer(CHANNEL, 31), None);
        assert_eq!(tclo.offer(7, 31).unwrap(), b"reset");
        tclo.closed(CHANNEL, 32);
        for reply in ["OK ATR toolbox", "OK ", "OK ", "OK ", ""] {
            tclo.received(7, reply.as_bytes(), 33);
            tclo.set_state_change(true);
            assert_ne!(tclo.offer(7, 33).as_deref(), Some(&b"OS_PowerOn"[..]));
        }
    }

    #[test]
    fn tools_that_go_away_leave_no_request_pending() {
        let mut tclo = greeted();
        tclo.request(PowerRequest::Halt, 5).unwrap();
        tclo.closed(CHANNEL, 6);
        assert_eq!(progress(&tclo), Progress::Refused("the tools have closed their channel".into()));
        assert_eq!(tclo.request(PowerRequest::Halt, 7), Err(PowerError::NoTools));
    }
}
