//! The control queue (section 5.1.6.5): the driver changes its address, and says what it wants to receive.
//!
//! The networks here carry only frames that are meant for this card or for all, so receive modes and address filters are
//! accepted and need nothing done.

use std::sync::{Arc, Mutex, PoisonError};

use abi::virtio::net::{CTRL_ERR, CTRL_MAC, CTRL_MAC_ADDR_SET, CTRL_MAC_TABLE_SET, CTRL_OK, CTRL_RX};
use vm_memory::Bytes;
use vmm::memory::GuestMemory;

use super::super::queue::{Chain, Ring, RingError};
use crate::net::Mac;

/// Number of receive modes (5.1.6.5.1): promiscuous, allmulti, alluni, nomulti, nouni, nobcast.
const RX_MODES: u8 = 6;
/// Commands worked off for one notification, at most; a driver has only one under way.
const MAX_COMMANDS: usize = 1024;

/// The card's address, shared with its configuration.
#[derive(Clone)]
pub(super) struct Address(Arc<Mutex<Mac>>);

impl Address {
    pub(super) fn new(mac: Mac) -> Address {
        Address(Arc::new(Mutex::new(mac)))
    }

    pub(super) fn get(&self) -> Mac {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn set(&self, mac: Mac) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = mac;
    }
}

/// Answers what is on the control queue.
pub(super) fn drain(ring: &mut Ring, chain: &mut Chain, memory: &GuestMemory, address: &Address) -> Result<(), RingError> {
    for _ in 0..MAX_COMMANDS {
        if !ring.next(chain)? {
            if ring.enable_notification()? {
                continue;
            }
            break;
        }
        let written = match chain.writable.take_last_byte() {
            Some(answer) => {
                let status = if command(chain, memory, address) { CTRL_OK } else { CTRL_ERR };
                u32::from(memory.write_obj(status, answer).is_ok())
            }
            None => 0,
        };
        ring.complete(chain.head, written)?;
        ring.signal()?;
    }
    Ok(())
}

fn command(chain: &mut Chain, memory: &GuestMemory, address: &Address) -> bool {
    let mut head = [0; 2];
    if chain.readable.read(memory, &mut head).is_err() {
        return false;
    }
    match (head[0], head[1]) {
        (CTRL_RX, mode) => mode < RX_MODES && chain.readable.len() == 1,
        (CTRL_MAC, CTRL_MAC_TABLE_SET) => true,
        (CTRL_MAC, CTRL_MAC_ADDR_SET) => {
            let mut mac = [0; 6];
            let taken = chain.readable.len() == 6 && chain.readable.read(memory, &mut mac).is_ok();
            if taken {
                address.set(Mac(mac));
            }
            taken
        }
        _ => false,
    }
}
