//! A throw-away guest: 64 KiB of memory and one vCPU in 64-bit mode, no devices.
//!
//! The first 2 MiB are mapped one to one; the page at 0x9000 is zeroed and for the code to write to. The guest ends with `hlt`, and RAX says how.

use super::ProbeError;
use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_regs, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap};

const MEMORY: u64 = 0x1_0000;
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PAGE_DIRECTORY: u64 = 0x3000;
const GDT: u64 = 0x4000;
const IDT: u64 = 0x5000;
const CODE: u64 = 0x6000;
const FAULT: u64 = 0x7000;
const BREAKPOINT: u64 = 0x7100;
const STACK_TOP: u64 = 0xf000;

const PASSED: u64 = 0x600d;
const FAULTED: u64 = 0xbad;

/// `mov eax, PASSED; hlt`, then a `hlt` for those who jump over it.
const ENDING: &[u8] = &[0xb8, 0x0d, 0x60, 0x00, 0x00, 0xf4, 0xf4];
/// `mov eax, FAULTED; hlt`
const FAULT_HANDLER: &[u8] = &[0xb8, 0xad, 0x0b, 0x00, 0x00, 0xf4];
/// `inc ebx; iretq`
const BREAKPOINT_HANDLER: &[u8] = &[0xff, 0xc3, 0x48, 0xcf];

const CODE_SELECTOR: u16 = 0x08;
const DATA_SELECTOR: u16 = 0x10;
const FLAT_CODE: u64 = 0x00af_9b00_0000_ffff;
const FLAT_DATA: u64 = 0x00cf_9300_0000_ffff;

// Page table bits: present, writable; large page.
const TABLE: u64 = 0x3;
const LARGE_PAGE: u64 = 0x83;

// PE, MP, ET, NE, WP, PG.
const CR0: u64 = 0x8001_0033;
// PAE, OSFXSR, OSXMMEXCPT; and OSXSAVE.
const CR4: u64 = 0x620;
const CR4_OSXSAVE: u64 = 1 << 18;
// LME, LMA.
const EFER: u64 = 0x500;

/// How a run of the guest ended.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// At the end of its code.
    Passed,
    /// In any other way, said in words.
    Failed(String),
}

/// See the module.
pub(super) struct Guest {
    vcpu: VcpuFd,
    // Both for as long as the vCPU: KVM reads and writes this memory.
    _vm: VmFd,
    _memory: GuestMemoryMmap,
}

/// Whether KVM offers XSAVE to guests.
pub(super) fn has_xsave(kvm: &Kvm) -> Result<bool, ProbeError> {
    Ok(offers_xsave(&supported_cpuid(kvm)?))
}

fn offers_xsave(cpuid: &CpuId) -> bool {
    cpuid
        .as_slice()
        .iter()
        .any(|leaf| leaf.function == 1 && leaf.ecx & (1 << 26) != 0)
}

fn supported_cpuid(kvm: &Kvm) -> Result<CpuId, ProbeError> {
    kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(wanted("get the CPUID leaves"))
}

fn wanted(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> ProbeError {
    move |source| ProbeError::Kvm { what, source }
}

impl Guest {
    /// A guest that is to run `code`.
    ///
    /// # Errors
    /// When KVM refuses.
    pub(super) fn new(kvm: &Kvm, code: &[u8]) -> Result<Self, ProbeError> {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY as usize)])
            .map_err(ProbeError::Memory)?;
        fill(&memory, code).map_err(ProbeError::Fill)?;
        let host_address = memory
            .get_host_address(GuestAddress(0))
            .map_err(ProbeError::Fill)?;
        let vm = kvm.create_vm().map_err(wanted("create a VM"))?;
        // SAFETY: the mapping is MEMORY bytes long and outlives the VM: `Guest` holds both, and drops it last.
        unsafe {
            vm.set_user_memory_region(kvm_userspace_memory_region {
                slot: 0,
                flags: 0,
                guest_phys_addr: 0,
                memory_size: MEMORY,
                userspace_addr: host_address as u64,
            })
        }
        .map_err(wanted("map memory"))?;
        let vcpu = vm.create_vcpu(0).map_err(wanted("create a vCPU"))?;
        let cpuid = supported_cpuid(kvm)?;
        vcpu.set_cpuid2(&cpuid).map_err(wanted("set CPUID leaves"))?;
        let mut sregs = vcpu.get_sregs().map_err(wanted("read special registers"))?;
        let code_segment = kvm_segment {
            limit: u32::MAX,
            selector: CODE_SELECTOR,
            type_: 0xb,
            present: 1,
            s: 1,
            l: 1,
            g: 1,
            ..Default::default()
        };
        let data_segment = kvm_segment {
            selector: DATA_SELECTOR,
            type_: 0x3,
            l: 0,
            db: 1,
            ..code_segment
        };
        sregs.cs = code_segment;
        for segment in [
            &mut sregs.ds,
            &mut sregs.es,
            &mut sregs.fs,
            &mut sregs.gs,
            &mut sregs.ss,
        ] {
            *segment = data_segment;
        }
        sregs.gdt.base = GDT;
        sregs.gdt.limit = 3 * 8 - 1;
        sregs.idt.base = IDT;
        sregs.idt.limit = 32 * 16 - 1;
        sregs.cr0 = CR0;
        sregs.cr3 = PML4;
        sregs.cr4 = CR4 | if offers_xsave(&cpuid) { CR4_OSXSAVE } else { 0 };
        sregs.efer = EFER;
        vcpu.set_sregs(&sregs).map_err(wanted("set special registers"))?;
        Ok(Self {
            vcpu,
            _vm: vm,
            _memory: memory,
        })
    }

    /// Runs the code from its start, with RCX set to `rcx`; a guest that has failed is not to run again.
    ///
    /// # Errors
    /// When KVM refuses the registers; a refusal to run is a failed run.
    pub(super) fn run(&mut self, rcx: u64) -> Result<Outcome, ProbeError> {
        let regs = kvm_regs {
            rip: CODE,
            rsp: STACK_TOP,
            rcx,
            rflags: 2,
            ..Default::default()
        };
        self.vcpu.set_regs(&regs).map_err(wanted("set registers"))?;
        loop {
            match self.vcpu.run() {
                Ok(VcpuExit::Hlt) => break,
                Ok(other) => return Ok(Outcome::Failed(format!("it exits with {other:?}"))),
                // A signal for this process.
                Err(error) if error.errno() == libc::EINTR || error.errno() == libc::EAGAIN => {}
                Err(error) => return Ok(Outcome::Failed(format!("KVM_RUN says {error}"))),
            }
        }
        let regs = self.vcpu.get_regs().map_err(wanted("read registers"))?;
        Ok(match regs.rax {
            PASSED => Outcome::Passed,
            FAULTED => Outcome::Failed("it faults".into()),
            _ => Outcome::Failed("it computes something else".into()),
        })
    }
}

/// Page tables, descriptor tables, handlers and code.
fn fill(memory: &GuestMemoryMmap, code: &[u8]) -> Result<(), GuestMemoryError> {
    let gate = |handler: u64| {
        // A 64-bit interrupt gate to an address below 64 KiB.
        [handler | u64::from(CODE_SELECTOR) << 16 | 0x8e00 << 32, 0]
    };
    let mut idt = [gate(FAULT); 32];
    idt[3] = gate(BREAKPOINT);
    let quads: [(u64, &[u64]); 5] = [
        (PML4, &[PDPT | TABLE]),
        (PDPT, &[PAGE_DIRECTORY | TABLE]),
        (PAGE_DIRECTORY, &[LARGE_PAGE]),
        (GDT, &[0, FLAT_CODE, FLAT_DATA]),
        (IDT, idt.as_flattened()),
    ];
    let quads = quads.map(|(at, values)| (at, values.iter().flat_map(|v| v.to_le_bytes()).collect()));
    let bytes: [(u64, Vec<u8>); 3] = [
        (CODE, [code, ENDING].concat()),
        (FAULT, FAULT_HANDLER.to_vec()),
        (BREAKPOINT, BREAKPOINT_HANDLER.to_vec()),
    ];
    for (at, content) in quads.into_iter().chain(bytes) {
        memory.write_slice(&content, GuestAddress(at))?;
    }
    Ok(())
}
