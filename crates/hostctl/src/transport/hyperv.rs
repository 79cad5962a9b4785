//! Hyper-V's key/value pairs, by the pool files of Linux' daemon.
//!
//! The host exchanges keys with `hv_kvp_daemon`, which keeps them in `/var/lib/hyperv/.kvp_pool_0` to `_4`: records of 512 bytes of key and 2048
//! of value, UTF-8, padded with zeros, without a header, under a POSIX lock over the whole file (Linux `tools/hv/hv_kvp_daemon.c`). A pool is
//! read by reading its file; this machine's own keys get to the host by a record in the Guest pool, which the host enumerates.
//!
//! Keys are named as OpenBSD's hyperv(4) names them ([`pools`]). The Auto pool is computed by the daemon when the host asks, so its file stays
//! empty: what it holds only the host can tell. Without a running daemon the files do not change, and a key in the Guest pool waits
//! until one runs: the kernel's `/dev/vmbus/hv_kvp` serves the daemon alone.

use alloc::format;
use alloc::vec::Vec;
use core::time::Duration;

use abi::hyperv::kvp;
use pvbus::hyperv::pools::{self, Pool};
use pvbus::{Kind, Store, StoreError};

use super::Opened;
use crate::error::Error;
use crate::sys::file::{self, Access};
use crate::sys::{Errno, File, time};

/// Where the daemon keeps its files.
pub const DIRECTORY: &str = "/var/lib/hyperv";
/// The kernel's end of the daemon: it is there when the host offers key/value pairs and `hv_utils` is loaded.
const DEVICE: &str = "/dev/vmbus/hv_kvp";
/// More records than this are not believed.
const MAX_RECORDS: usize = 4096;
/// Time between attempts at a lock that somebody else has.
const LOCK_PAUSE: Duration = Duration::from_millis(10);

/// The pools.
#[derive(Debug)]
pub struct Pools {
    directory: Vec<u8>,
    patience: Duration,
}

impl Pools {
    /// The pools in `directory`; locks are waited for as long as `patience`.
    ///
    /// # Errors
    /// [`Error::NoStore`] when there is neither a pool nor a host that wants some.
    pub fn open(directory: &str, patience: Duration) -> Result<Pools, Error> {
        let pools = Pools { directory: directory.into(), patience };
        if file::exists(&pools.path(Pool::External)) || file::exists(&pools.path(Pool::Guest)) || file::exists(DEVICE.as_bytes()) {
            return Ok(pools);
        }
        Err(Error::NoStore(format!(
            "no key/value pools: {directory} has none and {DEVICE} is not there (module hv_utils, and hv_kvp_daemon of Debian's hyperv-daemons)"
        )))
    }

    fn path(&self, pool: Pool) -> Vec<u8> {
        [&self.directory, format!("/.kvp_pool_{}", pool.number()).as_bytes()].concat()
    }

    /// All records of `pool`. Of the Auto pool there are none in any file; the host's pools are there once the daemon has run, which makes
    /// their files before all else.
    fn records(&self, pool: Pool) -> Result<Vec<Record>, StoreError> {
        if pool == Pool::Auto {
            return Err(StoreError::Unsupported);
        }
        let file = match File::open(&self.path(pool), Access::Read) {
            Ok(file) => file,
            Err(Errno::ENOENT) if pool == Pool::Guest => return Ok(Vec::new()),
            Err(Errno::ENOENT) => return Err(StoreError::NotFound),
            Err(errno) => return Err(refusal(errno)),
        };
        self.lock(&file, false)?;
        read_records(&file).map_err(refusal)
    }

    /// Lets `change` edit the records of the Guest pool, and writes them back.
    fn edit(&self, change: impl FnOnce(&mut Vec<Record>) -> Result<(), StoreError>) -> Result<(), StoreError> {
        file::make_directories(&self.directory).map_err(refusal)?;
        let file = File::open(&self.path(Pool::Guest), Access::ReadWriteOrMake).map_err(refusal)?;
        self.lock(&file, true)?;
        let mut records = read_records(&file).map_err(refusal)?;
        change(&mut records)?;
        file.replace(&to_bytes(&records)).map_err(refusal)
    }

    /// Waits for the lock; it goes when the file is closed.
    fn lock(&self, file: &File, for_writing: bool) -> Result<(), StoreError> {
        let deadline = time::after(self.patience);
        loop {
            match file.try_lock(for_writing) {
                Ok(()) => return Ok(()),
                Err(Errno::EAGAIN) if time::now() < deadline => time::sleep_until(time::after(LOCK_PAUSE)),
                Err(Errno::EAGAIN) => return Err(StoreError::Timeout),
                Err(_) => return Err(StoreError::Transport("the pool's file cannot be locked")),
            }
        }
    }
}

impl Store for Pools {
    fn kind(&self) -> Kind {
        Kind::HyperV
    }

    fn read(&mut self, key: &[u8]) -> Result<Vec<u8>, StoreError> {
        let (pool, name) = pools::split(key)?;
        let found = self.records(pool)?.into_iter().find(|record| record.key == name);
        found.map(|record| record.value).ok_or(StoreError::NotFound)
    }

    fn read_or_list(&mut self, key: &[u8]) -> Result<Vec<u8>, StoreError> {
        match pools::split(key)? {
            (_, b"") => Ok(self.list(key)?.join(&b'\n')),
            _ => self.read(key),
        }
    }

    fn write(&mut self, key: &[u8], value: &[u8]) -> Result<(), StoreError> {
        let (name, value) = pools::record(own(key)?, value)?;
        // The file holds as many bytes of UTF-8, with a terminating zero, as the message to the host of UTF-16.
        if name.len() >= kvp::KEY_SIZE || value.len() >= kvp::VALUE_SIZE {
            return Err(StoreError::TooLong);
        }
        let new = Record { key: name.into(), value: value.into() };
        self.edit(|records| {
            match records.iter_mut().find(|record| record.key == new.key) {
                Some(record) => *record = new,
                None => records.push(new),
            }
            Ok(())
        })
    }

    fn list(&mut self, key: &[u8]) -> Result<Vec<Vec<u8>>, StoreError> {
        if key.is_empty() {
            return Ok(Pool::ALL.map(|pool| pool.name().into()).to_vec());
        }
        Ok(self.records(pools::directory(key)?)?.into_iter().map(|record| record.key).collect())
    }

    fn remove(&mut self, key: &[u8]) -> Result<(), StoreError> {
        let name = own(key)?;
        self.edit(|records| {
            let before = records.len();
            records.retain(|record| record.key != name);
            if records.len() == before { Err(StoreError::NotFound) } else { Ok(()) }
        })
    }
}

impl Opened for Pools {
    fn rules(&self) -> &'static str {
        "Hyper-V's keys are Pool/key with the pools External, Guest, Auto and Guest/Parameters, of which only Guest can be written, and Auto is \
         in no file: hv_kvp_daemon computes it when the host asks; keys are 255 and values 1023 characters at most, text without zero bytes"
    }

    fn absence(&self) -> &'static str {
        if file::exists(&self.path(Pool::External)) {
            return "";
        }
        "hv_kvp_daemon of Debian's hyperv-daemons, which brings the host's keys, has not run here"
    }
}

/// One key of a pool.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Record {
    key: Vec<u8>,
    value: Vec<u8>,
}

/// Reads a whole pool. A piece of a record at the end, left by a writer that died, is ignored.
fn read_records(file: &File) -> Result<Vec<Record>, Errno> {
    let bytes = file.read_to_end(MAX_RECORDS * kvp::RECORD_SIZE)?;
    let until_zero = |field: &[u8]| field.split(|&byte| byte == 0).next().unwrap_or_default().to_vec();
    let records = bytes.chunks_exact(kvp::RECORD_SIZE).map(|record| {
        let (key, value) = record.split_at(kvp::KEY_SIZE);
        Record { key: until_zero(key), value: until_zero(value) }
    });
    Ok(records.collect())
}

/// A pool's content.
fn to_bytes(records: &[Record]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(records.len() * kvp::RECORD_SIZE);
    for record in records {
        for (field, size) in [(&record.key, kvp::KEY_SIZE), (&record.value, kvp::VALUE_SIZE)] {
            let end = bytes.len() + size;
            bytes.extend_from_slice(field);
            bytes.resize(end, 0);
        }
    }
    bytes
}

/// The name of a key in the pool that is not the host's.
fn own(key: &[u8]) -> Result<&[u8], StoreError> {
    match pools::split(key)? {
        (_, b"") => Err(StoreError::BadKey),
        (Pool::Guest, name) => Ok(name),
        _ => Err(StoreError::Denied),
    }
}

fn refusal(errno: Errno) -> StoreError {
    match errno {
        Errno::EACCES | Errno::EPERM | Errno::EROFS => StoreError::Denied,
        Errno::ENOSPC | Errno::EDQUOT => StoreError::Full,
        _ => StoreError::Transport("the pool's file cannot be used"),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::process::{Command, Stdio};

    use super::*;

    const PATIENCE: Duration = Duration::from_millis(100);

    /// A directory with the External pool as a host has filled it.
    fn pools() -> (tempfile::TempDir, Pools) {
        let directory = tempfile::tempdir().unwrap();
        let mut bytes = vec![0; 2 * kvp::RECORD_SIZE];
        bytes[..8].copy_from_slice(b"userdata");
        bytes[512..517].copy_from_slice(b"hello");
        bytes[2560..2565].copy_from_slice(b"empty");
        std::fs::write(directory.path().join(".kvp_pool_0"), bytes).unwrap();
        let pools = Pools::open(directory.path().to_str().unwrap(), PATIENCE).unwrap();
        (directory, pools)
    }

    #[test]
    fn host_s_keys_are_read_by_pool_and_name() {
        let (_directory, mut pools) = pools();
        assert_eq!(pools.read(b"External/userdata").unwrap(), b"hello");
        assert_eq!(pools.read(b"external/empty").unwrap(), b"");
        assert_eq!(pools.read(b"External/other"), Err(StoreError::NotFound));
        assert_eq!(pools.read(b"Guest/Parameters/HostName"), Err(StoreError::NotFound));
        assert_eq!(pools.read(b"userdata"), Err(StoreError::BadKey));
        assert_eq!(pools.read(b"Nowhere/userdata"), Err(StoreError::BadKey));
    }

    #[test]
    fn pools_and_their_keys_are_listed() {
        let (_directory, mut pools) = pools();
        assert_eq!(pools.list(b"").unwrap(), Pool::ALL.map(|pool| pool.name().as_bytes()));
        assert_eq!(pools.list(b"External/").unwrap(), [b"userdata".as_slice(), b"empty"]);
        assert!(pools.list(b"Guest").unwrap().is_empty());
        assert_eq!(pools.read_or_list(b"External/").unwrap(), b"userdata\nempty");
    }

    #[test]
    fn pool_that_the_daemon_computes_is_said_to_be_in_no_file() {
        let (_directory, mut pools) = pools();
        assert_eq!(pools.read(b"Auto/OSName"), Err(StoreError::Unsupported));
        assert_eq!(pools.list(b"Auto"), Err(StoreError::Unsupported));
        assert!(pools.rules().contains("hv_kvp_daemon computes it"));
    }

    #[test]
    fn host_s_pools_without_the_daemon_are_missing_and_say_why() {
        let (directory, mut pools) = pools();
        assert_eq!(pools.absence(), "");
        std::fs::remove_file(directory.path().join(".kvp_pool_0")).unwrap();
        assert_eq!(pools.read(b"External/userdata"), Err(StoreError::NotFound));
        assert_eq!(pools.list(b"External"), Err(StoreError::NotFound));
        assert!(pools.absence().contains("hv_kvp_daemon"));
        // It may come while somebody waits for a key.
        assert!(pools.watch(b"External/userdata").is_ok());
    }

    #[test]
    fn own_keys_are_written_replaced_and_removed_as_the_daemon_does() {
        let (directory, mut pools) = pools();
        pools.write(b"Guest/a", b"1").unwrap();
        pools.write(b"Guest/b", b"2").unwrap();
        pools.write(b"Guest/a", "naïve\nlines".as_bytes()).unwrap();
        assert_eq!(pools.read(b"Guest/a").unwrap(), "naïve\nlines".as_bytes());
        let file = std::fs::read(directory.path().join(".kvp_pool_1")).unwrap();
        assert_eq!(file.len(), 2 * 2560);
        assert_eq!(&file[..2], b"a\0");
        pools.remove(b"Guest/a").unwrap();
        assert_eq!(pools.list(b"Guest").unwrap(), [b"b"]);
        assert_eq!(pools.remove(b"Guest/a"), Err(StoreError::NotFound));
    }

    #[test]
    fn host_s_pools_are_not_written() {
        let (_directory, mut pools) = pools();
        assert_eq!(pools.write(b"External/x", b"1"), Err(StoreError::Denied));
        assert_eq!(pools.remove(b"External/userdata"), Err(StoreError::Denied));
        assert_eq!(pools.write(b"Auto/OSName", b"1"), Err(StoreError::Denied));
    }

    #[test]
    fn only_text_that_fits_the_message_to_the_host_is_written() {
        let (_directory, mut pools) = pools();
        pools.write(b"Guest/k", &[b'v'; 1023]).unwrap();
        assert_eq!(pools.write(b"Guest/k", &[b'v'; 1024]), Err(StoreError::TooLong));
        assert_eq!(pools.write(b"Guest/k", b"\xff"), Err(StoreError::BadKey));
        assert_eq!(pools.write(b"Guest/k", b"a\0b"), Err(StoreError::BadKey));
        pools.write(format!("Guest/{}", "k".repeat(255)).as_bytes(), b"v").unwrap();
        assert_eq!(pools.write(format!("Guest/{}", "k".repeat(256)).as_bytes(), b"v"), Err(StoreError::TooLong));
    }

    #[test]
    fn piece_of_a_record_at_the_end_is_ignored() {
        let (directory, mut pools) = pools();
        let path = directory.path().join(".kvp_pool_0");
        let mut bytes = std::fs::read(&path).unwrap();
        bytes.extend_from_slice(b"half");
        std::fs::write(&path, bytes).unwrap();
        assert_eq!(pools.list(b"External").unwrap().len(), 2);
    }

    #[test]
    fn field_without_a_terminating_zero_ends_with_the_field() {
        let (directory, mut pools) = pools();
        let mut record = vec![b'k'; kvp::KEY_SIZE];
        record.resize(kvp::RECORD_SIZE, b'v');
        std::fs::write(directory.path().join(".kvp_pool_3"), record).unwrap();
        let key = format!("Guest/Parameters/{}", "k".repeat(kvp::KEY_SIZE));
        assert_eq!(pools.read(key.as_bytes()).unwrap(), vec![b'v'; kvp::VALUE_SIZE]);
    }

    #[test]
    fn locked_pool_is_a_timeout() {
        let (directory, mut pools) = pools();
        // POSIX locks are a process's: another one has to hold it. The layout of struct flock is x86-64's.
        let script = "use Fcntl; open(my $f, '+<', $ARGV[0]) or die; my $lock = pack('s s x4 q q l x4', F_WRLCK, 0, 0, 0, 0); \
             fcntl($f, F_SETLK, $lock) or die; $| = 1; print \"locked\\n\"; <STDIN>;";
        let mut holder = Command::new("perl")
            .args(["-e", script])
            .arg(directory.path().join(".kvp_pool_0"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        holder.stdout.as_mut().unwrap().read_exact(&mut [0; 7]).unwrap();
        assert_eq!(pools.read(b"External/userdata"), Err(StoreError::Timeout));
        drop(holder.stdin.take());
        holder.wait().unwrap();
        assert_eq!(pools.read(b"External/userdata").unwrap(), b"hello");
    }

    #[test]
    fn no_files_and_no_host_is_no_store() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(Pools::open(directory.path().to_str().unwrap(), PATIENCE).unwrap_err().status(), 4);
    }
}
