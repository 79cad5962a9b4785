//! TAP interfaces of the Linux kernel (`Documentation/networking/tuntap.rst`), with virtio headers, so that checksums and
//! segmentation stay with the kernel.
#![allow(unsafe_code)] // ioctl(2) of /dev/net/tun.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use abi::virtio::net::HEADER_BYTES;
use frames::{MIN_FRAME, Offloads};

use super::{NetBackend, NetError};

const TUN_PATH: &str = "/dev/net/tun";

/// Packets come with checksums to be completed (linux/if_tun.h).
const TUN_F_CSUM: libc::c_uint = 1;
/// TCP over IPv4 comes uncut.
const TUN_F_TSO4: libc::c_uint = 2;
/// TCP over IPv6 comes uncut.
const TUN_F_TSO6: libc::c_uint = 4;

/// A TAP interface.
pub struct Tap {
    file: File,
}

impl Tap {
    /// Attaches to the interface `name`, which has to exist.
    ///
    /// # Errors
    /// [`NetError`] says what is missing.
    pub fn open(name: &str) -> Result<Tap, NetError> {
        let error = |what| move |source| NetError::Tap { name: name.into(), what, source };
        let mut request = libc::ifreq { ifr_name: [0; libc::IFNAMSIZ], ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_ifindex: 0 } };
        // The kernel would make an interface that nobody configured; a typing error should not do that.
        let exists = !name.contains('/') && Path::new("/sys/class/net").join(name).exists();
        if !exists || name.len() >= libc::IFNAMSIZ {
            return Err(NetError::NoTap(name.into()));
        }
        for (place, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *place = byte as libc::c_char;
        }
        request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open(TUN_PATH)
            .map_err(|source| NetError::NoTun { path: TUN_PATH.into(), source })?;
        // SAFETY: TUNSETIFF reads and writes one struct ifreq.
        check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF as _, &mut request) })
            .map_err(error("cannot attach (is it a TAP interface, and free?)"))?;
        let size = HEADER_BYTES as libc::c_int;
        // SAFETY: TUNSETVNETHDRSZ reads one int.
        check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETVNETHDRSZ as _, &size) }).map_err(error("header size"))?;
        let mut tap = Tap { file };
        tap.set_guest_offloads(Offloads::default()).map_err(error("offloads"))?;
        Ok(tap)
    }
}

impl NetBackend for Tap {
    fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    fn send(&mut self, packet: &[u8]) -> io::Result<()> {
        if packet.len() < HEADER_BYTES + MIN_FRAME {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        loop {
            match self.file.write(packet) {
                Ok(_) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // The interface is down, or the kernel has no room: the frame is lost, as on any wire.
                Err(error) if matches!(error.raw_os_error(), Some(libc::EIO | libc::ENOMEM | libc::ENOBUFS)) => return Ok(()),
                Err(error) => return Err(error),
            }
        }
    }

    fn receive(&mut self, packet: &mut [u8]) -> io::Result<Option<usize>> {
        loop {
            match self.file.read(packet) {
                Ok(len) if len >= HEADER_BYTES + MIN_FRAME => return Ok(Some(len)),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn set_guest_offloads(&mut self, offloads: Offloads) -> io::Result<()> {
        let mut flags = 0;
        for (wanted, flag) in [(offloads.checksum, TUN_F_CSUM), (offloads.tso4, TUN_F_TSO4), (offloads.tso6, TUN_F_TSO6)] {
            if wanted {
                flags |= flag;
            }
        }
        // SAFETY: TUNSETOFFLOAD takes its flags by value.
        check(unsafe { libc::ioctl(self.file.as_raw_fd(), libc::TUNSETOFFLOAD as _, libc::c_ulong::from(flags)) })
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
