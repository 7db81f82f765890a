//! virtio devices (Virtual I/O Device specification 1.2), split rings, MMIO transport.
//!
//! A device is a folder: `mod.rs` (what it is), `device.rs` (configuration space, activation, the worker), `request.rs`
//! or `packet.rs` (parsing). The transport owns a device's queues and *moves* them into the device when the driver sets
//! DRIVER_OK; the device's own thread runs its [`worker`] from then on, and the queues are handed back when it is
//! deactivated: by a reset, for a pause, or to be saved.

pub mod activity;
pub mod balloon;
pub mod block;
pub mod fs;
pub mod interrupt;
pub mod mmio;
pub mod net;
pub mod queue;
pub mod rng;
#[cfg(test)]
pub(crate) mod testing;
pub mod vsock;
pub mod worker;

use crate::cage::reach;
use crate::memory::GuestMemory;
use interrupt::Interrupt;
use queue::VirtQueue;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use worker::{DeviceThread, Prepare};

/// Device types, section 5.
pub mod device_type {
    /// 5.1 Network device.
    pub const NET: u32 = 1;
    /// 5.2 Block device.
    pub const BLOCK: u32 = 2;
    /// 5.4 Entropy device.
    pub const RNG: u32 = 4;
    /// 5.5 Traditional memory balloon.
    pub const BALLOON: u32 = 5;
    /// 5.10 Socket device.
    pub const VSOCK: u32 = 19;
    /// 5.11 File system device.
    pub const FS: u32 = 26;
}

/// What a driver needs for a device to work, moved into it when the driver is ready.
pub struct Activation {
    /// Guest memory.
    pub memory: GuestMemory,
    /// As many as [`VirtioDevice::queue_sizes`] says; those that the driver did not set up are not ready.
    pub queues: Vec<VirtQueue>,
    /// To the driver.
    pub interrupt: Interrupt,
    /// The features that both sides agreed on.
    pub features: u64,
    /// The device's own.
    pub thread: DeviceThread,
}

impl Activation {
    /// Takes the queues of a device that needs all of its `N`.
    ///
    /// # Errors
    /// The first that the driver did not set up.
    pub fn take_queues<const N: usize>(&mut self) -> Result<[VirtQueue; N], ActivateError> {
        let queues: Result<[VirtQueue; N], _> = std::mem::take(&mut self.queues).try_into();
        let queues = queues.map_err(|queues| ActivateError::QueueNotReady(queues.len()))?;
        match queues.iter().position(|queue| !queue.is_ready()) {
            Some(queue) => Err(ActivateError::QueueNotReady(queue)),
            None => Ok(queues),
        }
    }
}

/// Why a device cannot start.
#[derive(Debug, thiserror::Error)]
pub enum ActivateError {
    /// An operating system resource is missing.
    #[error("cannot start the worker")]
    Worker(#[source] io::Error),
    /// The driver left a queue unusable that the device needs.
    #[error("the driver did not set up queue {0}")]
    QueueNotReady(usize),
}

/// The device half of virtio; the transport calls it from one thread at a time.
pub trait VirtioDevice: Send {
    /// Shown in messages and statistics, such as `block data`.
    fn name(&self) -> &str;

    /// One of [`device_type`].
    fn device_type(&self) -> u32;

    /// The largest size of each queue, powers of two.
    fn queue_sizes(&self) -> &[u16];

    /// Feature bits of the device itself; the transport adds those of the rings.
    fn features(&self) -> u64;

    /// Reads the configuration space; bytes beyond its end are left as they are (the transport zeroed them).
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes the configuration space; writes beyond its end or to read-only fields are ignored.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// What the device's thread does before all else: it gives up what it does not need. Called once, when the device is new.
    ///
    /// # Errors
    /// When the thread cannot be given what it needs.
    fn prepare(&mut self) -> io::Result<Prepare> {
        Ok(Box::new(reach::nothing))
    }

    /// Starts the device. Called only when it is not active.
    ///
    /// # Errors
    /// The transport then sets DEVICE_NEEDS_RESET.
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError>;

    /// Stops the device's worker, having completed or abandoned nothing: requests that were taken from a queue are
    /// completed first. Hands the queues back, or none if it was not active. The device may be activated again, with
    /// the same queues (a pause) or new ones (a reset); what it knows besides the queues survives.
    fn deactivate(&mut self) -> Vec<VirtQueue>;

    /// What the device knows besides its queues and must not forget in a snapshot, in a form of its own; of a device that is
    /// not active. `thread` is the device's, for what only that may do.
    ///
    /// # Errors
    /// When it cannot be had now.
    fn save(&mut self, _thread: &DeviceThread) -> io::Result<Vec<u8>> {
        Ok(vec![])
    }

    /// Takes over what [`Self::save`] gave, in a new device that is going to be activated with the queues of the saved one.
    ///
    /// # Errors
    /// When it is not understood or cannot be had here.
    fn restore(&mut self, own: &[u8]) -> io::Result<()> {
        match own {
            [] => Ok(()),
            _ => Err(io::Error::other(
                "this device keeps nothing, and the snapshot has something of it",
            )),
        }
    }

    /// Writes to the new and empty `layer` of its disk from here on, as the device `block` does, while it is not active. What was
    /// written to until now does not change any more; `merged`, if it is given, takes the place of what did not before.
    ///
    /// # Errors
    /// When the device has no disk, or the files are not its.
    fn add_layer(&mut self, _layer: File, _merged: Option<File>) -> Result<(), block::BlockError> {
        Err(block::BlockError::Kind(self.name().to_owned()))
    }

    /// Has its link begin at `plug` from here on, or nowhere, as the device `net` does, while it is not active.
    ///
    /// # Errors
    /// When the device has no link, or that is nothing for one.
    fn plug(&mut self, _plug: Option<OwnedFd>) -> Result<(), net::NetError> {
        Err(net::NetError::Kind(self.name().to_owned()))
    }

    /// Forgets what a driver made the device know, after [`Self::deactivate`] and before another driver comes.
    fn reset(&mut self) {}
}

/// Copies the part of `config` that a driver reads at `offset` into `data`.
pub fn read_config_bytes(config: &[u8], offset: u64, data: &mut [u8]) {
    let Ok(offset) = usize::try_from(offset) else {
        return;
    };
    for (to, from) in data.iter_mut().zip(config.iter().skip(offset)) {
        *to = *from;
    }
}

#[cfg(test)]
mod tests {
    use super::read_config_bytes;

    #[test]
    fn configuration_reads_stop_at_its_end() {
        let mut data = [9; 4];
        read_config_bytes(&[1, 2, 3], 1, &mut data);
        assert_eq!(data, [2, 3, 9, 9]);
        read_config_bytes(&[1, 2, 3], u64::MAX, &mut data);
        assert_eq!(data, [2, 3, 9, 9]);
    }
}
