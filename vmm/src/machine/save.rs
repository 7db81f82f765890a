//! A running machine to a snapshot, and back.

use super::Running;
use super::error::MachineError;
use super::kvm::{kvm_error, supported_cpuid};
use crate::bus::Bus;
use crate::cage::Cage;
use crate::cage::filters::Duty;
use crate::events::Events;
use crate::memory::GuestMemory;
use crate::snapshot::memory::{self, MemoryWriteError};
use crate::snapshot::{self, DeviceState, MachineState, SnapshotError, working_set};
use crate::threads;
use crate::vcpu::state::{VcpuState, VcpuStateError};
use crate::virtio::block::BlockError;
use crate::virtio::mmio::MmioTransport;
use kvm_bindings::{
    KVM_CLOCK_TSC_STABLE, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data,
    kvm_irqchip,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use lighter_protocol::causes::chain;
use lighter_protocol::monitor::{EventKind, Machine, RunState};
use std::fs::File;
use std::io;
use std::ptr;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

/// Why a machine cannot be saved.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// Its state changes.
    #[error("the VM runs: pause it first")]
    Running,
    /// The one before is not over.
    #[error("a snapshot of the VM is being written: wait for its end")]
    Busy,
    /// KVM refused.
    #[error("KVM does not give the {0}")]
    Kvm(&'static str, #[source] kvm_ioctls::Error),
    /// A vCPU.
    #[error(transparent)]
    Vcpu(#[from] VcpuStateError),
    /// A device.
    #[error("cannot save the device {device}")]
    Device {
        /// Its name.
        device: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The file of the state.
    #[error(transparent)]
    State(#[from] SnapshotError),
    /// The file of memory.
    #[error(transparent)]
    Memory(#[from] MemoryWriteError),
    /// Nobody to wait for it.
    #[error("cannot start the thread that waits for guest memory to be written")]
    Thread(#[source] io::Error),
}

/// Why a working set cannot be noted.
#[derive(Debug, thiserror::Error)]
pub enum WorkingSetError {
    /// Its memory is no snapshot's.
    #[error("the VM was booted: only one that goes on from a snapshot has a working set")]
    Booted,
    /// The kernel does not tell, or the file cannot be written.
    #[error("cannot note which pages were touched")]
    Note(#[source] io::Error),
}

/// Why a disk gets no other layer.
#[derive(Debug, thiserror::Error)]
pub enum LayerAddError {
    /// Its disk changes.
    #[error("the VM runs: pause it first")]
    Running,
    /// None of that name.
    #[error("the VM has no disk {0}")]
    NoSuchDisk(String),
    /// The disk.
    #[error(transparent)]
    Block(#[from] BlockError),
}

/// Where guest memory lies in this process, as one mapping, and its length.
fn host_mapping(memory: &GuestMemory) -> (*mut u8, usize) {
    // The regions lie side by side, in their order.
    let start = memory
        .iter()
        .next()
        .map_or(ptr::null_mut(), |region| region.as_ptr());
    // Each fits, as the whole does.
    (start, memory.iter().map(|region| region.len() as usize).sum())
}

/// Begins to have ready what was noted in `noted` of the snapshot's memory `file`, which is mapped as `memory`.
pub(super) fn prefetch(memory: &GuestMemory, file: File, mut noted: File, cage: Cage) -> io::Result<()> {
    let memory = memory.clone();
    let work = move || {
        // Without it the guest only waits for its pages.
        if cage.confine(Duty::Prefetch).is_err() {
            return;
        }
        let (start, bytes) = host_mapping(&memory);
        let parts = working_set::read(&mut noted, bytes);
        // SAFETY: `read` gives parts of a mapping of that length, which is never unmapped.
        unsafe { working_set::prefetch(start, &file, &parts) };
    };
    threads::builder("prefetch").spawn(work).map(drop)
}

const CHIPS: [u32; 3] = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];

impl Running {
    /// Saves the paused machine; memory is being written when this returns, and the machine may go on. The end is an event.
    ///
    /// # Errors
    /// When nothing is going to be written any more. The files are useless then.
    pub fn save(&mut self, mut state: File, memory: File, events: &Events) -> Result<(), SaveError> {
        if self.state != RunState::Paused {
            return Err(SaveError::Running);
        }
        if self.saving.load(Ordering::SeqCst) {
            return Err(SaveError::Busy);
        }
        snapshot::write(&self.machine_state()?, &mut state)?;
        let writer = memory::begin(&self.memory, &memory)?;
        let (saving, events) = (self.saving.clone(), events.clone());
        saving.store(true, Ordering::SeqCst);
        let wait = move || {
            let event = match writer.wait() {
                Ok(()) => EventKind::Saved,
                Err(error) => EventKind::SaveFailed {
                    reason: chain(&error),
                },
            };
            saving.store(false, Ordering::SeqCst);
            events.send(event);
        };
        match threads::builder("save").spawn(wait) {
            Ok(_) => Ok(()),
            Err(error) => {
                self.saving.store(false, Ordering::SeqCst);
                Err(SaveError::Thread(error))
            }
        }
    }

    /// Notes into `file` what memory was touched since the machine went on.
    ///
    /// # Errors
    /// When it was booted, or that cannot be known or written.
    pub fn note_working_set(&self, mut file: File) -> Result<(), WorkingSetError> {
        let pagemap = self.pagemap.as_ref().ok_or(WorkingSetError::Booted)?;
        let (start, bytes) = host_mapping(&self.memory);
        let parts = working_set::find(pagemap, start, bytes).map_err(WorkingSetError::Note)?;
        working_set::write(&parts, &mut file).map_err(WorkingSetError::Note)
    }

    /// Has the disk `id` of the paused machine written to another layer from here on: see
    /// [`lighter_protocol::monitor::Request::AddLayer`].
    ///
    /// # Errors
    /// When that cannot be; the disk is as it was.
    pub fn add_layer(&mut self, id: &str, layer: File, merged: Option<File>) -> Result<(), LayerAddError> {
        if self.state != RunState::Paused {
            return Err(LayerAddError::Running);
        }
        let name = format!("block {id}");
        for device in self.bus.virtio() {
            let mut device = device.lock().unwrap_or_else(PoisonError::into_inner);
            if device.name() == name {
                return Ok(device.add_layer(layer, merged)?);
            }
        }
        Err(LayerAddError::NoSuchDisk(id.to_owned()))
    }

    fn machine_state(&self) -> Result<MachineState, SaveError> {
        // Devices before interrupt controllers: what they have raised is in those then.
        let devices = self.bus.virtio().iter().map(|device| {
            let mut device = device.lock().unwrap_or_else(PoisonError::into_inner);
            save_device(&mut device)
        });
        let devices = devices.collect::<Result<_, _>>()?;
        let vcpus = self
            .vcpus
            .each_paused(|number, vcpu| VcpuState::save(&self.kvm, vcpu, &self.cpuids[number]))?;
        let mut irqchips = CHIPS.map(|chip_id| kvm_irqchip {
            chip_id,
            ..Default::default()
        });
        for chip in &mut irqchips {
            self.vm
                .get_irqchip(chip)
                .map_err(|source| SaveError::Kvm("interrupt controllers", source))?;
        }
        let clock = self.vm.get_clock();
        let clock = clock.map_err(|source| SaveError::Kvm("clock", source))?;
        Ok(MachineState {
            memory_mib: self.description.memory_mib,
            vcpus,
            irqchips,
            clock,
            devices,
            serial: self.bus.save_console(),
        })
    }
}

fn save_device(device: &mut MmioTransport) -> Result<DeviceState, SaveError> {
    let name = device.name().to_owned();
    let failed = |source| SaveError::Device {
        device: name.clone(),
        source,
    };
    let own = device.save_device().map_err(failed)?;
    let transport = device.save().ok_or_else(|| failed(io::Error::other("it runs")))?;
    Ok(DeviceState { name, transport, own })
}

/// Whether this host can go on with the vCPUs that `description` has, as they were saved.
///
/// # Errors
/// What it lacks.
pub(super) fn check(saved: &MachineState, description: &Machine, kvm: &Kvm) -> Result<(), MachineError> {
    if saved.vcpus.len() != usize::from(description.cpus) {
        let words = |cpus: usize| format!("{cpus} CPUs");
        return Err(MachineError::Other {
            saved: words(saved.vcpus.len()),
            here: words(description.cpus.into()),
        });
    }
    let supported = supported_cpuid(kvm)?;
    Ok(saved.vcpus.iter().try_for_each(|vcpu| vcpu.check(&supported))?)
}

/// Makes a new machine, of which nothing has run and whose vCPUs were [`check`]ed, the saved one, and starts its devices.
///
/// # Errors
/// When it is not built alike, or this host's KVM does not take it.
pub(super) fn restore(
    saved: &MachineState,
    kvm: &Kvm,
    vm: &VmFd,
    vcpus: &[VcpuFd],
    bus: &Bus,
) -> Result<(), MachineError> {
    compare(saved, bus)?;
    for (saved, vcpu) in saved.vcpus.iter().zip(vcpus) {
        saved.restore(kvm, vcpu)?;
    }
    for chip in &saved.irqchips {
        vm.set_irqchip(chip)
            .map_err(kvm_error("restore the interrupt controllers"))?;
    }
    // The guest's clock goes on where it stood: what its kernel and programs measure has no jump. The time of day is the
    // agent's to set.
    let clock = kvm_clock_data {
        clock: saved.clock.clock,
        flags: saved.clock.flags & !KVM_CLOCK_TSC_STABLE & !CLOCK_HOST_TIMES,
        ..Default::default()
    };
    vm.set_clock(&clock).map_err(kvm_error("restore the clock"))?;
    for (saved, device) in saved.devices.iter().zip(bus.virtio()) {
        let mut device = device.lock().unwrap_or_else(PoisonError::into_inner);
        let restored = device.restore(&saved.transport, &saved.own);
        restored.map_err(|source| MachineError::Device {
            device: saved.name.clone(),
            source,
        })?;
    }
    for device in bus.virtio() {
        let mut device = device.lock().unwrap_or_else(PoisonError::into_inner);
        device.resume();
        device.remind_driver();
    }
    Ok(())
}

/// KVM_CLOCK_REALTIME and KVM_CLOCK_HOST_TSC: the host's times that KVM tells beside its clock.
const CLOCK_HOST_TIMES: u32 = 1 << 2 | 1 << 3;

fn compare(saved: &MachineState, bus: &Bus) -> Result<(), MachineError> {
    let names = bus.virtio().iter().map(|device| {
        let device = device.lock().unwrap_or_else(PoisonError::into_inner);
        device.name().to_owned()
    });
    let words = |names: Vec<String>| format!("the devices {}", names.join(", "));
    let here = words(names.collect());
    let saved = words(saved.devices.iter().map(|device| device.name.clone()).collect());
    match here == saved {
        true => Ok(()),
        false => Err(MachineError::Other { saved, here }),
    }
}
