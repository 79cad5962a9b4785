//! Windows: bytes behind a guest register that several instructions access, which are looked up in the TLB once.
//!
//! Compilers make fields of a structure, and pushes and pops, of accesses at small distances from one register. Where all of them
//! lie in one page that the TLB knows, one look tells for all, and a host register leads there from then on: nothing that is translated
//! changes the TLB, and whoever wants it changed waits until the processor looks around, between blocks.
//!
//! What a block does to memory and to registers is known when its code has been made, so a block with something to gain is made twice:
//! the first time only to see its [`Event`]s.

/// Most bytes from the first to the last of a window, so that few of them lie across the end of a page.
const MOST: i64 = 128;

/// Most windows at a time.
pub(super) const WINDOWS: usize = 2;

/// What addresses are made of besides a constant: base register and segment base, as indices into [`crate::cpu::Cpu::regs`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Key {
    pub base: u8,
    pub segment: u8,
}

/// What an instruction does that matters to windows.
#[derive(Debug, Clone, Copy)]
pub(super) enum Event {
    /// Op `k` accesses memory: here, or where a window is of no use.
    Access { k: usize, window: Option<Window> },
    /// It changes a register, perhaps by a constant.
    Moved { register: u8, by: Option<i32> },
    /// The interpreter does it: it may do anything.
    Barrier,
}

/// See the module.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Window {
    pub key: Key,
    /// Distance of the first byte from what the key says now.
    pub low: i64,
    /// Distance of the byte behind the last.
    pub high: i64,
    /// Something is written.
    pub write: bool,
}

impl Window {
    pub fn new(key: Key, at: i32, size: u8, write: bool) -> Window {
        Window { key, low: at.into(), high: i64::from(at) + i64::from(size), write }
    }

    pub fn size(&self) -> i64 {
        self.high - self.low
    }

    /// Whether an access needs no look of its own.
    pub fn covers(&self, access: &Window) -> bool {
        self.key == access.key && self.low <= access.low && access.high <= self.high && self.write >= access.write
    }

    /// This window seen from the register's new value; `None` when nothing is known any more.
    pub fn moved(self, register: u8, by: Option<i32>) -> Option<Window> {
        if self.key.base != register {
            return Some(self);
        }
        let by = i64::from(by?);
        Some(Window { low: self.low - by, high: self.high - by, ..self })
    }

    fn with(&self, other: &Window) -> Window {
        Window { low: self.low.min(other.low), high: self.high.max(other.high), write: self.write | other.write, ..*self }
    }
}

/// How memory is accessed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    /// By a look of its own.
    Alone,
    /// By a window that is opened with this access, in place of another. Its first byte is at distance `low` from what the key says.
    Opens { window: Window, low: i32, closes: Option<Window> },
    /// By a window that is open.
    Inside,
}

/// Which windows are opened where.
#[derive(Default)]
pub(super) struct Plan {
    /// The way of each access.
    pub ways: Vec<Way>,
    /// The ops that access memory, and only inside of open windows.
    pub inside: Vec<usize>,
}

/// What is best for a block that does this.
pub(super) fn plan(events: &[Event]) -> Plan {
    let mut open: Vec<Window> = Vec::new();
    let mut ways = Vec::new();
    let (mut inside, mut looks) = (Vec::new(), Vec::new());
    for (n, event) in events.iter().enumerate() {
        match *event {
            Event::Access { k, window: Some(access) } if open.iter().any(|window| window.covers(&access)) => {
                inside.push(k);
                ways.push(Way::Inside);
            }
            Event::Access { k, window } => {
                looks.push(k);
                let opened = window.and_then(|access| from_access(access, &events[n + 1..]));
                let low = opened.and_then(|window| i32::try_from(window.low).ok());
                let (Some(window), Some(low)) = (opened, low) else {
                    ways.push(Way::Alone);
                    continue;
                };
                let same = open.iter().position(|other| other.key == window.key);
                let oldest = (open.len() == WINDOWS).then_some(0);
                let closes = same.or(oldest).map(|place| open.remove(place));
                open.push(window);
                ways.push(Way::Opens { window, low, closes });
            }
            Event::Moved { register, by } => open = open.iter().filter_map(|window| window.moved(register, by)).collect(),
            Event::Barrier => open.clear(),
        }
    }
    inside.retain(|k| !looks.contains(k));
    Plan { ways, inside }
}

/// The window for an access and those that follow.
fn from_access(first: Window, rest: &[Event]) -> Option<Window> {
    let mut window = first;
    // By what the register has changed since.
    let mut change = 0;
    let mut worthwhile = false;
    for event in rest {
        match *event {
            Event::Access { window: Some(access), .. } if access.key == first.key => {
                let seen_from_first = Window { low: access.low + change, high: access.high + change, ..access };
                let wider = window.with(&seen_from_first);
                if wider.size() <= MOST {
                    window = wider;
                    worthwhile = true;
                }
            }
            Event::Moved { register, by } if register == first.key.base => match by {
                Some(by) => change += i64::from(by),
                None => break,
            },
            Event::Barrier => break,
            Event::Access { .. } | Event::Moved { .. } => {}
        }
    }
    worthwhile.then_some(window)
}

#[cfg(test)]
mod tests {
    use super::*;

    const STACK: Key = Key { base: 4, segment: 16 };
    const OTHER: Key = Key { base: 3, segment: 16 };

    fn read(key: Key, at: i32) -> Event {
        Event::Access { k: 0, window: Some(Window::new(key, at, 8, false)) }
    }

    fn write(key: Key, at: i32) -> Event {
        Event::Access { k: 0, window: Some(Window::new(key, at, 8, true)) }
    }

    fn moved(key: Key, by: impl Into<Option<i32>>) -> Event {
        Event::Moved { register: key.base, by: by.into() }
    }

    /// The ways in short: a window's range and whether it is for writing, or whether there is one.
    fn planned(events: &[Event]) -> Vec<Result<(i64, i64, bool), bool>> {
        let short = |way| match way {
            Way::Alone => Err(false),
            Way::Inside => Err(true),
            Way::Opens { window, low, .. } => {
                assert_eq!(window.low, i64::from(low));
                Ok((window.low, window.high, window.write))
            }
        };
        plan(events).ways.into_iter().map(short).collect()
    }

    const ALONE: Result<(i64, i64, bool), bool> = Err(false);
    const INSIDE: Result<(i64, i64, bool), bool> = Err(true);

    #[test]
    fn fields_of_a_structure_are_looked_up_once() {
        let events = [read(OTHER, 16), read(STACK, 0), read(OTHER, 8), read(OTHER, 40)];
        assert_eq!(planned(&events), [Ok((8, 48, false)), ALONE, INSIDE, INSIDE]);
    }

    #[test]
    fn pushes_are_seen_from_the_first() {
        let push = [write(STACK, -8), moved(STACK, -8)];
        assert_eq!(planned(&[push, push, push].concat()), [Ok((-24, 0, true)), INSIDE, INSIDE]);
    }

    #[test]
    fn window_ends_with_its_register() {
        assert_eq!(planned(&[read(OTHER, 0), moved(OTHER, None), read(OTHER, 8)]), [ALONE, ALONE]);
        assert_eq!(planned(&[read(OTHER, 0), Event::Barrier, read(OTHER, 8)]), [ALONE, ALONE]);
        assert_eq!(planned(&[read(OTHER, 0), moved(STACK, None), read(OTHER, 8)]), [Ok((0, 16, false)), INSIDE]);
    }

    #[test]
    fn what_is_too_far_away_stays_outside() {
        let events = [read(OTHER, 0), read(OTHER, 121), write(OTHER, 120)];
        assert_eq!(planned(&events), [Ok((0, 128, true)), Ok((120, 129, true)), INSIDE]);
    }

    #[test]
    fn oldest_window_makes_room() {
        let pair = |base| [read(Key { base, ..OTHER }, 0), read(Key { base, ..OTHER }, 8)];
        let events = [pair(0), pair(1), pair(2)].concat();
        let closed = |way: Way| if let Way::Opens { closes, .. } = way { closes.map(|window| window.key.base) } else { None };
        assert_eq!(plan(&events).ways.into_iter().filter_map(closed).collect::<Vec<_>>(), [0]);
    }

    #[test]
    fn op_is_inside_with_all_that_it_accesses() {
        let access = |k, at| Event::Access { k, window: Some(Window::new(OTHER, at, 8, false)) };
        let far = Event::Access { k: 3, window: None };
        assert_eq!(plan(&[access(1, 0), access(2, 8), access(3, 0), far]).inside, [2]);
    }

    #[test]
    fn window_covers_what_it_was_looked_up_for() {
        let window = Window { low: -16, high: 0, ..Window::new(STACK, 0, 0, false) };
        let covers = |at, size, write| window.covers(&Window::new(STACK, at, size, write));
        assert!(covers(-16, 8, false) && covers(-1, 1, false) && covers(-16, 16, false));
        assert!(!covers(-17, 1, false) && !covers(-4, 8, false) && !covers(-8, 8, true));
        assert!(!window.covers(&Window::new(OTHER, -8, 8, false)));
        let moved = window.moved(STACK.base, Some(-8)).unwrap();
        assert_eq!((moved.low, moved.high), (-8, 8), "the register is lower, what it led to is where it was");
        assert_eq!(window.moved(STACK.base, None), None);
        assert_eq!(window.moved(OTHER.base, None), Some(window));
    }
}
