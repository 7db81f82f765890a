//! A machine from its description: built in the order of the functions here, then running.

mod devices;
mod error;
mod kvm;
mod save;

pub use error::{MAX_CPUS, MachineError};
pub use save::SaveError;

use crate::bus::Bus;
use crate::cage::Cage;
use crate::cage::filters::Duty;
use crate::cage::processes::Standing;
use crate::descriptors::Inherited;
use crate::events::Events;
use crate::layout;
use crate::memory::{self, GuestMemory};
use crate::snapshot::{self, working_set};
use crate::vcpu::registers;
use crate::vcpu::thread::{ExitCounters, Surroundings, Vcpus};
use crate::virtio::balloon::Balloon;
use crate::virtio::mmio::MmioTransport;
use crate::virtio::net::{NAME as NET, NetError};
use crate::virtio::worker::{self, Severity};
use crate::{acpi, boot, vcpu};
use kvm::{create_vcpus, create_vm, irq_line, supported_cpuid, take_kvm};
use kvm_bindings::CpuId;
use kvm_ioctls::{Kvm, VmFd};
use lighter_protocol::monitor::{EventKind, Kernel, Machine, RunState, Start, Statistics, StopReason};
use std::fs::File;
use std::io;
use std::os::fd::{IntoRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

/// A machine whose vCPUs run.
pub struct Running {
    description: Machine,
    state: RunState,
    vcpus: Vcpus,
    bus: Arc<Bus>,
    exits: Arc<ExitCounters>,
    returned_bytes: Arc<AtomicU64>,
    power_button: EventFd,
    memory: GuestMemory,
    /// Of this process; there is one if it goes on from a snapshot.
    pagemap: Option<File>,
    /// Memory of a snapshot is being written.
    saving: Arc<AtomicBool>,
    kvm: Kvm,
    /// What each vCPU was given.
    cpuids: Vec<CpuId>,
    /// Closed after the vCPUs.
    vm: VmFd,
}

/// Memory that the monitor may map for itself, bytes: threads, buffers, and what it knows of a million shared files.
const OWN_MEMORY: u64 = 1 << 30;

/// Called once for the end of the VM by whichever vCPU saw it.
pub type OnStop = Arc<dyn Fn(StopReason) + Send + Sync>;

/// Builds the machine and starts it, in the cage. The process is where `standing` says, and has one thread; `inherited` has the
/// descriptors besides those of control and events.
///
/// # Errors
/// See [`MachineError`]; nothing is left running then.
pub fn start(
    description: Machine,
    standing: Standing,
    inherited: &mut Inherited,
    events: &Events,
    on_stop: OnStop,
) -> Result<Running, MachineError> {
    let cpus = u8::try_from(description.cpus)
        .ok()
        .filter(|cpus| (1..=MAX_CPUS).contains(&(*cpus).into()));
    let cpus = cpus.ok_or(MachineError::Cpus(description.cpus))?;
    let kvm = take_kvm(inherited.take(description.kvm, "KVM")?.into_raw_fd())?;
    let mut working_set = None;
    let (memory, saved) = match &description.start {
        Start::Kernel(_) => (memory::create(description.memory_mib)?, None),
        Start::Snapshot(snapshot) => {
            let mut state = File::from(inherited.take(snapshot.state, "snapshot's state")?);
            let file = File::from(inherited.take(snapshot.memory, "snapshot's memory")?);
            let saved = snapshot::read(&mut state)?;
            save::check(&saved, &description, &kvm)?;
            let memory = memory::map_file(description.memory_mib, &file)?;
            if let Some(number) = snapshot.working_set {
                let noted = File::from(inherited.take(number, "snapshot's working set")?);
                working_set = Some((file, noted));
            }
            (memory, Some(saved))
        }
    };
    let vm = create_vm(&kvm, &memory)?;
    let balloon = Balloon::new();
    let returned_bytes = balloon.returned_bytes();
    let devices = devices::make_devices(&description, inherited, balloon)?;
    let pagemap = match &description.start {
        Start::Kernel(_) => None,
        Start::Snapshot(_) => {
            let pagemap = working_set::open_pagemap();
            Some(pagemap.map_err(|error| MachineError::Os("the table of pages", error))?)
        }
    };
    // From here on no path leads anywhere: all that is used is open.
    let entering = Cage::enter(memory::size(&memory) + OWN_MEMORY, standing)?;
    let cage = entering.cage();
    let serial = saved.as_ref().map(|saved| &saved.serial);
    let bus = devices::attach(&description, inherited, &vm, &memory, devices, serial, cage)?;
    let bus = Arc::new(bus);
    write_generation_id(&memory)?;
    let entry = match &description.start {
        Start::Kernel(kernel) => Some(load(kernel, inherited, &memory, &bus, cpus)?),
        Start::Snapshot(_) => None,
    };
    let cpuids = match &saved {
        None => vcpu::cpuid::of_all(&supported_cpuid(&kvm)?, cpus),
        Some(saved) => Ok(saved.vcpus.iter().map(|vcpu| vcpu.cpuid().clone()).collect()),
    };
    let cpuids = cpuids.map_err(|_| MachineError::Cpuid)?;
    let vcpus = create_vcpus(&vm, &cpuids)?;
    if let Some(entry) = entry {
        for (number, vcpu) in (0..).zip(&vcpus) {
            registers::set_msrs(vcpu, number)?;
        }
        registers::set_entry(&vcpus[0], &memory, entry)?;
    }
    if let Some(saved) = saved {
        save::restore(&saved, &kvm, &vm, &vcpus, &bus)?;
        announce_generation(&vm)?;
    }
    for device in bus.virtio() {
        let mut device = device.lock().unwrap_or_else(PoisonError::into_inner);
        device
            .wait_prepared()
            .map_err(|error| MachineError::Os("a device's cage", error))?;
    }
    let report = entering.wait(description.strict)?;
    events.send(EventKind::Caged { cage: report });
    let power_button = irq_line(&vm, layout::POWER_BUTTON_GSI)?;
    let exits = Arc::<ExitCounters>::default();
    events.send(EventKind::Ready);
    let entered = events.clone();
    let surroundings = Surroundings {
        bus: bus.clone(),
        exits: exits.clone(),
        on_stop,
        on_entry: Arc::new(move || entered.send(EventKind::GuestEntered)),
        cage,
    };
    if let Some((file, noted)) = working_set {
        save::prefetch(&memory, file, noted, cage)
            .map_err(|error| MachineError::Os("the thread that reads memory ahead", error))?;
    }
    let vcpus =
        Vcpus::start(vcpus, &surroundings).map_err(|error| MachineError::Os("vCPU threads", error))?;
    // This thread's own: it serves the supervisor from here on.
    cage.confine(Duty::Main)
        .map_err(|error| MachineError::Os("the cage of the main thread", error))?;
    let state = RunState::Running;
    Ok(Running {
        description,
        state,
        vcpus,
        bus,
        memory,
        exits,
        returned_bytes,
        power_button,
        pagemap,
        saving: Arc::default(),
        kvm,
        cpuids,
        vm,
    })
}

/// Loads `kernel`, and describes the hardware to it.
fn load(
    kernel: &Kernel,
    inherited: &mut Inherited,
    memory: &GuestMemory,
    bus: &Bus,
    cpus: u8,
) -> Result<boot::Entry, MachineError> {
    let rsdp = acpi::write_tables(memory, cpus, bus.virtio().len())?;
    let mut image = File::from(inherited.take(kernel.image, "kernel")?);
    Ok(boot::load(memory, &mut image, &kernel.command_line, rsdp)?)
}

/// Tells the guest that it is another than it was: there is a new generation identifier.
fn announce_generation(vm: &VmFd) -> Result<(), MachineError> {
    let line = irq_line(vm, layout::GENERATION_GSI)?;
    line.write(1)
        .map_err(|error| MachineError::Os("interrupt of the generation identifier", error))
}

fn write_generation_id(memory: &GuestMemory) -> Result<(), MachineError> {
    let mut id = [0u8; 16];
    // SAFETY: `id` is valid for its length. 16 bytes are always given whole once the pool is ready (getrandom(2)).
    if unsafe { libc::getrandom(id.as_mut_ptr().cast(), id.len(), 0) } < 0 {
        return Err(MachineError::Os(
            "generation identifier",
            io::Error::last_os_error(),
        ));
    }
    memory
        .write_slice(&id, GuestAddress(layout::GENERATION_ID))
        .map_err(MachineError::GuestMemory)
}

impl Running {
    /// The state, CPUs and memory, for [`lighter_protocol::monitor::Response::Status`].
    pub fn status(&self) -> (RunState, u16, u64) {
        (self.state, self.description.cpus, self.description.memory_mib)
    }

    /// Takes the vCPUs out of the guest, then stops the devices, their requests completed.
    pub fn pause(&mut self) {
        if self.state == RunState::Running {
            self.vcpus.pause();
            self.each_device(MmioTransport::pause);
            self.state = RunState::Paused;
        }
    }

    /// Undoes [`Self::pause`].
    pub fn resume(&mut self) {
        if self.state == RunState::Paused {
            self.each_device(MmioTransport::resume);
            self.vcpus.resume();
            self.state = RunState::Running;
        }
    }

    /// Has the network device's link begin at `plug`, or nowhere.
    ///
    /// # Errors
    /// When there is no such device, or that is nothing for it.
    pub fn plug(&self, plug: Option<OwnedFd>) -> Result<(), NetError> {
        for device in self.bus.virtio() {
            let mut device = device.lock().unwrap_or_else(PoisonError::into_inner);
            if device.name() == NET {
                return device.plug(plug);
            }
        }
        Err(NetError::None)
    }

    /// Presses the power button.
    ///
    /// # Errors
    /// When the interrupt line cannot be raised.
    pub fn press_power_button(&self) -> io::Result<()> {
        self.power_button.write(1)
    }

    /// Counters since the start.
    pub fn statistics(&self) -> Statistics {
        let mut devices = std::collections::BTreeMap::new();
        for device in self.bus.virtio() {
            let device = device.lock().unwrap_or_else(PoisonError::into_inner);
            devices.insert(device.name().to_owned(), device.statistics());
        }
        let returned_bytes = self.returned_bytes.load(Ordering::Relaxed);
        Statistics {
            exits: self.exits.snapshot(),
            devices,
            returned_bytes,
        }
    }

    /// Ends the VM: no vCPU runs, and every request that a device took is completed, when this returns.
    pub fn stop(self) {
        let Self { vcpus, bus, .. } = self;
        vcpus.stop();
        for device in bus.virtio() {
            device.lock().unwrap_or_else(PoisonError::into_inner).pause();
        }
        bus.flush_console();
    }

    fn each_device(&self, act: impl Fn(&mut MmioTransport)) {
        for device in self.bus.virtio() {
            act(&mut device.lock().unwrap_or_else(PoisonError::into_inner));
        }
    }
}

/// Has devices in need reported as events, for the rest of the process's life.
pub fn report_devices(events: Events) {
    worker::report_to(Arc::new(move |severity, device, reason| {
        let (device, reason) = (device.to_owned(), reason.to_owned());
        events.send(match severity {
            Severity::Failed => EventKind::DeviceFailed { device, reason },
            Severity::Trouble => EventKind::DeviceTrouble { device, reason },
            Severity::Crowded => EventKind::DeviceCrowded { device },
        });
    }));
}
