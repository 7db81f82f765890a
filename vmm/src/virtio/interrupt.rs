//! From a device to its driver: the interrupt line and the two bits that say why (section 4.2.2, InterruptStatus).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use vmm_sys_util::eventfd::EventFd;

/// A buffer was used.
pub const USED_RING: u32 = 1;
/// The configuration space or the device's status changed.
pub const CONFIG_CHANGE: u32 = 2;

/// A device's interrupt; clones are the same line.
#[derive(Clone, Debug)]
pub struct Interrupt {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    /// Why the line was raised; the driver acknowledges bits.
    status: AtomicU32,
    /// The device has failed and waits for a reset.
    needs_reset: AtomicBool,
    /// Wired to the interrupt controller by KVM (irqfd).
    line: EventFd,
}

impl Interrupt {
    /// An interrupt that raises `line`.
    pub fn new(line: EventFd) -> Self {
        let status = AtomicU32::new(0);
        Self {
            shared: Arc::new(Shared {
                status,
                needs_reset: AtomicBool::new(false),
                line,
            }),
        }
    }

    /// Tells the driver that a queue has used buffers.
    pub fn used_ring(&self) {
        self.raise(USED_RING);
    }

    /// Tells the driver to read the configuration space again.
    pub fn config_changed(&self) {
        self.raise(CONFIG_CHANGE);
    }

    /// Tells the driver that the device is dead until it is reset (DEVICE_NEEDS_RESET, section 2.1.2).
    pub fn device_failed(&self) {
        self.shared.needs_reset.store(true, Ordering::SeqCst);
        self.config_changed();
    }

    /// Whether [`Self::device_failed`] was said since the last [`Self::reset`].
    pub fn needs_reset(&self) -> bool {
        self.shared.needs_reset.load(Ordering::SeqCst)
    }

    /// The bits of InterruptStatus.
    pub fn status(&self) -> u32 {
        self.shared.status.load(Ordering::SeqCst)
    }

    /// The driver's InterruptACK.
    pub fn acknowledge(&self, bits: u32) {
        self.shared.status.fetch_and(!bits, Ordering::SeqCst);
    }

    /// Sets the bits of InterruptStatus and whether the device had failed, of a saved device, without telling the driver.
    pub fn restore(&self, bits: u32, needs_reset: bool) {
        self.shared.status.store(bits, Ordering::SeqCst);
        self.shared.needs_reset.store(needs_reset, Ordering::SeqCst);
    }

    /// Forgets everything, for a device reset.
    pub fn reset(&self) {
        self.shared.status.store(0, Ordering::SeqCst);
        self.shared.needs_reset.store(false, Ordering::SeqCst);
    }

    /// The line, to be wired to the interrupt controller.
    pub fn line(&self) -> &EventFd {
        &self.shared.line
    }

    fn raise(&self, bit: u32) {
        self.shared.status.fetch_or(bit, Ordering::SeqCst);
        // An eventfd's counter can only be full after 2^64-2 writes nobody read; the line is then raised anyway.
        let _ = self.shared.line.write(1);
    }
}
