//! How two halves of a split driver find together: `io/xenbus.h`.

/// Node in each half's directory with its state, written by itself as a decimal number.
pub const STATE: &str = "state";

/// Node in the backend's directory: 0 once the device is to go for good (`docs/misc/xenstore-paths.pandoc`, and libxl's use of it).
pub const ONLINE: &str = "online";

/// Values of [`STATE`] (`XenbusState*`).
pub mod state {
    /// Nothing was said.
    pub const UNKNOWN: u32 = 0;
    /// It begins.
    pub const INITIALISING: u32 = 1;
    /// It waits for the other to begin.
    pub const INIT_WAIT: u32 = 2;
    /// It waits for the other to connect.
    pub const INITIALISED: u32 = 3;
    /// It works.
    pub const CONNECTED: u32 = 4;
    /// It wants to end.
    pub const CLOSING: u32 = 5;
    /// It has ended.
    pub const CLOSED: u32 = 6;
    /// It changes while connected.
    pub const RECONFIGURING: u32 = 7;
    /// It has changed.
    pub const RECONFIGURED: u32 = 8;
}
