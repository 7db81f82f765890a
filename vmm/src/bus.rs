//! Who answers at which address: the one way from a vCPU's access to a device.

use crate::acpi;
use crate::layout;
use crate::serial::{SerialConsole, SerialState};
use crate::virtio::mmio::MmioTransport;
use lighter_protocol::monitor::StopReason;
use std::sync::{Arc, Mutex, PoisonError};

/// The devices of a VM by their addresses.
pub struct Bus {
    /// Virtio devices, one for each window from [`layout::VIRTIO_MMIO`] on.
    virtio: Vec<Arc<Mutex<MmioTransport>>>,
    serial: Mutex<SerialConsole>,
}

impl Bus {
    /// A bus with these devices.
    pub fn new(virtio: Vec<Arc<Mutex<MmioTransport>>>, serial: SerialConsole) -> Self {
        Self {
            virtio,
            serial: Mutex::new(serial),
        }
    }

    /// The virtio devices, in the order of their windows.
    pub fn virtio(&self) -> &[Arc<Mutex<MmioTransport>>] {
        &self.virtio
    }

    /// A vCPU reads device memory. Where nobody answers, all bits are set, as on hardware.
    pub fn memory_read(&self, address: u64, data: &mut [u8]) {
        match self.find(address) {
            Some((device, offset)) => {
                device
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .read(offset, data);
            }
            None => data.fill(0xff),
        }
    }

    /// A vCPU writes device memory.
    pub fn memory_write(&self, address: u64, data: &[u8]) {
        if let Some((device, offset)) = self.find(address) {
            device
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .write(offset, data);
        }
    }

    /// A vCPU reads a port.
    pub fn port_read(&self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        match (port, data) {
            (layout::SLEEP_CONTROL_PORT | layout::SLEEP_STATUS_PORT, [byte]) => *byte = 0,
            (port, [byte]) => {
                if let Some(register) = serial_register(port) {
                    *byte = self
                        .serial
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .read(register);
                }
            }
            _ => {}
        }
    }

    /// A vCPU writes a port; `Some` when that ends the VM.
    pub fn port_write(&self, port: u16, data: &[u8]) -> Option<StopReason> {
        let [byte] = *data else { return None };
        match port {
            layout::SLEEP_CONTROL_PORT if acpi::is_power_off(byte) => Some(StopReason::PowerOff),
            layout::RESET_PORT if byte == acpi::RESET_VALUE => Some(StopReason::Reset),
            port => {
                let register = serial_register(port)?;
                self.serial
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .write(register, byte);
                None
            }
        }
    }

    /// The console's registers.
    pub fn save_console(&self) -> SerialState {
        self.serial.lock().unwrap_or_else(PoisonError::into_inner).save()
    }

    /// Writes out what the console has buffered.
    pub fn flush_console(&self) {
        self.serial.lock().unwrap_or_else(PoisonError::into_inner).flush();
    }

    fn find(&self, address: u64) -> Option<(&Mutex<MmioTransport>, u64)> {
        let distance = address.checked_sub(layout::VIRTIO_MMIO)?;
        let number = usize::try_from(distance / layout::VIRTIO_MMIO_STRIDE).ok()?;
        Some((self.virtio.get(number)?, distance % layout::VIRTIO_MMIO_STRIDE))
    }
}

fn serial_register(port: u16) -> Option<u8> {
    let register = port
        .checked_sub(layout::SERIAL_PORT)
        .filter(|register| *register < layout::SERIAL_PORTS)?;
    u8::try_from(register).ok()
}
