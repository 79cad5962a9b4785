//! Grants that stay mapped between requests.

use super::super::super::block::MOST_KEPT;
use super::*;

/// What an entry says of a page that a backend keeps.
const KEPT: u16 = flag::PERMIT_ACCESS | flag::READING | flag::WRITING;

impl Rig {
    /// Connected with a frontend that names the same grants again and again.
    fn persistent() -> Rig {
        let mut rig = Rig::with(false, true);
        rig.tree.set(&format!("{FRONT}/feature-persistent"), 1);
        rig.connect();
        rig
    }

    fn read(&mut self, sector: u64, segment: Segment) -> i16 {
        self.ask(request(op::READ, sector, &[segment]).as_bytes())
    }

    fn byte(&self, gpa: u64) -> u8 {
        self.guest.memory.read_obj(GuestAddress(gpa)).unwrap()
    }
}

#[test]
fn page_stays_in_use_until_the_frontend_closes_if_it_has_said_so() {
    let mut silent = Rig::with(false, true);
    silent.connect();
    for (mut rig, after) in [(Rig::persistent(), KEPT), (silent, flag::PERMIT_ACCESS)] {
        assert_eq!(rig.tree.get(&format!("{BACK}/feature-persistent")), "1");
        let page = rig.guest.page();
        let segment = rig.segment(page, 0, 0);
        for sector in [3, 4] {
            assert_eq!(rig.read(sector, segment), status::OKAY);
            assert_eq!((u64::from(rig.byte(page)), rig.guest.flags(segment.gref.get())), (sector, after));
        }
        rig.says(state::CLOSING);
        assert_eq!(rig.guest.flags(segment.gref.get()), flag::PERMIT_ACCESS);
    }
}

#[test]
fn page_that_was_read_from_can_be_written_to() {
    let mut rig = Rig::persistent();
    let page = rig.guest.page();
    let segment = rig.segment(page, 0, 0);
    assert_eq!(rig.ask(request(op::WRITE, 9, &[segment]).as_bytes()), status::OKAY);
    assert_eq!(rig.disk.bytes.lock().unwrap()[9 * 512], 0);
    assert_eq!(rig.read(8, segment), status::OKAY);
    assert_eq!(rig.byte(page), 8);
}

#[test]
fn grant_for_reading_only_is_read_from_and_not_kept() {
    let mut rig = Rig::persistent();
    let readonly = flag::PERMIT_ACCESS | flag::READONLY;
    let segment = Segment { gref: rig.guest.grant(rig.guest.page(), flag::READONLY).into(), ..rig.segment(0, 0, 0) };
    assert_eq!(rig.ask(request(op::WRITE, 9, &[segment]).as_bytes()), status::OKAY);
    assert_eq!(rig.guest.flags(segment.gref.get()), readonly);
    assert_eq!(rig.read(9, segment), status::ERROR);
    assert_eq!(rig.guest.flags(segment.gref.get()), readonly);
}

#[test]
fn grant_that_is_revoked_or_changed_while_it_is_kept_is_what_it_was() {
    for to_other_page in [false, true] {
        let mut rig = Rig::persistent();
        let (page, other) = (rig.guest.page(), rig.guest.page());
        let segment = rig.segment(page, 0, 0);
        assert_eq!(rig.read(3, segment), status::OKAY);
        let new = Entry { flags: flag::PERMIT_ACCESS.into(), domid: 0.into(), frame: ((other / PAGE_SIZE) as u32).into() };
        let new = if to_other_page { new } else { Entry::default() };
        rig.guest.set_grant(segment.gref.get(), new);
        assert_eq!(rig.read(4, segment), status::OKAY);
        assert_eq!((rig.byte(page), rig.byte(other)), (4, 0));
        rig.says(state::CLOSING);
        assert_eq!(rig.guest.flags(segment.gref.get()), new.flags.get());
    }
}

#[test]
fn references_that_name_nothing_are_errors_each_time() {
    let mut rig = Rig::persistent();
    // Not granted, beyond what is placed, beyond what can be.
    for gref in [400, 512, 64 * 512, u32::MAX] {
        for _ in 0..2 {
            assert_eq!(rig.read(0, Segment { gref: gref.into(), ..rig.segment(0, 0, 0) }), status::ERROR, "{gref}");
        }
    }
}

#[test]
fn more_references_than_are_kept_cost_the_least_recently_used_their_place() {
    let mut rig = Rig::persistent();
    for frame in 1..3 {
        assert_eq!(rig.guest.place(memory::SPACE_GRANT_TABLE, frame, GRANT_TABLE + frame * PAGE_SIZE), 0);
    }
    let page = rig.guest.page();
    let segments: Vec<Segment> = (0..=MOST_KEPT).map(|_| rig.segment(page, 0, 0)).collect();
    let is_kept = |rig: &Rig, segment: &Segment| rig.guest.flags(segment.gref.get()) == KEPT;
    for segment in segments.iter().take(MOST_KEPT).chain(&segments[..1]) {
        assert_eq!(rig.read(1, *segment), status::OKAY);
    }
    assert!(segments.iter().take(MOST_KEPT).all(|segment| is_kept(&rig, segment)));
    assert_eq!(rig.read(1, segments[MOST_KEPT]), status::OKAY);
    let kept: Vec<bool> = segments.iter().map(|segment| is_kept(&rig, segment)).collect();
    assert_eq!((kept[0], kept[1], kept[MOST_KEPT]), (true, false, true));
    let count = kept.iter().filter(|kept| **kept).count();
    assert!((MOST_KEPT * 9 / 10..MOST_KEPT).contains(&count), "{count}");
    // One that had to go comes again.
    assert_eq!(rig.read(2, segments[1]), status::OKAY);
    assert_eq!((rig.byte(page), is_kept(&rig, &segments[1])), (2, true));
    rig.says(state::CLOSED);
    assert!(segments.iter().all(|segment| rig.guest.flags(segment.gref.get()) == flag::PERMIT_ACCESS));
}
