use super::*;

#[test]
fn page_is_marked_while_it_is_in_use() {
    let guest = Guest::running();
    let page = guest.page();
    let grant = guest.grant(page, 0);
    assert_eq!(guest.xen.map(grant, Access::Write), Ok(page));
    assert_eq!(guest.xen.map(grant, Access::Read), Ok(page));
    assert_eq!(guest.flags(grant), flag::PERMIT_ACCESS | flag::READING | flag::WRITING);
    guest.xen.unmap(grant, Access::Write);
    assert_eq!(guest.flags(grant), flag::PERMIT_ACCESS | flag::READING);
    guest.xen.unmap(grant, Access::Read);
    assert_eq!(guest.flags(grant), flag::PERMIT_ACCESS);
    guest.xen.unmap(grant, Access::Read);
}

#[test]
fn what_is_not_granted_is_not_given() {
    let guest = Guest::running();
    let page = guest.page();
    let readonly = guest.grant(page, flag::READONLY);
    assert_eq!(guest.xen.map(readonly, Access::Write), Err(GrantError::ReadOnly(readonly)));
    assert_eq!(guest.flags(readonly), flag::PERMIT_ACCESS | flag::READONLY, "no mark stays");
    let other = guest.grant(page, 0);
    guest.set_grant(other, Entry { flags: flag::PERMIT_ACCESS.into(), domid: 3.into(), frame: 0.into() });
    assert_eq!(guest.xen.map(other, Access::Read), Err(GrantError::NotGranted(other)));
    assert_eq!(guest.xen.map(500, Access::Read), Err(GrantError::NotGranted(500)));
    for grant in [512, 64 * 512, u32::MAX] {
        assert_eq!(guest.xen.map(grant, Access::Read), Err(GrantError::BadReference(grant)));
    }
}

#[test]
fn page_outside_memory_is_refused_and_not_marked() {
    let guest = Guest::running();
    let grant = guest.grant(RAM, 0);
    assert_eq!(guest.xen.map(grant, Access::Write), Err(GrantError::BadFrame(grant)));
    assert_eq!(guest.flags(grant), flag::PERMIT_ACCESS);
    let last = guest.grant(u64::from(u32::MAX) * PAGE_SIZE, 0);
    assert_eq!(guest.xen.map(last, Access::Read), Err(GrantError::BadFrame(last)));
}

#[test]
fn frame_moves_with_its_grants() {
    let guest = Guest::running();
    let page = guest.page();
    let grant = guest.grant(page, 0);
    assert_eq!(guest.place(memory::SPACE_GRANT_TABLE, 0, 0x5000), 0);
    guest.set_grant(grant, Entry::default());
    assert_eq!(guest.xen.map(grant, Access::Read), Ok(page), "the old page is a page like any other");
}
