//! The device with a kernel made up: it copies a caller's memory as Linux' `fuse_do_ioctl` does (`fs/fuse/ioctl.c`).

use std::collections::BTreeMap;

use pvbus::{Kind, Store, StoreError};

use super::*;

/// Rounds that an ioctl may take: more than a key of 64 KiB needs.
const MAX_ROUNDS: usize = 40;

/// A store in memory that counts what is written.
#[derive(Default)]
struct Keys {
    keys: BTreeMap<Vec<u8>, Vec<u8>>,
    writes: usize,
}

impl Store for Keys {
    fn kind(&self) -> Kind {
        Kind::Xen
    }

    fn read(&mut self, key: &[u8]) -> Result<Vec<u8>, StoreError> {
        match key {
            b"writes" => Ok(self.writes.to_string().into_bytes()),
            key => self.keys.get(key).cloned().ok_or(StoreError::NotFound),
        }
    }

    fn write(&mut self, key: &[u8], value: &[u8]) -> Result<(), StoreError> {
        self.writes += 1;
        self.keys.insert(key.into(), value.into());
        Ok(())
    }
}

/// A process: memory by address, and what the kernel does for it.
struct Caller<'a> {
    memory: BTreeMap<u64, Vec<u8>>,
    stores: Stores<'a>,
    device: Device,
}

impl<'a> Caller<'a> {
    fn new() -> Caller<'a> {
        let mut stores = Stores::new();
        stores.add(Kind::Kvm, None);
        stores.add(Kind::Xen, Some(Box::new(Keys::default())));
        Caller { memory: BTreeMap::new(), stores, device: Device::new(1, 0) }
    }

    /// An answer's error number and body.
    fn ask(&mut self, opcode: u32, body: &[u8]) -> (i32, Vec<u8>) {
        let header = InHeader { opcode: opcode.into(), unique: 9.into(), ..InHeader::new_zeroed() };
        let answer = self.device.on(&[header.as_bytes(), body].concat(), &mut self.stores).unwrap();
        let (header, body) = OutHeader::read_from_prefix(&answer).unwrap();
        assert_eq!((header.unique.get(), header.len.get() as usize), (9, answer.len()));
        (-header.error.get(), body.to_vec())
    }

    fn open(&mut self, flags: u32) -> Result<u64, i32> {
        match self.ask(OPEN, OpenIn { flags: flags.into(), open_flags: 0.into() }.as_bytes()) {
            (0, body) => Ok(OpenOut::read_from_bytes(&body).unwrap().fh.get()),
            (errno, _) => Err(errno),
        }
    }

    /// The byte range in memory.
    fn at(&mut self, piece: &IoctlIovec) -> Option<&mut [u8]> {
        let (base, len) = (piece.base.get(), piece.len.get() as usize);
        let (start, region) = self.memory.range_mut(..=base).next_back()?;
        let offset = (base - start) as usize;
        region.get_mut(offset..offset + len)
    }

    /// ioctl(2): error number and rounds.
    fn ioctl(&mut self, fh: u64, command: u32, arg: u64) -> (i32, usize) {
        let (mut pieces, mut rooms): (Vec<IoctlIovec>, Vec<IoctlIovec>) = (Vec::new(), Vec::new());
        for round in 1..MAX_ROUNDS {
            let mut copied = Vec::new();
            for piece in pieces.clone() {
                let Some(bytes) = self.at(&piece) else { return (Errno::EFAULT.linux(), round) };
                copied.extend_from_slice(bytes);
            }
            let ioctl = IoctlIn {
                fh: fh.into(),
                flags: 0.into(),
                cmd: command.into(),
                arg: arg.into(),
                in_size: (copied.len() as u32).into(),
                out_size: (rooms.iter().map(|room| room.len.get() as u32).sum::<u32>()).into(),
            };
            let (errno, body) = self.ask(IOCTL, &[ioctl.as_bytes(), &copied].concat());
            if errno != 0 {
                return (errno, round);
            }
            let (answer, rest) = IoctlOut::read_from_prefix(&body).unwrap();
            if answer.flags.get() & IOCTL_RETRY == 0 {
                assert!(rooms.len() <= 1 || rest.is_empty());
                if let (Some(room), false) = (rooms.first(), rest.is_empty()) {
                    let Some(bytes) = self.at(&IoctlIovec { len: (rest.len() as u64).into(), ..*room }) else {
                        return (Errno::EFAULT.linux(), round);
                    };
                    bytes.copy_from_slice(rest);
                }
                return (answer.result.get(), round);
            }
            let all: Vec<IoctlIovec> = rest.chunks_exact(16).map(|piece| IoctlIovec::read_from_bytes(piece).unwrap()).collect();
            let (first, second) = all.split_at(answer.in_iovs.get() as usize);
            assert_eq!(second.len(), answer.out_iovs.get() as usize);
            (pieces, rooms) = (first.to_vec(), second.to_vec());
        }
        panic!("more than {MAX_ROUNDS} rounds");
    }

    /// Puts key and value buffers and the request that points to them into memory.
    fn request(&mut self, key: (u64, &[u8]), value: (u64, &[u8])) -> u64 {
        let request = PvbusReq {
            keylen: (key.1.len() as u64).into(),
            key: key.0.into(),
            valuelen: (value.1.len() as u64).into(),
            value: value.0.into(),
        };
        self.memory = BTreeMap::from([(0x100, request.as_bytes().to_vec()), (key.0, key.1.to_vec()), (value.0, value.1.to_vec())]);
        0x100
    }

    fn string(&self, address: u64) -> &[u8] {
        self.memory[&address].split(|&byte| byte == 0).next().unwrap()
    }
}

const O_RDONLY: u32 = 0;
const O_RDWR: u32 = 2;

#[test]
fn first_request_is_answered_with_the_device_s_name_and_number() {
    let mut caller = Caller::new();
    let init = CuseInitIn { major: 7.into(), minor: 37.into(), unused: 0.into(), flags: 1.into() };
    let (errno, body) = caller.ask(CUSE_INIT, init.as_bytes());
    let (answer, name) = CuseInitOut::read_from_prefix(&body).unwrap();
    assert_eq!((errno, name), (0, b"DEVNAME=pvbus1\0".as_slice()));
    assert_eq!((answer.dev_minor.get(), answer.flags.get()), (1, CUSE_UNRESTRICTED_IOCTL));
    // Without pointers there is no pvbus.
    let init = CuseInitIn { flags: 0.into(), ..init };
    assert_eq!(caller.ask(CUSE_INIT, init.as_bytes()).0, Errno::EOPNOTSUPP.linux());
}

#[test]
fn value_that_is_written_is_read_back() {
    let mut caller = Caller::new();
    let file = caller.open(O_RDWR).unwrap();
    let arg = caller.request((0x1000, b"data/k\0"), (0x2000, b"value\0"));
    assert_eq!(caller.ioctl(file, KVWRITE, arg).0, 0);
    assert_eq!(caller.string(0x2000), b"", "what OpenBSD's stores leave after writing");
    let arg = caller.request((0x1000, b"data/k\0"), (0x2000, &[7; 4096]));
    assert_eq!(caller.ioctl(file, KVREAD, arg), (0, 3));
    assert_eq!(caller.string(0x2000), b"value");
    assert_eq!(caller.memory[&0x2000][6..], [7; 4090], "only the string is copied out");
}

#[test]
fn value_is_written_once_however_many_rounds_it_takes() {
    let mut caller = Caller::new();
    let file = caller.open(O_RDWR).unwrap();
    let long = [b'v'; 60_000];
    let arg = caller.request((0x1ff0, &[b'k'; 30_000]), (0x10_0123, &long));
    let (errno, rounds) = caller.ioctl(file, KVWRITE, arg);
    assert!(errno == 0 && rounds > 20, "{errno} after {rounds} rounds");
    let arg = caller.request((0x1000, b"writes\0"), (0x2000, &[0; 16]));
    assert_eq!(caller.ioctl(file, KVREAD, arg).0, 0);
    assert_eq!(caller.string(0x2000), b"1");
}

#[test]
fn type_is_told_to_everybody() {
    let mut caller = Caller::new();
    let file = caller.open(O_RDONLY).unwrap();
    let arg = caller.request((0x1000, &[7; 8]), (0x2000, b""));
    assert_eq!(caller.ioctl(file, KVTYPE, arg), (0, 3));
    assert_eq!(caller.string(0x1000), b"Xen");
    let arg = caller.request((0x1000, &[7; 3]), (0x2000, b""));
    assert_eq!(caller.ioctl(file, KVTYPE, arg).0, Errno::ENOMEM.linux());
}

#[test]
fn writing_wants_a_descriptor_for_it() {
    let mut caller = Caller::new();
    let file = caller.open(O_RDONLY).unwrap();
    // The order of OpenBSD's checks: nobody looks at the buffers.
    let arg = caller.request((0x1000, b""), (0x2000, b""));
    assert_eq!(caller.ioctl(file, KVWRITE, arg).0, Errno::EPERM.linux());
}

#[test]
fn key_need_only_be_readable_up_to_its_nul() {
    let mut caller = Caller::new();
    let file = caller.open(O_RDWR).unwrap();
    let arg = caller.request((0x1ff8, b"data/k\0\0"), (0x3000, b"v\0"));
    assert_eq!(caller.ioctl(file, KVWRITE, arg).0, 0);
    // The buffer pretends to go on behind the page's end, where nothing is.
    caller.request((0x1ff8, b"data/k\0\0"), (0x3000, &[0; 8]));
    caller.memory.get_mut(&0x100).unwrap()[..8].copy_from_slice(&4096_u64.to_le_bytes());
    assert_eq!(caller.ioctl(file, KVREAD, 0x100).0, 0);
    assert_eq!(caller.string(0x3000), b"v");
}

#[test]
fn errors_are_those_of_pvbus() {
    let mut caller = Caller::new();
    let file = caller.open(O_RDWR).unwrap();
    let mut error = |command, key: &[u8], value: &[u8]| {
        let arg = caller.request((0x1000, key), (0x10_0000, value));
        caller.ioctl(file, command, arg).0
    };
    assert_eq!(error(KVREAD, b"nothing\0", &[0; 8]), Errno::ENOENT.linux());
    assert_eq!(error(KVREAD, b"writes\0", &[0; 1]), Errno::ERANGE.linux());
    assert_eq!(error(KVREAD, b"", &[0; 8]), Errno::EINVAL.linux());
    assert_eq!(error(KVREAD, b"writes\0", b""), Errno::EINVAL.linux());
    assert_eq!(error(KVREAD, &[b'k'; KVOP_MAXSIZE + 1], &[0; 8]), Errno::ENAMETOOLONG.linux());
    assert_eq!(error(KVWRITE, b"k\0", &[b'v'; KVOP_MAXSIZE + 1]), Errno::ENAMETOOLONG.linux());
    assert_eq!(error(0xc020_5604, b"k\0", &[0; 8]), Errno::ENOTTY.linux());
    assert_eq!(caller.ioctl(file, KVREAD, 0xdead_0000).0, Errno::EFAULT.linux());
}

#[test]
fn interface_without_a_store_has_a_type_and_nothing_else() {
    let mut caller = Caller { device: Device::new(0, 0), ..Caller::new() };
    let file = caller.open(O_RDWR).unwrap();
    let arg = caller.request((0x1000, &[0; 8]), (0x2000, b"v\0"));
    assert_eq!(caller.ioctl(file, KVTYPE, arg).0, 0);
    assert_eq!(caller.string(0x1000), b"KVM");
    assert_eq!(caller.ioctl(file, KVREAD, arg).0, Errno::ENXIO.linux());
    assert_eq!(caller.ioctl(file, KVWRITE, arg).0, Errno::ENXIO.linux());
}

#[test]
fn number_of_no_interface_cannot_be_opened() {
    let mut caller = Caller { device: Device::new(2, 0), ..Caller::new() };
    assert_eq!(caller.open(O_RDONLY), Err(Errno::ENXIO.linux()));
}

#[test]
fn device_is_neither_read_nor_written() {
    let mut caller = Caller::new();
    assert_eq!(caller.ask(READ, &[0; 40]).0, Errno::ENODEV.linux());
    assert_eq!(caller.ask(WRITE, &[0; 40]).0, Errno::ENODEV.linux());
    assert_eq!(caller.ask(12345, b"").0, ENOSYS);
}

#[test]
fn garbage_from_the_kernel_is_an_error_and_not_the_end() {
    let mut caller = Caller::new();
    assert_eq!(caller.ask(OPEN, b"123").0, Errno::EINVAL.linux());
    assert_eq!(caller.ask(IOCTL, b"").0, Errno::EINVAL.linux());
    assert!(caller.device.on(b"short", &mut caller.stores).is_none());
}
