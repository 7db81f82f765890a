//! The VM and its vCPUs, as KVM has them.

use super::error::MachineError;
use crate::layout;
use crate::memory::GuestMemory;
use kvm_bindings::{CpuId, KVM_API_VERSION, KVM_MAX_CPUID_ENTRIES, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use std::os::fd::{FromRawFd, RawFd};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

pub(super) fn take_kvm(fd: RawFd) -> Result<Kvm, MachineError> {
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

pub(super) fn kvm_error(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> MachineError {
    move |source| MachineError::Kvm { what, source }
}

pub(super) fn create_vm(kvm: &Kvm, memory: &GuestMemory) -> Result<VmFd, MachineError> {
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

pub(super) fn irq_line(vm: &VmFd, gsi: u32) -> Result<EventFd, MachineError> {
    let line = EventFd::new(EFD_NONBLOCK).map_err(|error| MachineError::Os("interrupt line", error))?;
    vm.register_irqfd(&line, gsi)
        .map_err(kvm_error("wire an interrupt"))?;
    Ok(line)
}

/// Creates the vCPUs, each of which finds its entry of `cpuids`.
pub(super) fn create_vcpus(vm: &VmFd, cpuids: &[CpuId]) -> Result<Vec<VcpuFd>, MachineError> {
    let vcpus = (0..).zip(cpuids).map(|(number, cpuid)| {
        let vcpu = vm.create_vcpu(number).map_err(kvm_error("create a vCPU"))?;
        vcpu.set_cpuid2(cpuid).map_err(kvm_error("set a vCPU's CPUID"))?;
        Ok(vcpu)
    });
    vcpus.collect()
}

/// What KVM offers of the host's processor.
pub(super) fn supported_cpuid(kvm: &Kvm) -> Result<CpuId, MachineError> {
    kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(kvm_error("read the host's CPUID"))
}
