//! The console's page: `io/console.h`, `struct xencons_interface`. Indices run freely and are masked on use.

/// Bytes from the host, at 0.
pub const IN_SIZE: u32 = 1024;
/// Where bytes from the guest are.
pub const OUT: u64 = 1024;
/// How many.
pub const OUT_SIZE: u32 = 2048;
/// The guest has read up to here.
pub const IN_CONS: u64 = 3072;
/// The host has written up to here.
pub const IN_PROD: u64 = 3076;
/// The host has read up to here.
pub const OUT_CONS: u64 = 3080;
/// The guest has written up to here.
pub const OUT_PROD: u64 = 3084;
