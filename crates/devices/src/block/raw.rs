//! Raw images: files and block devices whose bytes are the disk's.
//!
//! Data moves between the file and guest memory directly (`preadv`, `pwritev`), discards punch holes.
#![allow(unsafe_code)] // Vectored I/O to guest memory, which no safe slice may alias.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;
use vm_memory::bitmap::Bitmap;

use super::{Disk, DiskError, DiskSpec, Probed, SECTOR, ZEROES, probe_bytes};
use crate::virtio::queue::GuestSlice;

/// A raw disk.
pub(super) struct Raw {
    file: File,
    size: u64,
    read_only: bool,
    /// Nobody said that it is raw; it only looked so. The guest must not make it look like something else.
    guessed: bool,
}

/// Most pieces that the host takes at once (IOV_MAX).
const MAX_PIECES: usize = 1024;

impl Raw {
    /// The disk in `file`. Its last sector is made whole when the file is not.
    pub(super) fn new(mut file: File, spec: &DiskSpec, guessed: bool) -> Result<Raw, DiskError> {
        let bytes = file.seek(SeekFrom::End(0)).map_err(|source| DiskError::Open { path: spec.path.clone(), source })?;
        if bytes == 0 {
            return Err(DiskError::Empty { path: spec.path.clone() });
        }
        Ok(Raw { file, size: bytes.next_multiple_of(SECTOR), read_only: spec.read_only, guessed })
    }

    fn check_first_sector(&self, offset: u64, head: impl FnOnce() -> Vec<u8>) -> io::Result<()> {
        if self.guessed && offset < super::PROBE_BYTES as u64 && !matches!(probe_bytes(&head()), Probed::None) {
            let text = "the guest writes another image format's mark to a disk whose format was guessed to be raw; say format=raw";
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, text));
        }
        Ok(())
    }
}

impl Disk for Raw {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn read_at(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        let len = read_up_to(&self.file, offset, data)?;
        data[len..].fill(0);
        Ok(())
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.check_first_sector(offset, || data[..data.len().min(super::PROBE_BYTES)].to_vec())?;
        self.file.write_all_at(data, offset)
    }

    fn flush(&self) -> io::Result<()> {
        if self.read_only { Ok(()) } else { self.file.sync_data() }
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        match fallocate(&self.file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, len) {
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(()),
            result => Ok(result?),
        }
    }

    fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> io::Result<()> {
        let kind = if may_unmap { FallocateFlags::PUNCH_HOLE } else { FallocateFlags::ZERO_RANGE };
        match fallocate(&self.file, kind | FallocateFlags::KEEP_SIZE, offset, len) {
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => super::write_plain_zeroes(self, offset, len),
            result => Ok(result?),
        }
    }

    fn read_to_guest(&self, offset: u64, slices: &[GuestSlice<'_>]) -> io::Result<()> {
        transfer(offset, slices, Direction::ToGuest, &self.file)
    }

    fn write_from_guest(&self, offset: u64, slices: &[GuestSlice<'_>]) -> io::Result<()> {
        self.check_first_sector(offset, || {
            let mut head = vec![0; super::PROBE_BYTES];
            let mut at = 0;
            for slice in slices {
                at += slice.copy_to(&mut head[at..]);
            }
            head
        })?;
        transfer(offset, slices, Direction::FromGuest, &self.file)
    }
}

/// Reads until `data` is full or the file ends; says how much.
pub(super) fn read_up_to(file: &File, offset: u64, data: &mut [u8]) -> io::Result<usize> {
    let mut len = 0;
    while len < data.len() {
        match file.read_at(&mut data[len..], offset + len as u64) {
            Ok(0) => break,
            Ok(more) => len += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(len)
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    ToGuest,
    FromGuest,
}

/// Moves all of `slices`; what is read past the end of the file is zero.
fn transfer(mut offset: u64, slices: &[GuestSlice<'_>], direction: Direction, file: &File) -> io::Result<()> {
    let fd = file.as_raw_fd();
    let mut first = 0;
    let mut done_of_first = 0;
    let mut pieces: Vec<libc::iovec> = Vec::with_capacity(slices.len().min(MAX_PIECES));
    while first < slices.len() {
        pieces.clear();
        for (place, slice) in slices[first..].iter().take(MAX_PIECES).enumerate() {
            let skip = if place == 0 { done_of_first } else { 0 };
            let start = slice.ptr_guard_mut().as_ptr().wrapping_add(skip);
            pieces.push(libc::iovec { iov_base: start.cast(), iov_len: slice.len() - skip });
        }
        let position = libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
        let count = pieces.len() as libc::c_int;
        // SAFETY: each piece lies within a slice of guest memory, which is mapped as long as `slices` lives, and which anybody
        // (the guest above all) may change at any time; the kernel is one more of those. `count` is the number of pieces.
        let result = unsafe {
            match direction {
                Direction::ToGuest => libc::preadv(fd, pieces.as_ptr(), count, position),
                Direction::FromGuest => libc::pwritev(fd, pieces.as_ptr(), count, position),
            }
        };
        let mut moved = match usize::try_from(result) {
            Ok(moved) => moved,
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => continue,
                error => return Err(error),
            },
        };
        if moved == 0 && pieces.iter().any(|piece| piece.iov_len > 0) {
            return match direction {
                Direction::ToGuest => zero_rest(&slices[first..], done_of_first),
                Direction::FromGuest => Err(io::ErrorKind::WriteZero.into()),
            };
        }
        offset += moved as u64;
        while let Some(slice) = slices.get(first) {
            let step = (slice.len() - done_of_first).min(moved);
            if direction == Direction::ToGuest {
                slice.bitmap().mark_dirty(done_of_first, step);
            }
            moved -= step;
            done_of_first += step;
            if done_of_first < slice.len() {
                break;
            }
            first += 1;
            done_of_first = 0;
        }
    }
    Ok(())
}

/// The file ended: the rest of the disk's last sector is zero.
fn zero_rest(slices: &[GuestSlice<'_>], skip: usize) -> io::Result<()> {
    for (place, slice) in slices.iter().enumerate() {
        let mut at = if place == 0 { skip } else { 0 };
        while at < slice.len() {
            let len = (slice.len() - at).min(ZEROES.len());
            slice.subslice(at, len).map_err(io::Error::other)?.copy_from(&ZEROES[..len]);
            at += len;
        }
    }
    Ok(())
}
