//! The device as the transport sees it: features, configuration space, activation.

use super::backend::{BlockConfig, BlockError, Disk};
use super::engine::Engine;
use super::handler::Handler;
use super::{DISCARD_RANGES, QUEUE_SIZE, SECTOR, SEGMENTS, WRITE_ZEROES_RANGES};
use crate::virtio::queue::VirtQueue;
use crate::virtio::worker::{DeviceThread, Worker};
use crate::virtio::{ActivateError, Activation, VirtioDevice, device_type, read_config_bytes};
use std::fs::File;
use std::io;
use std::sync::Arc;
use virtio_bindings::virtio_blk as abi;

/// Length of the configuration space up to and with the fields of WRITE_ZEROES.
const CONFIG_LENGTH: usize = 60;

/// Sectors of 512 bytes in a block of the host's usual file systems: discarding less frees nothing.
const DISCARD_ALIGNMENT: u32 = 8;

/// A disk.
#[derive(Debug)]
pub struct Block {
    name: String,
    disk: Arc<Disk>,
    /// Here while the device is not active.
    engine: Option<Engine>,
    worker: Option<Worker<Handler>>,
}

impl Block {
    /// Checks and locks the file, and looks how I/O can be done here.
    ///
    /// # Errors
    /// When the file cannot be a disk, or is another VM's.
    pub fn new(config: BlockConfig) -> Result<Self, BlockError> {
        let disk = Disk::open(config)?;
        let engine = Engine::new(disk.files(), QUEUE_SIZE);
        Ok(Self::with(disk, engine))
    }

    pub(super) fn with(disk: Disk, engine: Engine) -> Self {
        Self {
            name: format!("block {}", disk.id),
            disk: Arc::new(disk),
            engine: Some(engine),
            worker: None,
        }
    }

    #[cfg(test)]
    pub(super) fn disk(&self) -> &Disk {
        &self.disk
    }

    /// struct virtio_blk_config, section 5.2.4.
    fn config(&self) -> [u8; CONFIG_LENGTH] {
        let mut config = [0; CONFIG_LENGTH];
        let mut put =
            |offset: usize, bytes: &[u8]| config[offset..offset + bytes.len()].copy_from_slice(bytes);
        put(0, &self.disk.sectors.to_le_bytes()); // capacity
        put(12, &u32::from(SEGMENTS).to_le_bytes()); // seg_max
        put(20, &(SECTOR as u32).to_le_bytes()); // blk_size
        if !self.disk.read_only {
            put(36, &u32::MAX.to_le_bytes()); // max_discard_sectors
            put(40, &DISCARD_RANGES.to_le_bytes()); // max_discard_seg
            put(44, &DISCARD_ALIGNMENT.to_le_bytes()); // discard_sector_alignment
            put(48, &u32::MAX.to_le_bytes()); // max_write_zeroes_sectors
            put(52, &WRITE_ZEROES_RANGES.to_le_bytes()); // max_write_zeroes_seg
            put(56, &[1]); // write_zeroes_may_unmap
        }
        config
    }
}

impl VirtioDevice for Block {
    fn name(&self) -> &str {
        &self.name
    }

    fn device_type(&self) -> u32 {
        device_type::BLOCK
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        let mut bits = vec![
            abi::VIRTIO_BLK_F_SEG_MAX,
            abi::VIRTIO_BLK_F_BLK_SIZE,
            abi::VIRTIO_BLK_F_FLUSH,
        ];
        if self.disk.read_only {
            bits.push(abi::VIRTIO_BLK_F_RO);
        } else {
            bits.extend([abi::VIRTIO_BLK_F_DISCARD, abi::VIRTIO_BLK_F_WRITE_ZEROES]);
        }
        bits.into_iter().fold(0, |features, bit| features | 1 << bit)
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.config(), offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let queue = activation.queues.into_iter().next().filter(VirtQueue::is_ready);
        let queue = queue.ok_or(ActivateError::QueueNotReady(0))?;
        let engine = self.engine.take();
        let handler = Handler {
            name: self.name.clone(),
            disk: self.disk.clone(),
            engine: engine.unwrap_or_else(|| Engine::plain(self.disk.files())),
            memory: activation.memory,
            queue,
            interrupt: activation.interrupt.clone(),
            writethrough: activation.features & 1 << abi::VIRTIO_BLK_F_FLUSH == 0,
            unsignalled: false,
            flushes: false,
            waiting: vec![],
            again_ms: None,
        };
        let worker = Worker::start(&activation.thread, activation.interrupt, handler);
        self.worker = Some(worker.map_err(ActivateError::Worker)?);
        Ok(())
    }

    fn deactivate(&mut self) -> Vec<VirtQueue> {
        let handler = self.worker.take().and_then(Worker::stop);
        let Some(Handler { engine, queue, .. }) = handler else {
            return vec![];
        };
        self.engine = Some(engine);
        self.disk.settle(&self.name);
        vec![queue]
    }

    fn save(&mut self, _thread: &DeviceThread) -> io::Result<Vec<u8>> {
        match self.disk.layers() {
            Some(chain) if !chain.is_written() => {
                Err(io::Error::other("the map of its layers cannot be written"))
            }
            _ => Ok(vec![]),
        }
    }

    fn add_layer(&mut self, layer: File, merged: Option<File>) -> Result<(), BlockError> {
        // Its thread is the only other one who has the disk.
        let Some(disk) = Arc::get_mut(&mut self.disk) else {
            return Err(BlockError::Busy(self.disk.id.clone()));
        };
        disk.add_layer(layer, merged)?;
        if let Some(engine) = &mut self.engine {
            engine.set_files(disk.files());
        }
        Ok(())
    }
}
