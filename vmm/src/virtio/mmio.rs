//! The MMIO transport (virtio 1.2, section 4.2): a device's registers as its driver sees them.
//!
//! Owns the queues while the driver sets them up, moves them into the device at DRIVER_OK, and takes them back at a reset,
//! for a pause, or to save them. The driver's notifications do not come through here: KVM turns them into eventfds.

use super::block::BlockError;
use super::interrupt::Interrupt;
use super::net::NetError;
use super::queue::{Counters, RingState, VirtQueue};
use super::worker::{self, DeviceThread, Prepare, Severity};
use super::{Activation, VirtioDevice, device_type};
use crate::memory::GuestMemory;
use lighter_protocol::causes::chain;
use lighter_protocol::monitor::QueueStatistics;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use virtio_queue::{Queue, QueueT};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Register offsets, section 4.2.2.
mod register {
    pub const MAGIC_VALUE: u64 = 0x000;
    pub const VERSION: u64 = 0x004;
    pub const DEVICE_ID: u64 = 0x008;
    pub const VENDOR_ID: u64 = 0x00c;
    pub const DEVICE_FEATURES: u64 = 0x010;
    pub const DEVICE_FEATURES_SEL: u64 = 0x014;
    pub const DRIVER_FEATURES: u64 = 0x020;
    pub const DRIVER_FEATURES_SEL: u64 = 0x024;
    pub const QUEUE_SEL: u64 = 0x030;
    pub const QUEUE_NUM_MAX: u64 = 0x034;
    pub const QUEUE_NUM: u64 = 0x038;
    pub const QUEUE_READY: u64 = 0x044;
    pub const QUEUE_NOTIFY: u64 = 0x050;
    pub const INTERRUPT_STATUS: u64 = 0x060;
    pub const INTERRUPT_ACK: u64 = 0x064;
    pub const STATUS: u64 = 0x070;
    pub const QUEUE_DESC_LOW: u64 = 0x080;
    pub const QUEUE_DESC_HIGH: u64 = 0x084;
    pub const QUEUE_DRIVER_LOW: u64 = 0x090;
    pub const QUEUE_DRIVER_HIGH: u64 = 0x094;
    pub const QUEUE_DEVICE_LOW: u64 = 0x0a0;
    pub const QUEUE_DEVICE_HIGH: u64 = 0x0a4;
    pub const SHM_LEN_LOW: u64 = 0x0b0;
    pub const SHM_BASE_HIGH: u64 = 0x0bc;
    pub const CONFIG_GENERATION: u64 = 0x0fc;
    pub const CONFIG: u64 = 0x100;
}

/// Where the driver's notifications are written, from the start of the register window.
pub const QUEUE_NOTIFY_OFFSET: u64 = register::QUEUE_NOTIFY;

/// "virt", little-endian.
const MAGIC: u32 = 0x7472_6976;
/// "LGHT", little-endian.
const VENDOR: u32 = 0x5448_474c;

/// Device status bits, section 2.1.
mod status {
    pub const ACKNOWLEDGE: u32 = 1;
    pub const DRIVER: u32 = 2;
    pub const DRIVER_OK: u32 = 4;
    pub const FEATURES_OK: u32 = 8;
    pub const DEVICE_NEEDS_RESET: u32 = 64;
    pub const FAILED: u32 = 128;
    pub const KNOWN: u32 = ACKNOWLEDGE | DRIVER | DRIVER_OK | FEATURES_OK | FAILED;
}

/// VIRTIO_F_RING_INDIRECT_DESC, VIRTIO_F_RING_EVENT_IDX, VIRTIO_F_VERSION_1.
const RING_FEATURES: u64 = 1 << 28 | EVENT_IDX | VERSION_1;
const EVENT_IDX: u64 = 1 << 29;
const VERSION_1: u64 = 1 << 32;

/// Where a device's queues are.
enum Rings {
    /// Here: the driver is setting them up.
    Idle(Vec<Queue>),
    /// In the running device. Which of them the driver had set up is all that is left here.
    Active {
        /// By number.
        ready: Vec<bool>,
    },
    /// Here: the device was running and is paused.
    Paused(Vec<VirtQueue>),
}

/// A device with its registers.
pub struct MmioTransport {
    device: Box<dyn VirtioDevice>,
    memory: GuestMemory,
    interrupt: Interrupt,
    kicks: Vec<Arc<EventFd>>,
    counters: Vec<Arc<Counters>>,
    rings: Rings,
    thread: DeviceThread,
    /// What came of its thread's preparation, until that is known.
    prepared: Option<Receiver<io::Result<()>>>,
    status: u32,
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: u32,
}

/// A transport with its rings as plain data; the device's own state is saved by the device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransportState {
    status: u32,
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: u32,
    interrupt_status: u32,
    rings: Vec<RingState>,
}

/// Why a device cannot go on as a saved one.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// Its driver relies on a feature that this monitor does not offer.
    #[error("its driver uses features {0:#x} that this monitor does not offer")]
    Features(u64),
    /// The device has other queues.
    #[error("the device has {here} queues and not {saved}")]
    Queues {
        /// In the snapshot.
        saved: usize,
        /// Here.
        here: usize,
    },
    /// No driver could have set it up so.
    #[error("queue {queue} cannot have been set up so")]
    Ring {
        /// Which.
        queue: usize,
        /// What is wrong.
        #[source]
        source: virtio_queue::Error,
    },
    /// Nor so.
    #[error("queue {0} is not in guest memory, or larger than the device allows")]
    Place(usize),
    /// What the device knows besides its queues.
    #[error("what the device knows cannot be restored")]
    Own(#[source] io::Error),
}

impl MmioTransport {
    /// Gives `device` its registers, and a thread that does `prepare` first; it raises `line`.
    ///
    /// # Errors
    /// When the host has no eventfd or thread to give.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        memory: GuestMemory,
        line: EventFd,
        prepare: Prepare,
    ) -> io::Result<Self> {
        let (thread, prepared) = DeviceThread::start(device.name(), prepare)?;
        let count = device.queue_sizes().len();
        let kicks = (0..count)
            .map(|_| EventFd::new(EFD_NONBLOCK).map(Arc::new))
            .collect::<io::Result<_>>()?;
        let counters = (0..count).map(|_| Arc::default()).collect();
        let rings = Rings::Idle(new_queues(&*device)?);
        Ok(Self {
            device,
            memory,
            interrupt: Interrupt::new(line),
            kicks,
            counters,
            rings,
            thread,
            prepared: Some(prepared),
            status: 0,
            device_features_sel: 0,
            driver_features_sel: 0,
            driver_features: 0,
            queue_sel: 0,
        })
    }

    /// Waits until the device's thread has prepared itself.
    ///
    /// # Errors
    /// When it could not: it is gone then.
    pub fn wait_prepared(&mut self) -> io::Result<()> {
        let Some(prepared) = self.prepared.take() else {
            return Ok(());
        };
        prepared.recv().map_err(io::Error::other)?
    }

    /// Shown in messages and statistics.
    pub fn name(&self) -> &str {
        self.device.name()
    }

    /// Eventfds of the driver's notifications, one for each queue.
    pub fn kicks(&self) -> &[Arc<EventFd>] {
        &self.kicks
    }

    /// The device's interrupt.
    pub fn interrupt(&self) -> &Interrupt {
        &self.interrupt
    }

    /// Counters of each queue.
    pub fn statistics(&self) -> Vec<QueueStatistics> {
        self.counters.iter().map(|counters| counters.snapshot()).collect()
    }

    /// Stops the device; requests that it took from its queues are completed. Does nothing to a device that is not active.
    pub fn pause(&mut self) {
        if matches!(self.rings, Rings::Active { .. }) {
            self.rings = Rings::Paused(self.device.deactivate());
        }
    }

    /// Undoes [`Self::pause`].
    pub fn resume(&mut self) {
        if let Rings::Paused(queues) = &mut self.rings {
            let queues = std::mem::take(queues);
            self.start_device(queues);
        }
    }

    /// What the device itself keeps; see [`VirtioDevice::save`].
    ///
    /// # Errors
    /// When it cannot be had now.
    pub fn save_device(&mut self) -> io::Result<Vec<u8>> {
        self.device.save(&self.thread)
    }

    /// Makes this new device one that was saved, and paused.
    ///
    /// # Errors
    /// When it cannot have been this device's state.
    pub fn restore(&mut self, state: &TransportState, own: &[u8]) -> Result<(), RestoreError> {
        let foreign = state.driver_features & !self.offered();
        if state.status & status::FEATURES_OK != 0 && foreign != 0 {
            return Err(RestoreError::Features(foreign));
        }
        let sizes = self.device.queue_sizes();
        if sizes.len() != state.rings.len() {
            return Err(RestoreError::Queues {
                saved: state.rings.len(),
                here: sizes.len(),
            });
        }
        let active = state.status & (status::DRIVER_OK | status::DEVICE_NEEDS_RESET) == status::DRIVER_OK;
        let mut rings = vec![];
        for (queue, (ring, size)) in state.rings.iter().zip(sizes).enumerate() {
            let ring = ring.restore();
            let ring = ring.map_err(|source| RestoreError::Ring { queue, source })?;
            // Of a device that does not run, drivers can have made anything: its queues are looked at when it is started.
            if ring.max_size() != *size || active && ring.ready() && !ring.is_valid(&*self.memory) {
                return Err(RestoreError::Place(queue));
            }
            rings.push(ring);
        }
        self.device.restore(own).map_err(RestoreError::Own)?;
        self.rings = match active {
            true => Rings::Paused(self.with_kicks(rings)),
            false => Rings::Idle(rings),
        };
        self.status = state.status & status::KNOWN;
        self.device_features_sel = state.device_features_sel;
        self.driver_features_sel = state.driver_features_sel;
        self.driver_features = state.driver_features;
        self.queue_sel = state.queue_sel;
        self.interrupt.restore(
            state.interrupt_status,
            state.status & status::DEVICE_NEEDS_RESET != 0,
        );
        Ok(())
    }

    /// Tells the driver of a device that was restored and resumed to look at its queues: the interrupt that it was saved
    /// with may have been on its way.
    pub fn remind_driver(&self) {
        if matches!(self.rings, Rings::Active { .. }) {
            self.interrupt.used_ring();
            // Its link may be in another state than it was.
            if self.device.device_type() == device_type::NET {
                self.interrupt.config_changed();
            }
        }
    }

    /// See [`VirtioDevice::add_layer`].
    ///
    /// # Errors
    /// When that cannot be.
    pub fn add_layer(&mut self, layer: File, merged: Option<File>) -> Result<(), BlockError> {
        match self.rings {
            Rings::Active { .. } => Err(BlockError::Busy(self.device.name().to_owned())),
            _ => self.device.add_layer(layer, merged),
        }
    }

    /// See [`VirtioDevice::plug`]; a running device goes on with what it is given, and its driver is told.
    ///
    /// # Errors
    /// When that cannot be; a link that there was is gone then, too.
    pub fn plug(&mut self, plug: Option<OwnedFd>) -> Result<(), NetError> {
        let runs = matches!(self.rings, Rings::Active { .. });
        self.pause();
        let plugged = self.device.plug(plug);
        if runs {
            self.resume();
        }
        self.interrupt.config_changed();
        plugged
    }

    fn with_kicks(&self, rings: Vec<Queue>) -> Vec<VirtQueue> {
        let kicks = self.kicks.iter().zip(&self.counters);
        let queues = rings.into_iter().zip(kicks);
        queues
            .map(|(ring, (kick, counters))| VirtQueue::new(ring, kick.clone(), counters.clone()))
            .collect()
    }

    /// The registers and rings as plain data, or `None` while the device runs.
    pub fn save(&self) -> Option<TransportState> {
        let rings = match &self.rings {
            Rings::Idle(queues) => queues.iter().map(|queue| queue.state().into()).collect(),
            Rings::Paused(queues) => queues.iter().map(VirtQueue::save).collect(),
            Rings::Active { .. } => return None,
        };
        Some(TransportState {
            status: self.status(),
            device_features_sel: self.device_features_sel,
            driver_features_sel: self.driver_features_sel,
            driver_features: self.driver_features,
            queue_sel: self.queue_sel,
            interrupt_status: self.interrupt.status(),
            rings,
        })
    }

    /// The driver reads `data.len()` bytes at `offset` of the window.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if offset >= register::CONFIG {
            self.device.read_config(offset - register::CONFIG, data);
            return;
        }
        let Ok(data) = <&mut [u8; 4]>::try_from(data) else {
            return;
        };
        *data = self.read_register(offset).to_le_bytes();
    }

    fn read_register(&self, offset: u64) -> u32 {
        match offset {
            register::MAGIC_VALUE => MAGIC,
            register::VERSION => 2,
            register::DEVICE_ID => self.device.device_type(),
            register::VENDOR_ID => VENDOR,
            register::DEVICE_FEATURES => half(self.offered(), self.device_features_sel),
            register::QUEUE_NUM_MAX => {
                let size = self.device.queue_sizes().get(self.queue_sel as usize);
                size.copied().map_or(0, u32::from)
            }
            register::QUEUE_READY => self.queue_ready().into(),
            register::INTERRUPT_STATUS => self.interrupt.status(),
            register::STATUS => self.status(),
            // No device has shared memory: its length reads as -1.
            register::SHM_LEN_LOW..=register::SHM_BASE_HIGH => u32::MAX,
            register::CONFIG_GENERATION => 0,
            _ => 0,
        }
    }

    /// The driver writes `data` at `offset` of the window.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        if offset >= register::CONFIG {
            self.device.write_config(offset - register::CONFIG, data);
            return;
        }
        let Ok(value) = data.try_into().map(u32::from_le_bytes) else {
            return;
        };
        match offset {
            register::DEVICE_FEATURES_SEL => self.device_features_sel = value,
            register::DRIVER_FEATURES_SEL => self.driver_features_sel = value,
            register::DRIVER_FEATURES => self.write_driver_features(value),
            register::QUEUE_SEL => self.queue_sel = value,
            register::INTERRUPT_ACK => self.interrupt.acknowledge(value),
            register::STATUS => self.write_status(value),
            // Without KVM's help (a queue that does not exist, or a wrong width), nobody listens.
            register::QUEUE_NOTIFY => {}
            _ => self.write_queue_register(offset, value),
        }
    }

    fn offered(&self) -> u64 {
        self.device.features() | RING_FEATURES
    }

    fn status(&self) -> u32 {
        if self.interrupt.needs_reset() {
            self.status | status::DEVICE_NEEDS_RESET
        } else {
            self.status
        }
    }

    fn queue_ready(&self) -> bool {
        let number = self.queue_sel as usize;
        match &self.rings {
            Rings::Idle(queues) => queues.get(number).is_some_and(QueueT::ready),
            Rings::Paused(queues) => queues.get(number).is_some_and(VirtQueue::is_ready),
            Rings::Active { ready } => ready.get(number).is_some_and(|ready| *ready),
        }
    }

    fn write_driver_features(&mut self, value: u32) {
        // Once agreed on, features are fixed until a reset (section 3.1.1).
        if self.status & status::FEATURES_OK != 0 {
            return;
        }
        match self.driver_features_sel {
            0 => self.driver_features = self.driver_features & !u64::from(u32::MAX) | u64::from(value),
            1 => self.driver_features = self.driver_features & u64::from(u32::MAX) | u64::from(value) << 32,
            _ => {}
        }
    }

    fn write_queue_register(&mut self, offset: u64, value: u32) {
        let Rings::Idle(queues) = &mut self.rings else {
            return;
        };
        let Some(queue) = queues.get_mut(self.queue_sel as usize) else {
            return;
        };
        if offset == register::QUEUE_READY {
            queue.set_ready(value == 1);
            return;
        }
        if queue.ready() {
            return;
        }
        match offset {
            // A size that is not allowed is ignored, and the queue is found invalid when the device starts.
            register::QUEUE_NUM => queue.set_size(u16::try_from(value).unwrap_or(0)),
            register::QUEUE_DESC_LOW => queue.set_desc_table_address(Some(value), None),
            register::QUEUE_DESC_HIGH => queue.set_desc_table_address(None, Some(value)),
            register::QUEUE_DRIVER_LOW => queue.set_avail_ring_address(Some(value), None),
            register::QUEUE_DRIVER_HIGH => queue.set_avail_ring_address(None, Some(value)),
            register::QUEUE_DEVICE_LOW => queue.set_used_ring_address(Some(value), None),
            register::QUEUE_DEVICE_HIGH => queue.set_used_ring_address(None, Some(value)),
            _ => {}
        }
    }

    fn write_status(&mut self, value: u32) {
        if value == 0 {
            self.reset();
            return;
        }
        // A driver only ever adds bits (section 2.1.1).
        let added = value & status::KNOWN & !self.status;
        self.status |= added;
        if added & status::FEATURES_OK != 0 {
            let foreign = self.driver_features & !self.offered();
            if foreign != 0 || self.driver_features & VERSION_1 == 0 {
                self.status &= !status::FEATURES_OK;
            }
        }
        if added & status::DRIVER_OK != 0 {
            self.activate();
        }
    }

    fn activate(&mut self) {
        if self.status & status::FEATURES_OK == 0 {
            self.fail("the driver started it before features were agreed on");
            return;
        }
        let Rings::Idle(rings) = &mut self.rings else {
            return;
        };
        if rings
            .iter()
            .any(|ring| ring.ready() && !ring.is_valid(&*self.memory))
        {
            self.fail("the driver placed a queue outside of memory");
            return;
        }
        let event_idx = self.driver_features & EVENT_IDX != 0;
        let mut rings = std::mem::take(rings);
        for ring in &mut rings {
            ring.set_event_idx(event_idx);
        }
        self.start_device(self.with_kicks(rings));
    }

    fn start_device(&mut self, queues: Vec<VirtQueue>) {
        self.rings = Rings::Active {
            ready: queues.iter().map(VirtQueue::is_ready).collect(),
        };
        let activation = Activation {
            memory: self.memory.clone(),
            queues,
            interrupt: self.interrupt.clone(),
            features: self.driver_features,
            thread: self.thread.clone(),
        };
        if let Err(error) = self.device.activate(activation) {
            // The queues went with it. New ones are as good, until a reset and in a snapshot: nothing is done with them.
            self.rings = Rings::Idle(new_queues(&*self.device).unwrap_or_default());
            self.fail(&chain(&error));
        }
    }

    fn fail(&self, reason: &str) {
        self.interrupt.device_failed();
        worker::report(Severity::Failed, self.device.name(), reason);
    }

    fn reset(&mut self) {
        self.device.deactivate();
        self.device.reset();
        self.interrupt.reset();
        self.status = 0;
        self.device_features_sel = 0;
        self.driver_features_sel = 0;
        self.driver_features = 0;
        self.queue_sel = 0;
        for kick in &self.kicks {
            // A notification for a ring that is gone. WouldBlock: there was none.
            let _ = kick.read();
        }
        // Worked in `new` with the same sizes.
        self.rings = Rings::Idle(new_queues(&*self.device).unwrap_or_default());
    }
}

fn new_queues(device: &dyn VirtioDevice) -> io::Result<Vec<Queue>> {
    device
        .queue_sizes()
        .iter()
        .map(|size| Queue::new(*size).map_err(io::Error::other))
        .collect()
}

/// The low (0) or high (1) half of `features`; drivers may ask for more, all zero.
fn half(features: u64, select: u32) -> u32 {
    match select {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}

#[cfg(test)]
#[path = "mmio_tests.rs"]
mod tests;
