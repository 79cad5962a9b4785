//! pvbus in this kernel: the device tree, its interrupts and deadlines, and what hosts ask for, be it by the power button.

use alloc::string::ToString;
use alloc::vec::Vec;

use logic::calendar::DateTime;
use pvbus::hal::SECOND;
use pvbus::net::Nic;
use pvbus::{Event, GuestInfo, Nanos, News, Polled, TimeOfDay, Tree};

use crate::hal::Kernel;
use crate::net::Network;
use crate::net::commands::Failure;
use crate::{dmesg, interrupts, power, prompt, rtc, time};

static KERNEL: Kernel = Kernel;

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
    /// On the first network card, while there is one.
    network: Option<Network>,
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
        let mut bus = Bus { tree, lines, button, next: Some(0), network: None, times: Vec::new(), rtc: None };
        bus.read_rtc();
        bus.tell_hosts(Vec::new());
        bus.poll();
        bus
    }

    /// Does what is due; when to call again, unless an interrupt comes.
    pub fn poll(&mut self) -> Option<Nanos> {
        let next = self.poll_devices();
        self.follow_cards();
        [next, self.poll_network().1].into_iter().flatten().min()
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

    /// The network, if there is a card.
    pub fn network(&mut self) -> Option<&mut Network> {
        self.network.as_mut()
    }

    /// Waits until `look` finds in the network what it looks for, but not longer than `deadline`. The network stays the same, even without its card.
    pub fn wait_for_network<T>(&mut self, deadline: Nanos, mut look: impl FnMut(&mut Network) -> Option<T>) -> Result<T, Failure> {
        loop {
            let next = self.poll_devices();
            self.poll_network();
            if let Some(found) = look(self.network.as_mut().ok_or(Failure::NoCard)?) {
                return Ok(found);
            }
            // What it has written goes out before we sleep, and what came meanwhile is looked at.
            let (changed, network_next) = self.poll_network();
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

    /// Keeps the network at the first card there is.
    fn follow_cards(&mut self) {
        let cards = self.tree.cards();
        if self.network.as_ref().is_some_and(|network| cards.iter().all(|card| card.name() != network.name())) {
            self.network = None;
        }
        if self.network.is_none() {
            self.network = cards.into_iter().next().map(Network::new);
        }
    }

    /// Moves frames. Whether anything changed for a socket, and when to do it again.
    fn poll_network(&mut self) -> (bool, Option<Nanos>) {
        let Some(network) = &mut self.network else { return (false, None) };
        let polled = network.poll();
        if let Some(nic) = network.news() {
            self.tell_hosts(Vec::from([nic]));
        }
        polled
    }

    /// Tells hosts what this guest is.
    fn tell_hosts(&mut self, nics: Vec<Nic>) {
        let guest = GuestInfo {
            hostname: HOSTNAME.to_string(),
            os_name_full: crate::NAME.to_string(),
            os_name: OS_NAME.to_string(),
            started: 0,
            nics,
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
