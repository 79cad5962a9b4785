//! pvbus in this kernel: the device tree, its interrupts and deadlines, and what hosts ask for, be it by the power button.

use alloc::string::ToString;
use alloc::vec::Vec;

use logic::calendar::DateTime;
use pvbus::hal::SECOND;
use pvbus::{Event, GuestInfo, Nanos, News, Polled, TimeOfDay, Tree};

use crate::hal::KERNEL;
use crate::net::Network;
use crate::net::commands::Failure;
use crate::{dmesg, interrupts, power, prompt, rtc, time};

/// The name that hosts are told.
const HOSTNAME: &str = "pvbus";
/// What hosts are told of the operating system: VMware's name for one that it does not know, in full and short.
const OS_NAME: &str = "other-64";

/// The bus and what belongs to it.
pub struct Bus {
    /// Devices and stores.
    pub tree: Tree<'static>,
    /// Interrupt lines of devices, and the vectors they come by.
    lines: Vec<(u8, u8)>,
    /// The vector of the machine's power button.
    button: Option<u8>,
    /// When the devices want to be polled.
    next: Option<Nanos>,
    /// On each network card, in the order in which they came.
    networks: Vec<Network>,
    /// The latest time of day by each host.
    times: Vec<TimeOfDay>,
    /// Seconds since 1970 by the real-time clock, and when it was read.
    rtc: Option<(u64, Nanos)>,
}

impl Bus {
    /// Finds and attaches everything.
    pub fn attach() -> Bus {
        let tree = Tree::attach(&KERNEL);
        tree.dmesg().iter().for_each(|line| dmesg!("{line}"));
        let lines = tree.interrupt_lines().map(|line| (line, interrupts::isa(line))).collect();
        let button = power::enable_button();
        let mut bus = Bus { tree, lines, button, next: Some(0), networks: Vec::new(), times: Vec::new(), rtc: None };
        bus.read_rtc();
        bus.tell_hosts();
        bus.poll();
        bus
    }

    /// Does what is due; when to call again, unless an interrupt comes.
    pub fn poll(&mut self) -> Option<Nanos> {
        let next = self.poll_devices();
        self.follow_cards();
        [next, self.poll_networks().1].into_iter().flatten().min()
    }

    fn poll_devices(&mut self) -> Option<Nanos> {
        if self.button.is_some_and(interrupts::take) && power::was_button_pressed() {
            dmesg!("Shutting down because the power button was pressed");
            self.go_down(false);
        }
        for (line, vector) in self.lines.clone() {
            if interrupts::take(vector) {
                let polled = self.tree.on_interrupt(line, time::now());
                self.sooner(&polled);
            }
        }
        if interrupts::take(interrupts::UPCALL) {
            let polled = self.tree.on_upcall(time::now());
            self.sooner(&polled);
        }
        if self.next.is_some_and(|next| next <= time::now()) {
            let Polled { events, next } = self.tree.poll(time::now());
            self.next = next;
            self.obey(&events);
        }
        self.next
    }

    /// The network of the first card, which commands use.
    pub fn network(&mut self) -> Option<&mut Network> {
        self.networks.first_mut()
    }

    /// The networks of all cards.
    pub fn networks(&self) -> &[Network] {
        &self.networks
    }

    /// Waits until `look` finds in the first network what it looks for, but not longer than `deadline`. The network stays the same, even without its card.
    pub fn wait_for_network<T>(&mut self, deadline: Nanos, mut look: impl FnMut(&mut Network) -> Option<T>) -> Result<T, Failure> {
        loop {
            let next = self.poll_devices();
            self.poll_networks();
            if let Some(found) = look(self.network().ok_or(Failure::NoCard)?) {
                return Ok(found);
            }
            // What it has written goes out before we sleep, and what came meanwhile is looked at.
            let (changed, network_next) = self.poll_networks();
            if time::now() >= deadline {
                return Err(Failure::NoAnswer);
            }
            if !changed {
                // Or it would not sleep, once a key was pressed.
                prompt::listen();
                interrupts::wait([next, network_next, Some(deadline)].into_iter().flatten().min());
            }
        }
    }

    /// Keeps a network on each card there is.
    fn follow_cards(&mut self) {
        let cards = self.tree.cards();
        let before = self.networks.len();
        self.networks.retain(|network| cards.iter().any(|card| card.name() == network.name()));
        if self.networks.len() < before {
            self.tell_hosts();
        }
        for card in cards {
            if self.networks.iter().all(|network| network.name() != card.name()) {
                self.networks.push(Network::new(card));
            }
        }
    }

    /// Moves frames. Whether anything changed for a socket, and when to do it again.
    fn poll_networks(&mut self) -> (bool, Option<Nanos>) {
        let polled = self.networks.iter_mut().map(Network::poll);
        let polled = polled.fold((false, None), |(any, first), (changed, next)| (any | changed, [first, next].into_iter().flatten().min()));
        if self.networks.iter_mut().fold(false, |any, network| network.take_news() | any) {
            self.tell_hosts();
        }
        polled
    }

    /// Tells hosts what this guest is.
    fn tell_hosts(&mut self) {
        let guest = GuestInfo {
            hostname: HOSTNAME.to_string(),
            os_name_full: crate::NAME.to_string(),
            os_name: OS_NAME.to_string(),
            os_version: env!("CARGO_PKG_VERSION").to_string(),
            started: 0,
            nics: self.networks.iter().map(Network::nic).collect(),
        };
        self.tree.tell(&News::Guest(guest), time::now());
        self.next = Some(0);
    }

    /// Switches off, or starts again, after telling the devices.
    pub fn go_down(&mut self, reboot: bool) -> ! {
        self.tree.tell(&News::GoingDown { reboot }, time::now());
        if reboot { power::reset() } else { power::off() }
    }

    /// Times of day that hosts told, by now: seconds since 1970, nanoseconds, and when they told it.
    pub fn host_times(&self) -> impl Iterator<Item = (TimeOfDay, u64, u64)> {
        let now = time::now();
        self.times.iter().map(move |told| {
            let nanoseconds = u64::from(told.nanoseconds) + now.saturating_sub(told.read_at);
            (*told, told.seconds + nanoseconds / SECOND, nanoseconds % SECOND)
        })
    }

    /// Seconds since 1970 by the real-time clock, by now.
    pub fn rtc_time(&self) -> Option<u64> {
        self.rtc.map(|(seconds, read_at)| seconds + time::now().saturating_sub(read_at) / SECOND)
    }

    /// After some of the devices were polled.
    fn sooner(&mut self, polled: &Polled) {
        self.next = [self.next, polled.next].into_iter().flatten().min();
        self.obey(&polled.events);
    }

    fn obey(&mut self, events: &[Event]) {
        for event in events {
            match event {
                Event::Shutdown(host) => {
                    dmesg!("Shutting down in response to request from {host} host");
                    self.go_down(false);
                }
                Event::Reboot(host) => {
                    dmesg!("Rebooting in response to request from {host} host");
                    self.go_down(true);
                }
                Event::Suspend(host) => dmesg!("{host} host suspends this machine"),
                Event::Resume(host) => {
                    dmesg!("{host} host resumed this machine");
                    self.read_rtc();
                }
                Event::Time(told) => match self.times.iter_mut().find(|other| other.source == told.source) {
                    Some(other) => *other = *told,
                    None => self.times.push(*told),
                },
                Event::SyncRtc(_) => self.read_rtc(),
                // There are no file systems: they are at rest.
                Event::Freeze(_) => self.tree.tell(&News::Frozen(true), time::now()),
                Event::Thaw(_) => {}
                Event::Message(line) => dmesg!("{line}"),
            }
        }
    }

    fn read_rtc(&mut self) {
        self.rtc = rtc::read().and_then(DateTime::to_unix).map(|seconds| (seconds, time::now()));
    }
}
