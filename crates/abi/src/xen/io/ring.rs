//! Shared rings of requests and responses: `io/ring.h`. Indices run freely; the number of slots is a power of two.

/// Index behind the last request.
pub const REQ_PROD: u64 = 0;
/// The backend wants an event when a request with this index is there.
pub const REQ_EVENT: u64 = 4;
/// Index behind the last response.
pub const RSP_PROD: u64 = 8;
/// The frontend wants an event when a response with this index is there.
pub const RSP_EVENT: u64 = 12;
/// Where the slots begin.
pub const SLOTS: u64 = 64;
