//! Words of FUSE and CUSE as far as a character device without data needs them. Linux `include/uapi/linux/fuse.h`.
//!
//! Numbers are in the machine's byte order, which is little-endian here.

use zerocopy::little_endian::{I32, U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// `FUSE_KERNEL_VERSION`.
pub const VERSION: u32 = 7;
/// The minor version whose structures these are. The kernel wants at least 11 of a CUSE server.
pub const MINOR_VERSION: u32 = 31;

/// Operation: open(2). Body [`OpenIn`], answer [`OpenOut`].
pub const OPEN: u32 = 14;
/// Operation: read(2).
pub const READ: u32 = 15;
/// Operation: write(2).
pub const WRITE: u32 = 16;
/// Operation: the last close(2).
pub const RELEASE: u32 = 18;
/// Operation: somebody waits no longer for an answer. It has none of its own.
pub const INTERRUPT: u32 = 36;
/// Operation: ioctl(2). Body [`IoctlIn`] and what was asked for, answer [`IoctlOut`] and what there is to copy out.
pub const IOCTL: u32 = 39;
/// Operation: the first one, asks what device this shall be. Body [`CuseInitIn`], answer [`CuseInitOut`] and `DEVNAME=name`.
pub const CUSE_INIT: u32 = 4096;

/// Flag of [`CuseInitIn`] and [`CuseInitOut`]: the server may ask for the caller's memory at any address.
pub const CUSE_UNRESTRICTED_IOCTL: u32 = 1 << 0;
/// Flag of [`IoctlOut`]: [`IoctlIovec`]s follow; ask again with the first of them copied in, and with room for the others.
pub const IOCTL_RETRY: u32 = 1 << 2;
/// Most [`IoctlIovec`]s.
pub const IOCTL_MAX_IOV: usize = 256;
/// Flag of [`OpenOut`]: no lseek(2).
pub const FOPEN_NONSEEKABLE: u32 = 1 << 2;

/// `struct fuse_in_header`: begins each request.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct InHeader {
    /// Bytes of the request with this header.
    pub len: U32,
    /// Operation.
    pub opcode: U32,
    /// Number of the request; the answer repeats it.
    pub unique: U64,
    /// Unused by CUSE.
    pub nodeid: U64,
    /// User of the caller.
    pub uid: U32,
    /// Group of the caller.
    pub gid: U32,
    /// Process of the caller.
    pub pid: U32,
    /// Unused here.
    pub total_extlen: U16,
    /// Unused.
    pub padding: U16,
}
const _: () = assert!(size_of::<InHeader>() == 40);

/// `struct fuse_out_header`: begins each answer.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct OutHeader {
    /// Bytes of the answer with this header.
    pub len: U32,
    /// 0, or an error number, negative; then nothing follows.
    pub error: I32,
    /// Of the request.
    pub unique: U64,
}
const _: () = assert!(size_of::<OutHeader>() == 16);

/// `struct cuse_init_in`.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct CuseInitIn {
    /// The kernel's version.
    pub major: U32,
    /// The kernel's minor version.
    pub minor: U32,
    /// Unused.
    pub unused: U32,
    /// [`CUSE_UNRESTRICTED_IOCTL`].
    pub flags: U32,
}
const _: () = assert!(size_of::<CuseInitIn>() == 16);

/// `struct cuse_init_out`.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct CuseInitOut {
    /// [`VERSION`].
    pub major: U32,
    /// [`MINOR_VERSION`].
    pub minor: U32,
    /// Unused.
    pub unused: U32,
    /// [`CUSE_UNRESTRICTED_IOCTL`].
    pub flags: U32,
    /// Most bytes of a read(2).
    pub max_read: U32,
    /// Most bytes of a write(2).
    pub max_write: U32,
    /// Major number of the device; 0 for one that is free.
    pub dev_major: U32,
    /// Its minor number.
    pub dev_minor: U32,
    /// Unused.
    pub spare: [U32; 10],
}
const _: () = assert!(size_of::<CuseInitOut>() == 72);

/// `struct fuse_open_in`.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct OpenIn {
    /// Flags of open(2).
    pub flags: U32,
    /// Unused by CUSE.
    pub open_flags: U32,
}
const _: () = assert!(size_of::<OpenIn>() == 8);

/// `struct fuse_open_out`.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct OpenOut {
    /// The server's own number for the open file.
    pub fh: U64,
    /// [`FOPEN_NONSEEKABLE`].
    pub open_flags: U32,
    /// Unused.
    pub padding: U32,
}
const _: () = assert!(size_of::<OpenOut>() == 16);

/// `struct fuse_ioctl_in`.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct IoctlIn {
    /// Of the open file.
    pub fh: U64,
    /// Unused here.
    pub flags: U32,
    /// The command.
    pub cmd: U32,
    /// Its argument.
    pub arg: U64,
    /// Bytes that follow: the first [`IoctlIovec`]s, one behind the other.
    pub in_size: U32,
    /// Room of the others.
    pub out_size: U32,
}
const _: () = assert!(size_of::<IoctlIn>() == 32);

/// `struct fuse_ioctl_out`.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct IoctlOut {
    /// What ioctl(2) returns.
    pub result: I32,
    /// [`IOCTL_RETRY`].
    pub flags: U32,
    /// Number of [`IoctlIovec`]s to copy in.
    pub in_iovs: U32,
    /// Number of those to copy out to.
    pub out_iovs: U32,
}
const _: () = assert!(size_of::<IoctlOut>() == 16);

/// `struct fuse_ioctl_iovec`: a piece of the caller's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct IoctlIovec {
    /// Address.
    pub base: U64,
    /// Bytes.
    pub len: U64,
}
const _: () = assert!(size_of::<IoctlIovec>() == 16);
