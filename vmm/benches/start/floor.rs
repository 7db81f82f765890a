//! The floor: the KVM calls that a machine with memory, interrupt controllers and one vCPU cannot do without, and no others.

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit};
use lighter_vmm::memory::regions;

/// Makes the benchmark's own program the floor, with as many MiB of guest memory as the next argument says.
pub const ARGUMENT: &str = "floor";

/// Enters a guest once, and prints when.
pub fn run(memory_bytes: u64) {
    let kvm = Kvm::new().expect("open /dev/kvm");
    let vm = kvm.create_vm().expect("create a VM");
    vm.create_irq_chip().expect("create interrupt controllers");
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new anonymous mapping.
    let memory = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            memory_bytes as usize,
            protection,
            flags,
            -1,
            0,
        )
    };
    assert_ne!(memory, libc::MAP_FAILED, "map memory");
    let mut userspace_addr = memory as u64;
    for (slot, (guest_phys_addr, memory_size)) in (0..).zip(regions(memory_bytes)) {
        let region = kvm_userspace_memory_region {
            slot,
            guest_phys_addr,
            memory_size,
            userspace_addr,
            ..Default::default()
        };
        // SAFETY: the mapping lives as long as the process.
        unsafe { vm.set_user_memory_region(region) }.expect("give the VM its memory");
        userspace_addr += memory_size;
    }
    let mut vcpu = vm.create_vcpu(0).expect("create a vCPU");
    let cpuid = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .expect("read CPUID");
    vcpu.set_cpuid2(&cpuid).expect("set CPUID");
    let mut special = vcpu.get_sregs().expect("read registers");
    (special.cs.base, special.cs.selector) = (0, 0);
    vcpu.set_sregs(&special).expect("set registers");
    let mut registers = vcpu.get_regs().expect("read registers");
    registers.rip = 0x1000;
    vcpu.set_regs(&registers).expect("set registers");
    // SAFETY: inside the mapping: `out 0x80, al`, in real mode.
    unsafe {
        memory
            .cast::<u8>()
            .add(0x1000)
            .cast::<[u8; 2]>()
            .write([0xe6, 0x80])
    };
    let entered = monotonic_ns();
    let exit = vcpu.run().expect("run the guest");
    assert!(
        matches!(exit, VcpuExit::IoOut(0x80, _)),
        "the guest ran: {exit:?}"
    );
    println!("{entered}");
}

/// CLOCK_MONOTONIC, nanoseconds.
pub fn monotonic_ns() -> u64 {
    lighter_vmm::events::monotonic_ns()
}
