//! xen0 and its store.

use std::sync::Arc;

use abi::xen::hvm::STORE_PAGE;
use pvbus::xen::XenStore;
use pvbus::{Event, Hal, Kind, Store, StoreError, Tree};
use vm_memory::{Bytes, GuestAddress};

use super::{HOME, Interrupts, Rig, SECOND};

const RSP_CONS: u64 = STORE_PAGE + 2056;
const RSP_PROD: u64 = STORE_PAGE + 2060;
const REQ_CONS: u64 = STORE_PAGE + 2048;

fn store<'h>(tree: &mut Tree<'h>) -> XenStore<'h> {
    tree.xen().unwrap().store()
}

#[test]
fn lines_are_openbsds_and_netbsds() {
    let rig = Rig::new();
    let tree = Tree::attach(&rig.machine);
    let xen0 = "xen0 at pvbus0: features 0x30c, 64 grant table frames, event channel 1";
    assert_eq!(tree.dmesg(), ["pvbus0 at mainbus0: Xen 4.17", xen0, "xenbus0: using event channel 1"]);
    assert_eq!(tree.devices().collect::<Vec<_>>(), [("pvbus0", "mainbus0"), ("xen0", "pvbus0")]);
}

#[test]
fn processor_of_the_other_maker_is_called_by_its_own_instruction() {
    let mut rig = Rig::new();
    rig.machine.vmmcall = true;
    assert!(Tree::attach(&rig.machine).xen().is_some());
}

#[test]
fn keys_go_both_ways_by_relative_and_absolute_paths() {
    let rig = Rig::new();
    let mut tree = Tree::attach(&rig.machine);
    let store = tree.stores().store(Kind::Xen).unwrap();
    store.write(b"data/said", b"by \0 the guest").unwrap();
    assert_eq!(rig.host.read(&format!("{HOME}/data/said")).unwrap(), b"by \0 the guest");
    rig.host.write(&format!("{HOME}/data/a/b"), b"host").unwrap();
    assert_eq!(store.read(b"/local/domain/1/data/a/b/").unwrap(), b"host");
    assert_eq!(store.length(b"data/a/b").unwrap(), 4);
    assert_eq!(store.list(b"data").unwrap(), [b"a".to_vec(), b"said".to_vec()]);
    assert_eq!(store.read_or_list(b"data").unwrap(), b"a\nsaid");
    store.remove(b"data/a").unwrap();
    assert_eq!(store.read(b"data/a/b"), Err(StoreError::NotFound));
    assert_eq!(store.remove(b"data/a"), Err(StoreError::NotFound));
}

#[test]
fn refusals_are_typed() {
    let rig = Rig::new();
    let mut tree = Tree::attach(&rig.machine);
    let mut store = store(&mut tree);
    for (key, error) in [
        ("nowhere", StoreError::NotFound),
        ("data//x", StoreError::BadKey),
        ("data/\u{fc}", StoreError::BadKey),
        ("data/\0", StoreError::BadKey),
        ("/local/domain/0/x", StoreError::Denied),
    ] {
        assert_eq!(store.read(key.as_bytes()), Err(error), "{key:?}");
    }
    assert_eq!(store.write(b"name", b"mine"), Err(StoreError::Denied));
    assert_eq!(store.write(b"data/x", &[1; 4096]), Err(StoreError::TooLong));
    assert_eq!(store.write(b"data/x", &[1; 4000]), Err(StoreError::Full));
}

#[test]
fn messages_longer_than_the_ring_and_directories_longer_than_a_message_come_whole() {
    let rig = Rig::new();
    let mut tree = Tree::attach(&rig.machine);
    let mut store = store(&mut tree);
    store.write(b"data/long", &[7; 1900]).unwrap();
    assert_eq!(store.read(b"data/long").unwrap(), [7; 1900]);
    let names: Vec<Vec<u8>> = (0..600).map(|n| format!("a-name-of-some-length-{n:03}").into_bytes()).collect();
    for name in &names {
        rig.host.write(&format!("{HOME}/many/{}", String::from_utf8_lossy(name)), b"").unwrap();
    }
    assert_eq!(store.list(b"many").unwrap(), names);
}

#[test]
fn watched_key_tells_of_changes_and_costs_nothing_without_any() {
    let rig = Rig::new();
    let mut tree = Tree::attach(&rig.machine);
    let mut store = store(&mut tree);
    let mut watch = store.watch(b"data/x").unwrap();
    rig.poll(&mut tree);
    assert_eq!(store.changed(&mut watch), Ok(None));
    let before = rig.machine.hypercalls();
    assert_eq!(store.changed(&mut watch), Ok(None));
    assert_eq!(rig.machine.hypercalls(), before, "nobody was asked");
    rig.host.write(&format!("{HOME}/data/x"), b"new").unwrap();
    // Whoever takes in the events, be it xen0.
    rig.poll(&mut tree);
    assert_eq!(store.changed(&mut watch), Ok(Some(Some(b"new".to_vec()))));
    rig.host.write(&format!("{HOME}/data/x/below"), b"").unwrap();
    rig.host.write(&format!("{HOME}/data/x"), b"new").unwrap();
    rig.machine.let_others_run();
    assert_eq!(store.changed(&mut watch), Ok(None), "the value is the same");
    rig.host.remove(&format!("{HOME}/data/x")).unwrap();
    rig.machine.let_others_run();
    assert_eq!(store.changed(&mut watch), Ok(Some(None)));
}

#[test]
fn watches_that_end_make_room_for_others() {
    let rig = Rig::new();
    let mut tree = Tree::attach(&rig.machine);
    let mut store = store(&mut tree);
    let mut kept = store.watch(b"data/kept").unwrap();
    for _ in 0..300 {
        let watch = store.watch(b"data/x").unwrap();
        store.unwatch(watch).unwrap();
    }
    rig.host.write(&format!("{HOME}/data/kept"), b"1").unwrap();
    rig.host.write(&format!("{HOME}/data/x"), b"1").unwrap();
    rig.machine.let_others_run();
    assert_eq!(store.changed(&mut kept), Ok(Some(Some(b"1".to_vec()))));
    assert_eq!(store.watch(b"data//x"), Err(StoreError::BadKey));
}

#[test]
fn transaction_that_others_are_in_the_way_of_is_repeated() {
    let rig = Rig::new();
    let tree = Tree::attach(&rig.machine);
    let mut store = tree.xen().unwrap().store();
    rig.host.write(&format!("{HOME}/data/count"), b"1").unwrap();
    let mut rounds = 0;
    let before = store.transaction(|transaction| {
        rounds += 1;
        let count = transaction.read(b"data/count")?;
        if rounds < 3 {
            rig.host.write(&format!("{HOME}/data/count"), format!("{}", rounds + 1).as_bytes()).unwrap();
        }
        transaction.write(b"data/seen", &count)?;
        Ok(count)
    });
    assert_eq!((before.unwrap(), rounds), (b"3".to_vec(), 3));
    assert_eq!(rig.host.read(&format!("{HOME}/data/seen")).unwrap(), b"3");

    let never = store.transaction(|transaction| {
        let count = transaction.read(b"data/count")?;
        rounds += 1;
        rig.host.write(&format!("{HOME}/data/count"), rounds.to_string().as_bytes()).unwrap();
        transaction.write(b"data/seen", &count)
    });
    assert_eq!(never, Err(StoreError::Refused("EAGAIN".into())));
    let failed: Result<(), _> = store.transaction(|transaction| {
        transaction.write(b"data/half", b"x")?;
        Err(StoreError::BadKey)
    });
    assert_eq!(failed, Err(StoreError::BadKey));
    assert_eq!(store.read(b"data/half"), Err(StoreError::NotFound), "undone");
}

#[test]
fn hosts_wishes_are_acknowledged_and_handed_on() {
    let rig = Rig::new();
    let mut tree = Tree::attach(&rig.machine);
    assert_eq!(rig.host.read(&format!("{HOME}/control/feature-poweroff")).unwrap(), b"1");
    assert_eq!(rig.poll(&mut tree), [], "an empty wish is none");
    let asked = "xen0: the host asks for \"suspend\", which is not obeyed".to_string();
    for (wish, event) in [
        ("poweroff", Event::Shutdown(Kind::Xen)),
        ("halt", Event::Shutdown(Kind::Xen)),
        ("reboot", Event::Reboot(Kind::Xen)),
        ("suspend", Event::Message(asked)),
    ] {
        rig.host.write(&format!("{HOME}/control/shutdown"), wish.as_bytes()).unwrap();
        assert_eq!(rig.poll(&mut tree), [event], "{wish}");
        assert_eq!(rig.host.read(&format!("{HOME}/control/shutdown")).unwrap(), b"");
    }
}

#[test]
fn kernel_with_a_vector_is_called_and_one_without_is_not() {
    const VECTOR: u8 = 0x31;
    for vector in [Some(VECTOR), None] {
        let mut rig = Rig::new();
        rig.machine.upcall_vector = vector;
        let interrupts = Arc::new(Interrupts::default());
        rig.xen.connect(interrupts.clone(), interrupts.clone());
        let mut tree = Tree::attach(&rig.machine);
        rig.poll(&mut tree);
        for _ in 0..3 {
            interrupts.0.lock().unwrap().clear();
            rig.host.write(&format!("{HOME}/control/shutdown"), b"poweroff").unwrap();
            rig.machine.let_others_run();
            let called = interrupts.0.lock().unwrap().first().copied();
            assert_eq!(called, vector.map(u32::from));
            assert_eq!(tree.on_upcall(rig.machine.now()).events, [Event::Shutdown(Kind::Xen)]);
            rig.poll(&mut tree);
        }
    }
}

#[test]
fn domain_without_a_store_has_no_xen0() {
    let rig = Rig::storeless();
    let mut tree = Tree::attach(&rig.machine);
    assert_eq!(tree.dmesg()[1], "xen0 at pvbus0: not attached: the host offers no XenStore");
    assert!(tree.stores().store(Kind::Xen).is_none());
}

#[test]
fn store_that_says_nothing_is_waited_for_once() {
    let rig = Rig::silent();
    let tree = Tree::attach(&rig.machine);
    assert_eq!(tree.dmesg()[1], "xen0 at pvbus0: not attached: the host offers no XenStore");
    assert!(rig.machine.now() <= 6 * SECOND, "{}", rig.machine.now());
}

#[test]
fn late_answer_is_nobodys() {
    let rig = Rig::new();
    let mut tree = Tree::attach(&rig.machine);
    let mut store = store(&mut tree);
    rig.host.write(&format!("{HOME}/data/x"), b"x").unwrap();
    // The server's index says that all space is taken, so that the request cannot be sent, until it says the truth again.
    let cons: u32 = rig.machine.memory.read_obj(GuestAddress(REQ_CONS)).unwrap();
    rig.machine.pause_others(true);
    let before = rig.machine.now();
    assert_eq!(store.read(b"name"), Err(StoreError::Timeout));
    assert_eq!(store.read(b"data/x"), Err(StoreError::Timeout));
    assert!(rig.machine.now() - before < 6 * SECOND, "the second is not waited for");
    assert_eq!(rig.machine.memory.read_obj::<u32>(GuestAddress(REQ_CONS)).unwrap(), cons);
    rig.machine.pause_others(false);
    rig.machine.let_others_run();
    assert_eq!(store.read(b"data/x").unwrap(), b"x");
    assert_eq!(store.read(b"name").unwrap(), b"1");
}

#[test]
fn indices_that_lie_end_the_conversation() {
    for (index, far) in [(RSP_PROD, 1025), (RSP_CONS, 5000), (REQ_CONS, 7)] {
        let rig = Rig::new();
        let mut tree = Tree::attach(&rig.machine);
        rig.poll(&mut tree);
        rig.machine.pause_others(true);
        let true_index: u32 = rig.machine.memory.read_obj(GuestAddress(index)).unwrap();
        rig.machine.memory.write_obj(true_index.wrapping_add(far), GuestAddress(index)).unwrap();
        assert!(matches!(tree.stores().store(Kind::Xen).unwrap().read(b"name"), Err(StoreError::Transport(_))), "{index:#x}");
        if index != REQ_CONS {
            let polled = tree.poll(rig.machine.now());
            assert_eq!(polled.events, [Event::Message("xen0: XenStore: the way to the host failed: XenStore's ring is broken".into())]);
            assert_eq!(polled.next, None, "given up");
        }
    }
}

#[test]
fn answers_that_make_no_sense_are_errors() {
    let header = |op: u32, id: u32, len: u32| [op, id, 0, len].map(u32::to_le_bytes).concat();
    let rig = Rig::new();
    let mut tree = Tree::attach(&rig.machine);
    rig.poll(&mut tree);
    rig.machine.pause_others(true);
    let mut store = store(&mut tree);
    // Longer than the protocol allows; everything else waits for the rest of a message, or for the right one.
    let prod: u32 = rig.machine.memory.read_obj(GuestAddress(RSP_PROD)).unwrap();
    for (at, byte) in header(2, 0, 4097).into_iter().enumerate() {
        let slot = STORE_PAGE + 1024 + u64::from(prod.wrapping_add(at as u32) % 1024);
        rig.machine.memory.write_obj(byte, GuestAddress(slot)).unwrap();
    }
    rig.machine.memory.write_obj(prod.wrapping_add(16), GuestAddress(RSP_PROD)).unwrap();
    assert_eq!(store.read(b"name"), Err(StoreError::Transport("XenStore sent a message longer than its protocol allows")));
}
