//! A machine from its description: built in the order of the functions here, then running.

use crate::bus::Bus;
use crate::descriptors::{DescriptorError, Inherited};
use crate::events::Events;
use crate::layout;
use crate::memory::{self, GuestMemory, MemoryError};
use crate::serial::{CappedLog, SerialConsole};
use crate::vcpu::registers::{self, RegisterError};
use crate::vcpu::thread::{ExitCounters, Surroundings, Vcpus};
use crate::virtio::VirtioDevice;
use crate::virtio::balloon::Balloon;
use crate::virtio::block::{Block, BlockConfig, BlockError};
use crate::virtio::fs::{Fs, FsConfig, FsError};
use crate::virtio::mmio::{MmioTransport, QUEUE_NOTIFY_OFFSET};
use crate::virtio::net::{Net, NetConfig, NetError};
use crate::virtio::rng::Rng;
use crate::virtio::vsock::{Vsock, VsockConfig, VsockError};
use crate::virtio::worker::{self, Severity};
use crate::{acpi, boot, vcpu};
use kvm_bindings::{KVM_API_VERSION, KVM_MAX_CPUID_ENTRIES, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, VcpuFd, VmFd};
use lighter_protocol::monitor::{EventKind, Machine, RunState, Statistics, StopReason};
use std::fs::File;
use std::io;
use std::os::fd::{FromRawFd, IntoRawFd};
use std::os::unix::net::UnixListener;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Why a machine cannot be built.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// An inherited descriptor is unusable.
    #[error("the supervisor's description is wrong")]
    Descriptor(#[from] DescriptorError),
    /// More CPUs than a guest can have.
    #[error("a VM has 1 to {max} CPUs, not {0}", max = MAX_CPUS)]
    Cpus(u16),
    /// More devices than there are interrupt lines for.
    #[error("a VM has at most {max} disks and shared folders, not {0}", max = layout::MAX_VIRTIO_DEVICES - OTHER_DEVICES)]
    Devices(usize),
    /// The KVM of this host is too old.
    #[error("this host's KVM lacks {0}")]
    Capability(&'static str),
    /// A KVM call failed.
    #[error("KVM: cannot {what}")]
    Kvm {
        /// What was asked for.
        what: &'static str,
        /// KVM's reason.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// The host's CPU has more features than KVM takes back.
    #[error("the host's CPUID has too many leaves")]
    Cpuid,
    /// Guest memory.
    #[error("no guest memory")]
    Memory(#[from] MemoryError),
    /// A disk cannot be attached.
    #[error("cannot attach disk {id}")]
    Disk {
        /// Its name.
        id: String,
        /// Why.
        #[source]
        source: BlockError,
    },
    /// A folder cannot be shared.
    #[error("cannot share the folder {path}")]
    Share {
        /// Its path.
        path: String,
        /// Why.
        #[source]
        source: FsError,
    },
    /// The network device.
    #[error("cannot make the network device")]
    Net(#[source] NetError),
    /// The socket device.
    #[error("cannot make the socket device")]
    Vsock(#[source] VsockError),
    /// An operating system resource is missing.
    #[error("cannot make the {0}")]
    Os(&'static str, #[source] io::Error),
    /// The kernel.
    #[error("cannot boot")]
    Boot(#[from] boot::BootError),
    /// ACPI tables.
    #[error("cannot describe the hardware")]
    Acpi(#[from] acpi::AcpiError),
    /// vCPU state.
    #[error("cannot set up a vCPU")]
    Registers(#[from] RegisterError),
    /// Boot data.
    #[error("cannot write to guest memory")]
    GuestMemory(#[source] vm_memory::GuestMemoryError),
}

/// As many as the guest kernel is built for.
pub const MAX_CPUS: u16 = 64;
/// net, vsock, rng and balloon.
const OTHER_DEVICES: usize = 4;

/// A machine whose vCPUs run.
pub struct Running {
    description: Machine,
    state: RunState,
    vcpus: Vcpus,
    bus: Arc<Bus>,
    exits: Arc<ExitCounters>,
    returned_bytes: Arc<AtomicU64>,
    power_button: EventFd,
    /// Keeps the VM; closed after the vCPUs.
    _vm: VmFd,
}

/// Called once for the end of the VM by whichever vCPU saw it.
pub type OnStop = Arc<dyn Fn(StopReason) + Send + Sync>;

/// Builds the machine and starts it. `inherited` has the descriptors besides those of control and events.
///
/// # Errors
/// See [`MachineError`]; nothing is left running then.
pub fn start(
    description: Machine,
    inherited: &mut Inherited,
    events: &Events,
    on_stop: OnStop,
) -> Result<Running, MachineError> {
    let cpus = u8::try_from(description.cpus)
        .ok()
        .filter(|cpus| (1..=MAX_CPUS).contains(&(*cpus).into()));
    let cpus = cpus.ok_or(MachineError::Cpus(description.cpus))?;
    let kvm = take_kvm(inherited.take(description.kvm, "KVM")?.into_raw_fd())?;
    let memory = memory::create(description.memory_mib)?;
    let vm = create_vm(&kvm, &memory)?;
    let balloon = Balloon::new();
    let returned_bytes = balloon.returned_bytes();
    let devices = make_devices(&description, inherited, balloon)?;
    let count = devices.len();
    let bus = Arc::new(attach(&description, inherited, &vm, &memory, devices)?);
    let rsdp = acpi::write_tables(&memory, cpus, count)?;
    write_generation_id(&memory)?;
    let mut kernel = File::from(inherited.take(description.kernel.image, "kernel")?);
    let entry = boot::load(&memory, &mut kernel, &description.kernel.command_line, rsdp)?;
    let vcpus = create_vcpus(&kvm, &vm, cpus)?;
    registers::set_entry(&vcpus[0], &memory, entry)?;
    let power_button = irq_line(&vm, layout::POWER_BUTTON_GSI)?;
    let exits = Arc::<ExitCounters>::default();
    events.send(EventKind::Ready);
    let entered = events.clone();
    let surroundings = Surroundings {
        bus: bus.clone(),
        exits: exits.clone(),
        on_stop,
        on_entry: Arc::new(move || entered.send(EventKind::GuestEntered)),
    };
    let vcpus =
        Vcpus::start(vcpus, &surroundings).map_err(|error| MachineError::Os("vCPU threads", error))?;
    let state = RunState::Running;
    Ok(Running {
        description,
        state,
        vcpus,
        bus,
        exits,
        returned_bytes,
        power_button,
        _vm: vm,
    })
}

fn take_kvm(fd: std::os::fd::RawFd) -> Result<Kvm, MachineError> {
    // SAFETY: an open descriptor that nobody else owns. If it is not /dev/kvm, the calls below fail.
    let kvm = unsafe { Kvm::from_raw_fd(fd) };
    if kvm.get_api_version() != KVM_API_VERSION as i32 {
        return Err(MachineError::Capability(
            "the stable interface (is the descriptor /dev/kvm?)",
        ));
    }
    let needed = [
        (Cap::Irqchip, "an interrupt controller"),
        (Cap::Ioeventfd, "ioeventfd"),
        (Cap::Irqfd, "irqfd"),
        (Cap::UserMemory, "user memory"),
        (Cap::ImmediateExit, "immediate exits"),
        (Cap::ExtCpuid, "CPUID"),
        (Cap::TscDeadlineTimer, "the TSC deadline timer"),
    ];
    match needed
        .iter()
        .find(|(capability, _)| !kvm.check_extension(*capability))
    {
        Some((_, name)) => Err(MachineError::Capability(name)),
        None => Ok(kvm),
    }
}

fn kvm_error(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> MachineError {
    move |source| MachineError::Kvm { what, source }
}

fn create_vm(kvm: &Kvm, memory: &GuestMemory) -> Result<VmFd, MachineError> {
    let vm = loop {
        match kvm.create_vm() {
            // KVM_CREATE_VM waits for other work of the host's and can be interrupted.
            Err(error) if error.errno() == libc::EINTR => {}
            result => break result.map_err(kvm_error("create a VM"))?,
        }
    };
    vm.set_identity_map_address(layout::KVM_IDENTITY_MAP)
        .map_err(kvm_error("place the identity map"))?;
    vm.set_tss_address(layout::KVM_TSS)
        .map_err(kvm_error("place the task state"))?;
    vm.create_irq_chip()
        .map_err(kvm_error("create the interrupt controllers"))?;
    for (slot, region) in (0..).zip(memory.iter()) {
        let address = region.get_host_address(MemoryRegionAddress(0));
        let address = address.map_err(MachineError::GuestMemory)?;
        let slot = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: region.start_addr().raw_value(),
            memory_size: region.len(),
            userspace_addr: address as u64,
        };
        // SAFETY: the region is a mapping of that length, kept by the devices and this machine for longer than `vm`.
        unsafe { vm.set_user_memory_region(slot) }.map_err(kvm_error("give the VM its memory"))?;
    }
    Ok(vm)
}

fn make_devices(
    description: &Machine,
    inherited: &mut Inherited,
    balloon: Balloon,
) -> Result<Vec<Box<dyn VirtioDevice>>, MachineError> {
    let disks_and_shares = description.disks.len() + description.shares.len();
    if disks_and_shares > layout::MAX_VIRTIO_DEVICES - OTHER_DEVICES {
        return Err(MachineError::Devices(disks_and_shares));
    }
    let mut devices: Vec<Box<dyn VirtioDevice>> = vec![];
    for disk in &description.disks {
        let file = inherited.take(disk.file, &format!("disk {}", disk.id))?.into();
        let config = BlockConfig {
            id: disk.id.clone(),
            file,
            read_only: disk.read_only,
        };
        let block = Block::new(config);
        let block = block.map_err(|source| MachineError::Disk {
            id: disk.id.clone(),
            source,
        })?;
        devices.push(Box::new(block));
    }
    if let Some(net) = &description.net {
        let config = NetConfig {
            mac: net.mac,
            mtu: net.mtu,
            stream: inherited.take(net.stream, "network")?.into(),
        };
        devices.push(Box::new(Net::new(config).map_err(MachineError::Net)?));
    }
    // One connection of the socket device takes one, too: a quarter is for those and for the rest.
    let descriptors = descriptor_limit() / 4 * 3;
    for share in &description.shares {
        let config = FsConfig {
            tag: share.tag.clone(),
            path: share.path.clone(),
            folder: inherited.take(share.folder, &format!("shared folder {}", share.path))?,
            read_only: share.read_only,
            descriptors: descriptors / description.shares.len() as u64,
        };
        let device = Fs::new(config).map_err(|source| MachineError::Share {
            path: share.path.clone(),
            source,
        })?;
        devices.push(Box::new(device));
    }
    let vsock = &description.vsock;
    let mut host_ports = vec![];
    for port in &vsock.host_ports {
        host_ports.push((
            port.port,
            inherited.take(port.connections, &format!("vsock port {}", port.port))?,
        ));
    }
    let muxer = UnixListener::from(inherited.take(vsock.muxer, "vsock muxer")?);
    let config = VsockConfig {
        guest_cid: vsock.guest_cid,
        muxer,
        host_ports,
    };
    devices.push(Box::new(Vsock::new(config).map_err(MachineError::Vsock)?));
    devices.push(Box::new(Rng::new()));
    devices.push(Box::new(balloon));
    Ok(devices)
}

/// How many files this process may have open.
fn descriptor_limit() -> u64 {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: `limit` is valid for writing. It cannot fail for it.
    unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) };
    limit.rlim_cur
}

/// Wires the devices and the console to interrupts and notifications.
fn attach(
    description: &Machine,
    inherited: &mut Inherited,
    vm: &VmFd,
    memory: &GuestMemory,
    devices: Vec<Box<dyn VirtioDevice>>,
) -> Result<Bus, MachineError> {
    let mut virtio = vec![];
    for (number, device) in (0u32..).zip(devices) {
        let line = irq_line(vm, layout::VIRTIO_GSI + number)?;
        let transport = MmioTransport::new(device, memory.clone(), line);
        let transport = transport.map_err(|error| MachineError::Os("device notifications", error))?;
        let window = layout::VIRTIO_MMIO + u64::from(number) * layout::VIRTIO_MMIO_STRIDE;
        let notify = IoEventAddress::Mmio(window + QUEUE_NOTIFY_OFFSET);
        for (queue, kick) in (0u32..).zip(transport.kicks()) {
            vm.register_ioevent(kick, &notify, queue)
                .map_err(kvm_error("listen to device notifications"))?;
        }
        virtio.push(Arc::new(Mutex::new(transport)));
    }
    let console_error = |error| MachineError::Os("console log", error);
    let log = match &description.console {
        Some(console) => {
            let file = inherited.take(console.log, "console log")?.into();
            Some(CappedLog::new(file, console.max_bytes).map_err(console_error)?)
        }
        None => None,
    };
    let serial = SerialConsole::new(irq_line(vm, layout::SERIAL_GSI)?, log);
    Ok(Bus::new(virtio, serial))
}

fn irq_line(vm: &VmFd, gsi: u32) -> Result<EventFd, MachineError> {
    let line = EventFd::new(EFD_NONBLOCK).map_err(|error| MachineError::Os("interrupt line", error))?;
    vm.register_irqfd(&line, gsi)
        .map_err(kvm_error("wire an interrupt"))?;
    Ok(line)
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

fn create_vcpus(kvm: &Kvm, vm: &VmFd, cpus: u8) -> Result<Vec<VcpuFd>, MachineError> {
    let supported = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(kvm_error("read the host's CPUID"))?;
    let mut vcpus = vec![];
    for number in 0..cpus {
        let vcpu = vm
            .create_vcpu(number.into())
            .map_err(kvm_error("create a vCPU"))?;
        let cpuid = vcpu::cpuid::adapt(&supported, number, cpus).map_err(|_| MachineError::Cpuid)?;
        vcpu.set_cpuid2(&cpuid).map_err(kvm_error("set a vCPU's CPUID"))?;
        registers::set_msrs(&vcpu, number)?;
        vcpus.push(vcpu);
    }
    Ok(vcpus)
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
        drop(vcpus.stop());
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
