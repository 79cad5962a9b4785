//! Every error of pvbus(4)'s ioctls by name, and the order in which they are checked.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;

use abi::pvbus::{KVOP_MAXSIZE, KVREAD, KVTYPE, KVWRITE, PvbusReq};
use proptest::prelude::*;
use pvbus::{BadAddress, Errno, Kind, Store, StoreError, Stores, UserMemory};

/// A store of a few keys. Keys that begin with `fail-` fail with that error.
struct Keys(BTreeMap<Vec<u8>, Vec<u8>>);

impl Store for Keys {
    fn kind(&self) -> Kind {
        Kind::Vmware
    }

    fn read(&mut self, key: &[u8]) -> Result<Vec<u8>, StoreError> {
        if let Some(error) = failure(key) {
            return Err(error);
        }
        self.0.get(key).cloned().ok_or(StoreError::NotFound)
    }

    fn write(&mut self, key: &[u8], value: &[u8]) -> Result<(), StoreError> {
        if let Some(error) = failure(key) {
            return Err(error);
        }
        self.0.insert(key.to_vec(), value.to_vec());
        Ok(())
    }
}

fn failure(key: &[u8]) -> Option<StoreError> {
    let failures = [
        ("fail-badkey", StoreError::BadKey),
        ("fail-exists", StoreError::Exists),
        ("fail-denied", StoreError::Denied),
        ("fail-toolong", StoreError::TooLong),
        ("fail-unsupported", StoreError::Unsupported),
        ("fail-full", StoreError::Full),
        ("fail-refused", StoreError::Refused(String::new())),
        ("fail-timeout", StoreError::Timeout),
        ("fail-nomemory", StoreError::NoMemory),
        ("fail-transport", StoreError::Transport("")),
    ];
    failures.into_iter().find(|(name, _)| name.as_bytes() == key).map(|(_, error)| error)
}

/// Memory of a process from [`START`] on; nothing is before and behind it.
struct Process(Vec<u8>);

const START: u64 = 0x7000_0000;
/// Where tests have their key, and where their value.
const KEY: u64 = START;
const VALUE: u64 = START + 0x2_0000;
const SIZE: usize = 0x4_0000;

impl Process {
    fn new() -> Process {
        Process(vec![0xee; SIZE])
    }

    fn with(mut self, at: u64, bytes: &[u8]) -> Process {
        self.write(at, bytes).unwrap();
        self
    }

    fn text(&self, at: u64) -> &[u8] {
        let from = &self.0[(at - START) as usize..];
        &from[..from.iter().position(|byte| *byte == 0).unwrap()]
    }

    fn range(&self, address: u64, length: usize) -> Result<std::ops::Range<usize>, BadAddress> {
        let start = usize::try_from(address.checked_sub(START).ok_or(BadAddress)?).map_err(|_| BadAddress)?;
        let end = start.checked_add(length).filter(|end| *end <= self.0.len()).ok_or(BadAddress)?;
        Ok(start..end)
    }
}

impl UserMemory for Process {
    fn read(&mut self, address: u64, bytes: &mut [u8]) -> Result<(), BadAddress> {
        bytes.copy_from_slice(&self.0[self.range(address, bytes.len())?]);
        Ok(())
    }

    fn write(&mut self, address: u64, bytes: &[u8]) -> Result<(), BadAddress> {
        let range = self.range(address, bytes.len())?;
        self.0[range].copy_from_slice(bytes);
        Ok(())
    }
}

/// KVM without a store is minor 0, VMware with one minor 1.
fn stores() -> Stores<'static> {
    let mut stores = Stores::new();
    stores.add(Kind::Kvm, None);
    let keys = BTreeMap::from([(b"guestinfo.a".to_vec(), b"some value".to_vec()), (b"binary".to_vec(), b"ab\0cd".to_vec())]);
    stores.add(Kind::Vmware, Some(Box::new(Keys(keys))));
    stores
}

fn request(keylen: u64, valuelen: u64) -> PvbusReq {
    PvbusReq { keylen: keylen.into(), key: KEY.into(), valuelen: valuelen.into(), value: VALUE.into() }
}

/// One ioctl on VMware's device by a process that may write.
fn vmware(command: u32, request: PvbusReq, process: &mut Process) -> Result<(), Errno> {
    stores().ioctl(1, command, true, &request, process)
}

fn with_key(key: &[u8]) -> Process {
    Process::new().with(KEY, key)
}

#[test]
fn kvread_returns_the_value_with_its_nul_and_touches_nothing_else() {
    let mut process = with_key(b"guestinfo.a\0");
    assert_eq!(vmware(KVREAD, request(4096, 4096), &mut process), Ok(()));
    assert_eq!(process.text(VALUE), b"some value");
    assert_eq!(process.0[(VALUE - START) as usize + 11], 0xee);
}

#[test]
fn kvread_into_a_buffer_that_fits_exactly_works() {
    let mut process = with_key(b"guestinfo.a\0");
    assert_eq!(vmware(KVREAD, request(12, 11), &mut process), Ok(()));
}

#[test]
fn short_buffer_gives_erange() {
    let mut process = with_key(b"guestinfo.a\0");
    assert_eq!(vmware(KVREAD, request(12, 10), &mut process), Err(Errno::ERANGE));
    assert_eq!(process.0[(VALUE - START) as usize], 0xee);
}

#[test]
fn binary_value_ends_at_its_first_nul() {
    let mut process = with_key(b"binary\0");
    assert_eq!(vmware(KVREAD, request(64, 3), &mut process), Ok(()));
    assert_eq!(process.text(VALUE), b"ab");
}

#[test]
fn missing_key_gives_enoent() {
    assert_eq!(vmware(KVREAD, request(64, 64), &mut with_key(b"guestinfo.none\0")), Err(Errno::ENOENT));
}

#[test]
fn kvwrite_stores_up_to_the_nul_and_leaves_an_empty_value() {
    let (mut stores, mut process) = (stores(), with_key(b"guestinfo.b\0").with(VALUE, b"new\0rest"));
    assert_eq!(stores.ioctl(1, KVWRITE, true, &request(64, 64), &mut process), Ok(()));
    assert_eq!(process.text(VALUE), b"");
    assert_eq!(stores.store(Kind::Vmware).unwrap().read(b"guestinfo.b").unwrap(), b"new");
}

#[test]
fn value_without_nul_is_as_long_as_its_buffer() {
    let (mut stores, mut process) = (stores(), with_key(b"guestinfo.b").with(VALUE, b"abcdef"));
    assert_eq!(stores.ioctl(1, KVWRITE, true, &request(11, 3), &mut process), Ok(()));
    assert_eq!(stores.store(Kind::Vmware).unwrap().read(b"guestinfo.b").unwrap(), b"abc");
    assert_eq!(&process.0[(VALUE - START) as usize..][..6], b"\0bcdef", "nothing behind the buffer is written");
}

#[test]
fn kvwrite_without_write_mode_gives_eperm() {
    let mut process = with_key(b"guestinfo.a\0").with(VALUE, b"x\0");
    assert_eq!(stores().ioctl(1, KVWRITE, false, &request(64, 64), &mut process), Err(Errno::EPERM));
}

#[test]
fn eperm_comes_before_the_missing_store() {
    assert_eq!(stores().ioctl(0, KVWRITE, false, &request(64, 64), &mut Process::new()), Err(Errno::EPERM));
}

#[test]
fn interface_without_a_store_gives_enxio() {
    for command in [KVREAD, KVWRITE] {
        assert_eq!(stores().ioctl(0, command, true, &request(0, 0), &mut Process::new()), Err(Errno::ENXIO));
    }
}

#[test]
fn no_interface_gives_enodev() {
    assert_eq!(Stores::new().open(0), Err(Errno::ENODEV));
    assert_eq!(Stores::new().ioctl(0, KVTYPE, true, &request(64, 64), &mut Process::new()), Err(Errno::ENODEV));
}

#[test]
fn minor_of_no_interface_gives_enxio() {
    assert_eq!((stores().open(1), stores().open(2)), (Ok(()), Err(Errno::ENXIO)));
    assert_eq!(stores().ioctl(2, KVTYPE, true, &request(64, 64), &mut Process::new()), Err(Errno::ENXIO));
}

#[test]
fn unknown_command_gives_enotty() {
    // Number 0 and 4 of the group, a Linux command, and KVREAD with another size.
    for command in [0xc020_5600, 0xc020_5604, 0x5401, 0xc010_5601] {
        assert_eq!(vmware(command, request(64, 64), &mut Process::new()), Err(Errno::ENOTTY));
        assert_eq!(stores().ioctl(0, command, false, &request(64, 64), &mut Process::new()), Err(Errno::ENOTTY));
    }
}

#[test]
fn type_needs_neither_store_nor_write_mode() {
    let mut process = Process::new();
    assert_eq!(stores().ioctl(0, KVTYPE, false, &request(4, 0), &mut process), Ok(()));
    assert_eq!(process.text(KEY), b"KVM");
}

#[test]
fn type_into_a_short_key_buffer_gives_enomem() {
    for keylen in [0, 1, 6] {
        assert_eq!(vmware(KVTYPE, request(keylen, 64), &mut Process::new()), Err(Errno::ENOMEM));
    }
    assert_eq!(vmware(KVTYPE, request(7, 64), &mut Process::new()), Ok(()));
}

#[test]
fn bad_pointers_give_efault() {
    let at = |key: u64, value: u64| PvbusReq { keylen: 64.into(), key: key.into(), valuelen: 64.into(), value: value.into() };
    let key = b"guestinfo.a\0";
    for bad in [0, START - 1, START + SIZE as u64, u64::MAX, u64::MAX - 3] {
        assert_eq!(vmware(KVREAD, at(bad, VALUE), &mut with_key(key)), Err(Errno::EFAULT));
        assert_eq!(vmware(KVREAD, at(KEY, bad), &mut with_key(key)), Err(Errno::EFAULT));
        assert_eq!(vmware(KVWRITE, at(KEY, bad), &mut with_key(key)), Err(Errno::EFAULT));
        assert_eq!(vmware(KVTYPE, at(bad, VALUE), &mut with_key(key)), Err(Errno::EFAULT));
    }
}

#[test]
fn zero_lengths_give_einval() {
    for command in [KVREAD, KVWRITE] {
        assert_eq!(vmware(command, request(0, 64), &mut with_key(b"guestinfo.a\0")), Err(Errno::EINVAL));
        assert_eq!(vmware(command, request(64, 0), &mut with_key(b"guestinfo.a\0")), Err(Errno::EINVAL));
    }
}

#[test]
fn lengths_beyond_64_kib_give_enametoolong() {
    let max = KVOP_MAXSIZE as u64;
    for command in [KVREAD, KVWRITE] {
        for long in [max + 1, u64::MAX] {
            let mut process = with_key(b"guestinfo.a\0").with(VALUE, b"x\0");
            assert_eq!(vmware(command, request(long, 64), &mut process), Err(Errno::ENAMETOOLONG));
            assert_eq!(vmware(command, request(64, long), &mut process), Err(Errno::ENAMETOOLONG));
        }
        assert_eq!(vmware(command, request(max, max), &mut with_key(b"guestinfo.a\0").with(VALUE, b"x\0")), Ok(()));
    }
}

#[test]
fn key_is_checked_before_the_value() {
    let key_first = PvbusReq { keylen: 64.into(), key: 0.into(), valuelen: 0.into(), value: 0.into() };
    assert_eq!(vmware(KVREAD, key_first, &mut Process::new()), Err(Errno::EFAULT));
}

#[test]
fn key_needs_to_be_readable_up_to_its_nul_only() {
    let end = START + SIZE as u64 - 12;
    let mut process = Process::new().with(end, b"guestinfo.a\0");
    let request = PvbusReq { keylen: 4096.into(), key: end.into(), valuelen: 64.into(), value: VALUE.into() };
    assert_eq!(vmware(KVREAD, request, &mut process), Ok(()));
}

#[test]
fn strings_across_pages_are_read_whole() {
    // Keys that end just before, at and behind the end of a page, and a value of many pages.
    for before in 1..14 {
        let at = START + 4096 - before;
        let long = vec![b'v'; KVOP_MAXSIZE - 1];
        let (mut stores, mut process) =
            (stores(), Process::new().with(at, b"guestinfo.b\0").with(VALUE + 1, &long).with(VALUE + 65536, b"\0"));
        let request = PvbusReq { keylen: 64.into(), key: at.into(), valuelen: (KVOP_MAXSIZE as u64).into(), value: (VALUE + 1).into() };
        assert_eq!(stores.ioctl(1, KVWRITE, true, &request, &mut process), Ok(()));
        assert_eq!(stores.store(Kind::Vmware).unwrap().read(b"guestinfo.b").unwrap(), long, "{before}");
    }
}

#[test]
fn errors_of_a_store_have_their_numbers() {
    let expected = [
        ("badkey", Errno::EINVAL),
        ("exists", Errno::EEXIST),
        ("denied", Errno::EACCES),
        ("toolong", Errno::EMSGSIZE),
        ("unsupported", Errno::EOPNOTSUPP),
        ("full", Errno::ENOSPC),
        ("refused", Errno::EINVAL),
        ("timeout", Errno::ETIMEDOUT),
        ("nomemory", Errno::ENOMEM),
        ("transport", Errno::EIO),
    ];
    for (name, errno) in expected {
        let key = format!("fail-{name}\0");
        assert_eq!(vmware(KVREAD, request(64, 64), &mut with_key(key.as_bytes())), Err(errno), "{name}");
        assert_eq!(vmware(KVWRITE, request(64, 64), &mut with_key(key.as_bytes()).with(VALUE, b"x\0")), Err(errno), "{name}");
    }
}

#[test]
fn numbers_of_errors_are_those_of_each_system() {
    assert_eq!((Errno::ENAMETOOLONG.openbsd(), Errno::ENAMETOOLONG.linux()), (63, 36));
    assert_eq!((Errno::EOPNOTSUPP.openbsd(), Errno::EOPNOTSUPP.linux()), (45, 95));
    assert_eq!((Errno::ERANGE.openbsd(), Errno::ERANGE.linux()), (34, 34));
}

proptest! {
    #[test]
    fn no_request_panics_or_writes_outside_its_buffers(
        command in prop::sample::select(vec![KVREAD, KVWRITE, KVTYPE, 0]),
        keylen in prop_oneof![0u64..100, any::<u64>()], valuelen in prop_oneof![0u64..100, any::<u64>()],
        key in prop_oneof![KEY..KEY + 10, any::<u64>()], value in prop_oneof![VALUE..VALUE + 10, any::<u64>()],
        minor in 0usize..4, writable in any::<bool>(),
    ) {
        let mut process = with_key(b"guestinfo.a\0").with(VALUE, b"value\0");
        let before = process.0.clone();
        let request = PvbusReq { keylen: keylen.into(), key: key.into(), valuelen: valuelen.into(), value: value.into() };
        let _ = stores().ioctl(minor, command, writable, &request, &mut process);
        let (buffer, length) = if command == KVTYPE { (key, keylen) } else { (value, valuelen) };
        for (at, _) in before.iter().zip(&process.0).enumerate().filter(|(_, (old, new))| old != new) {
            let at = START + at as u64;
            prop_assert!(at >= buffer && at - buffer < length);
        }
    }
}
