//! Key/value pairs: sizes of their fields, in messages and in the pool files of Linux' daemon.
//!
//! In messages the fields hold UTF-16 and a terminating zero, in the files UTF-8 padded with zeros. (Linux `include/uapi/linux/hyperv.h`,
//! `tools/hv/hv_kvp_daemon.c`.)

/// Bytes of a key (`HV_KVP_EXCHANGE_MAX_KEY_SIZE`).
pub const KEY_SIZE: usize = 512;
/// Bytes of a value (`HV_KVP_EXCHANGE_MAX_VALUE_SIZE`).
pub const VALUE_SIZE: usize = 2048;
/// Bytes of a record in a pool file (`struct kvp_record`): key, value.
pub const RECORD_SIZE: usize = KEY_SIZE + VALUE_SIZE;
