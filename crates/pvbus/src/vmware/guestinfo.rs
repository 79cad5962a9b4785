//! The information store `guestinfo`: RPCI's `info-get` and `info-set`.
//!
//! Keys are handed on as they are, with their `guestinfo.` in front. They have no order, so there is nothing to list, and the host keeps a
//! key until the machine is powered off. The end of the key is the first blank, so a key with blanks cannot be written.

use alloc::vec::Vec;

use abi::vmware::message::MAX_GUEST_MESSAGE;
use abi::vmware::rpc::{INFO_GET, INFO_SET, NO_VALUE, PERMISSION_DENIED};

use super::channel::ChannelError;
use super::rpci::{RpcError, Rpci};
use crate::detect::Kind;
use crate::hal::HalError;
use crate::store::{Store, StoreError};

/// VMware's store.
pub struct Guestinfo<'h> {
    rpci: Rpci<'h>,
}

impl<'h> Guestinfo<'h> {
    /// The store behind `rpci`.
    #[must_use]
    pub const fn new(rpci: Rpci<'h>) -> Guestinfo<'h> {
        Guestinfo { rpci }
    }

    fn request(&self, parts: &[&[u8]]) -> Result<Vec<u8>, StoreError> {
        let request = parts.join(&b' ');
        if request.len() > MAX_GUEST_MESSAGE {
            return Err(StoreError::TooLong);
        }
        Ok(self.rpci.call(&request)?)
    }
}

impl Store for Guestinfo<'_> {
    fn kind(&self) -> Kind {
        Kind::Vmware
    }

    fn read(&mut self, key: &[u8]) -> Result<Vec<u8>, StoreError> {
        if key.is_empty() {
            return Err(StoreError::BadKey);
        }
        self.request(&[INFO_GET.as_bytes(), key])
    }

    fn write(&mut self, key: &[u8], value: &[u8]) -> Result<(), StoreError> {
        if key.is_empty() || key.contains(&b' ') {
            return Err(StoreError::BadKey);
        }
        self.request(&[INFO_SET.as_bytes(), key, value]).map(|_| ())
    }
}

impl From<RpcError> for StoreError {
    fn from(error: RpcError) -> StoreError {
        match error {
            RpcError::Refused(reason) if reason == NO_VALUE => StoreError::NotFound,
            RpcError::Refused(reason) if reason == PERMISSION_DENIED => StoreError::Denied,
            RpcError::Refused(reason) => StoreError::Refused(reason),
            RpcError::Malformed => StoreError::Transport("a reply that begins with neither 1 nor 0"),
            RpcError::Timeout => StoreError::Timeout,
            RpcError::Channel(ChannelError::TooLong) => StoreError::TooLong,
            RpcError::Channel(ChannelError::NoMemory) => StoreError::NoMemory,
            RpcError::Channel(ChannelError::Hal(HalError::Denied)) => StoreError::Denied,
            RpcError::Channel(error) => StoreError::Transport(error.text()),
        }
    }
}
