//! The state in which the first vCPU enters the kernel; the others wait for its startup interrupt (KVM's default).

use crate::boot::Entry;
use crate::layout;
use crate::memory::GuestMemory;
use kvm_bindings::{Msrs, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress};

/// Why registers cannot be set.
#[derive(Debug, thiserror::Error)]
pub enum RegisterError {
    /// KVM refused.
    #[error("KVM refuses the {what} of vCPU {vcpu}")]
    Kvm {
        /// Which registers.
        what: &'static str,
        /// Of which vCPU.
        vcpu: u8,
        /// KVM's reason.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// Guest memory has no place for the descriptor table.
    #[error("cannot write the descriptor table to guest memory")]
    Memory(#[source] vm_memory::GuestMemoryError),
}

/// IA32_MISC_ENABLE, with fast string operations as every CPU has after reset.
const MSR_MISC_ENABLE: (u32, u64) = (0x1a0, 1);
/// IA32_MTRR_DEF_TYPE: memory types on, write-back by default; otherwise Linux takes all memory for uncached.
const MSR_MTRR_DEF_TYPE: (u32, u64) = (0x2ff, 1 << 11 | 6);

/// Sets the model specific registers that every vCPU needs at power-on.
///
/// # Errors
/// When KVM refuses one.
pub fn set_msrs(vcpu: &VcpuFd, number: u8) -> Result<(), RegisterError> {
    let error = |source| RegisterError::Kvm {
        what: "model specific registers",
        vcpu: number,
        source,
    };
    let entry = |(index, data)| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    };
    let entries = [entry(MSR_MISC_ENABLE), entry(MSR_MTRR_DEF_TYPE)];
    // Two entries always fit.
    let Ok(msrs) = Msrs::from_entries(&entries) else {
        return Ok(());
    };
    let set = vcpu.set_msrs(&msrs).map_err(error)?;
    if set != entries.len() {
        return Err(error(kvm_ioctls::Error::new(libc::EINVAL)));
    }
    Ok(())
}

/// Sets the registers of the boot vCPU for `entry`.
///
/// # Errors
/// When KVM refuses, or guest memory is too small.
pub fn set_entry(vcpu: &VcpuFd, memory: &GuestMemory, entry: Entry) -> Result<(), RegisterError> {
    let error = |what, source| RegisterError::Kvm {
        what,
        vcpu: 0,
        source,
    };
    let mut special = vcpu
        .get_sregs()
        .map_err(|source| error("special registers", source))?;
    let regs = match entry {
        Entry::Pvh { rip } => {
            enter_protected_mode(&mut special);
            kvm_regs {
                rip,
                rbx: layout::BOOT_PARAMETERS,
                rflags: 2,
                ..Default::default()
            }
        }
        Entry::Linux64 { rip } => {
            enter_long_mode(&mut special);
            kvm_regs {
                rip,
                rsi: layout::BOOT_PARAMETERS,
                rflags: 2,
                ..Default::default()
            }
        }
    };
    write_descriptor_table(memory, &special).map_err(RegisterError::Memory)?;
    special.gdt.base = layout::GDT;
    special.gdt.limit = (GDT_ENTRIES * 8 - 1) as u16;
    vcpu.set_sregs(&special)
        .map_err(|source| error("special registers", source))?;
    vcpu.set_regs(&regs).map_err(|source| error("registers", source))
}

/// Null, an unused one, code, data, task state: the 64-bit protocol wants code at 0x10 and data at 0x18.
const GDT_ENTRIES: usize = 5;
const CODE: u16 = 0x10;
const DATA: u16 = 0x18;
const TASK: u16 = 0x20;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

fn flat(selector: u16, type_: u8) -> kvm_segment {
    kvm_segment {
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        s: 1,
        g: 1,
        ..Default::default()
    }
}

fn set_segments(special: &mut kvm_sregs, code: kvm_segment) {
    let data = kvm_segment {
        db: 1,
        ..flat(DATA, 0x3)
    };
    special.cs = code;
    (special.ds, special.es, special.fs, special.gs, special.ss) = (data, data, data, data, data);
    special.tr = kvm_segment {
        limit: 0x67,
        selector: TASK,
        type_: 0xb,
        present: 1,
        ..Default::default()
    };
}

fn enter_protected_mode(special: &mut kvm_sregs) {
    set_segments(
        special,
        kvm_segment {
            db: 1,
            ..flat(CODE, 0xb)
        },
    );
    special.cr0 = CR0_PE | CR0_ET;
    special.cr4 = 0;
}

fn enter_long_mode(special: &mut kvm_sregs) {
    set_segments(
        special,
        kvm_segment {
            l: 1,
            ..flat(CODE, 0xb)
        },
    );
    special.cr3 = layout::PAGE_TABLES;
    special.cr4 |= CR4_PAE;
    special.cr0 |= CR0_PE | CR0_PG;
    special.efer |= EFER_LME | EFER_LMA;
}

fn write_descriptor_table(
    memory: &GuestMemory,
    special: &kvm_sregs,
) -> Result<(), vm_memory::GuestMemoryError> {
    let table = [
        0,
        0,
        descriptor(&special.cs),
        descriptor(&special.ds),
        descriptor(&special.tr),
    ];
    for (entry, place) in table.iter().zip((layout::GDT..).step_by(8)) {
        memory.write_obj(*entry, GuestAddress(place))?;
    }
    Ok(())
}

/// A segment as its 8-byte descriptor (Intel SDM volume 3, figure 3-8). Base is always 0 here.
fn descriptor(segment: &kvm_segment) -> u64 {
    let bits = |value: u8, at: u32| u64::from(value) << at;
    let limit = u64::from(if segment.g == 1 {
        segment.limit >> 12
    } else {
        segment.limit
    });
    limit & 0xffff
        | (limit >> 16 & 0xf) << 48
        | bits(segment.type_, 40)
        | bits(segment.s, 44)
        | bits(segment.dpl, 45)
        | bits(segment.present, 47)
        | bits(segment.l, 53)
        | bits(segment.db, 54)
        | bits(segment.g, 55)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_those_of_a_flat_protected_mode() {
        let mut special = kvm_sregs::default();
        enter_protected_mode(&mut special);
        assert_eq!(descriptor(&special.cs), 0x00cf_9b00_0000_ffff);
        assert_eq!(descriptor(&special.ds), 0x00cf_9300_0000_ffff);
        assert_eq!(descriptor(&special.tr), 0x0000_8b00_0000_0067);
        enter_long_mode(&mut special);
        assert_eq!(descriptor(&special.cs), 0x00af_9b00_0000_ffff);
    }
}
