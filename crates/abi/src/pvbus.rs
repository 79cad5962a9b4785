//! Words of pvbus(4): the ioctl commands of `/dev/pvbusN`, their request, limits and the numbers of its errors.
//!
//! OpenBSD `sys/dev/pv/pvvar.h` and `sys/dev/pv/pvbus.c`. The commands are `_IOWR('V', n, struct pvbus_req)`, which has the same value on OpenBSD and on Linux.

use zerocopy::little_endian::U64;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// `PVBUSIOC_KVREAD`: the value of `pvr_key` into `pvr_value`.
pub const KVREAD: u32 = 0xc020_5601;
/// `PVBUSIOC_KVWRITE`: `pvr_value` becomes the value of `pvr_key`.
pub const KVWRITE: u32 = 0xc020_5602;
/// `PVBUSIOC_KVTYPE` (`PVBUSIOC_TYPE` in the header): the interface's name into `pvr_key`.
pub const KVTYPE: u32 = 0xc020_5603;

/// `PVBUS_KVOP_MAXSIZE`: most bytes of a key or a value, NUL included.
pub const KVOP_MAXSIZE: usize = 64 * 1024;

/// `struct pvbus_req` of a 64-bit process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct PvbusReq {
    /// `pvr_keylen`: size of the key's buffer in bytes.
    pub keylen: U64,
    /// `pvr_key`: its address in the caller.
    pub key: U64,
    /// `pvr_valuelen`: size of the value's buffer in bytes.
    pub valuelen: U64,
    /// `pvr_value`: its address in the caller.
    pub value: U64,
}

const _: () = assert!(size_of::<PvbusReq>() == 32);
