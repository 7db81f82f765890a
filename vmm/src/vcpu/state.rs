//! A vCPU as plain data: everything of it that KVM keeps.

use kvm_bindings::{
    CpuId, Msrs, Xsave, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry,
    kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd};
use serde::{Deserialize, Serialize};

/// Why a vCPU cannot be saved or restored.
#[derive(Debug, thiserror::Error)]
pub enum VcpuStateError {
    /// KVM refused.
    #[error("KVM does not {verb} the {what} of a vCPU")]
    Kvm {
        /// `give` or `take`.
        verb: &'static str,
        /// Which part.
        what: &'static str,
        /// KVM's reason.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// A register that the guest may rely on is not known here.
    #[error("this host's KVM does not take the model specific register {0:#x}")]
    Msr(u32),
    /// More than KVM lists.
    #[error("a vCPU has more {0} than can be saved")]
    Many(&'static str),
    /// The processor is another.
    #[error("this host's processor, as KVM offers it, lacks features that the guest has found: {0}")]
    Features(String),
    /// Its time stamp counter is another, and cannot be scaled.
    #[error(
        "the guest's time stamp counter runs at {saved} kHz, this host's at {host} kHz, and it cannot be scaled"
    )]
    Tsc {
        /// Of the snapshot.
        saved: u32,
        /// Here.
        host: u32,
    },
}

/// A vCPU.
#[derive(Debug, Serialize, Deserialize)]
pub struct VcpuState {
    cpuid: CpuId,
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: Xsave,
    xcrs: kvm_xcrs,
    debug: kvm_debugregs,
    lapic: kvm_lapic_state,
    msrs: Msrs,
    events: kvm_vcpu_events,
    tsc_khz: Option<u32>,
}

/// Most registers asked for at once, as KVM has it (MAX_IO_MSRS).
const MSR_BATCH: usize = 256;
const MSR_TSC: u32 = 0x10;
const MSR_TSC_DEADLINE: u32 = 0x6e0;

/// How far the frequencies of two hosts' counters may be apart to be the same, parts of a million (as the clock daemons have
/// it).
const TSC_TOLERANCE_PPM: u64 = 250;

fn give(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> VcpuStateError {
    move |source| VcpuStateError::Kvm {
        verb: "give",
        what,
        source,
    }
}

fn take(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> VcpuStateError {
    move |source| VcpuStateError::Kvm {
        verb: "take",
        what,
        source,
    }
}

impl VcpuState {
    /// Reads a vCPU that does not run and was given `cpuid`: not every KVM gives that back.
    ///
    /// # Errors
    /// When KVM keeps something back.
    pub fn save(kvm: &Kvm, vcpu: &VcpuFd, cpuid: &CpuId) -> Result<Self, VcpuStateError> {
        Ok(Self {
            // First: KVM completes a pending INIT or startup interrupt when asked.
            mp_state: vcpu.get_mp_state().map_err(give("run state"))?,
            cpuid: cpuid.clone(),
            regs: vcpu.get_regs().map_err(give("registers"))?,
            sregs: vcpu.get_sregs().map_err(give("special registers"))?,
            xsave: save_xsave(kvm, vcpu)?,
            xcrs: vcpu.get_xcrs().map_err(give("extended control registers"))?,
            debug: vcpu.get_debug_regs().map_err(give("debug registers"))?,
            lapic: vcpu.get_lapic().map_err(give("interrupt controller"))?,
            msrs: save_msrs(kvm, vcpu)?,
            events: vcpu.get_vcpu_events().map_err(give("pending events"))?,
            tsc_khz: vcpu.get_tsc_khz().ok(),
        })
    }

    /// What the guest learns from CPUID.
    pub fn cpuid(&self) -> &CpuId {
        &self.cpuid
    }

    /// Whether a vCPU of this host, of which KVM offers `supported`, can go on as this one.
    ///
    /// # Errors
    /// What it lacks.
    pub fn check(&self, supported: &CpuId) -> Result<(), VcpuStateError> {
        let missing = missing_features(self.cpuid.as_slice(), supported.as_slice());
        match missing.is_empty() {
            true => Ok(()),
            false => Err(VcpuStateError::Features(missing.join(", "))),
        }
    }

    /// Makes a new vCPU this one, which has its CPUID. In this order: each part may depend on those before it.
    ///
    /// # Errors
    /// When KVM refuses something.
    pub fn restore(&self, kvm: &Kvm, vcpu: &VcpuFd) -> Result<(), VcpuStateError> {
        self.restore_tsc_frequency(kvm, vcpu)?;
        vcpu.set_mp_state(self.mp_state).map_err(take("run state"))?;
        vcpu.set_regs(&self.regs).map_err(take("registers"))?;
        vcpu.set_sregs(&self.sregs).map_err(take("special registers"))?;
        // SAFETY: no dynamic feature was asked of the kernel by this process or by the one that saved it, so the state is
        // no larger than what KVM takes; `check` saw that the processor knows its parts.
        unsafe { vcpu.set_xsave2(&self.xsave) }.map_err(take("floating point state"))?;
        vcpu.set_xcrs(&self.xcrs)
            .map_err(take("extended control registers"))?;
        vcpu.set_debug_regs(&self.debug)
            .map_err(take("debug registers"))?;
        vcpu.set_lapic(&self.lapic)
            .map_err(take("interrupt controller"))?;
        self.restore_msrs(vcpu)?;
        vcpu.set_vcpu_events(&self.events).map_err(take("pending events"))
    }

    fn restore_tsc_frequency(&self, kvm: &Kvm, vcpu: &VcpuFd) -> Result<(), VcpuStateError> {
        let (Some(saved), Ok(host)) = (self.tsc_khz, vcpu.get_tsc_khz()) else {
            return Ok(());
        };
        if u64::from(saved.abs_diff(host)) * 1_000_000 <= u64::from(saved) * TSC_TOLERANCE_PPM {
            return Ok(());
        }
        if !kvm.check_extension(Cap::TscControl) {
            return Err(VcpuStateError::Tsc { saved, host });
        }
        vcpu.set_tsc_khz(saved).map_err(take("time stamp frequency"))
    }

    /// A register that KVM does not let be set, as its value never changes, is as good if it has the saved value.
    fn restore_msrs(&self, vcpu: &VcpuFd) -> Result<(), VcpuStateError> {
        for batch in ordered(self.msrs.as_slice()).chunks(MSR_BATCH) {
            let mut rest = batch;
            while !rest.is_empty() {
                let set = vcpu
                    .set_msrs(&msrs(rest)?)
                    .map_err(take("model specific registers"))?;
                let Some(refused) = rest.get(set) else { break };
                let mut here = msrs(&[*refused])?;
                let known = matches!(vcpu.get_msrs(&mut here), Ok(1));
                if !known || here.as_slice()[0].data != refused.data {
                    return Err(VcpuStateError::Msr(refused.index));
                }
                rest = &rest[set + 1..];
            }
        }
        Ok(())
    }
}

fn msrs(entries: &[kvm_msr_entry]) -> Result<Msrs, VcpuStateError> {
    Msrs::from_entries(entries).map_err(|_| VcpuStateError::Many("registers"))
}

/// The registers in an order that KVM takes: the timer's deadline behind the counter that it is compared with. A deadline
/// of zero is a timer that is off or has just fired; the second must not be lost, so it fires (once more).
fn ordered(saved: &[kvm_msr_entry]) -> Vec<kvm_msr_entry> {
    let tsc = saved.iter().find(|msr| msr.index == MSR_TSC).map(|msr| msr.data);
    let (deadline, mut msrs): (Vec<kvm_msr_entry>, Vec<_>) =
        saved.iter().partition(|msr| msr.index == MSR_TSC_DEADLINE);
    msrs.extend(deadline.into_iter().map(|msr| kvm_msr_entry {
        data: match msr.data {
            0 => tsc.unwrap_or(0),
            data => data,
        },
        ..msr
    }));
    msrs
}

fn save_msrs(kvm: &Kvm, vcpu: &VcpuFd) -> Result<Msrs, VcpuStateError> {
    let list = kvm
        .get_msr_index_list()
        .map_err(give("list of model specific registers"))?;
    let mut indices = list.as_slice().to_vec();
    // Not in the list of every KVM, though it keeps it.
    if !indices.contains(&MSR_TSC_DEADLINE) {
        indices.push(MSR_TSC_DEADLINE);
    }
    let entries: Vec<_> = indices
        .into_iter()
        .map(|index| kvm_msr_entry {
            index,
            ..Default::default()
        })
        .collect();
    let mut saved = vec![];
    let mut rest = &entries[..];
    // KVM stops at one that this vCPU does not have: the guest cannot use it either.
    while !rest.is_empty() {
        let batch = &rest[..rest.len().min(MSR_BATCH)];
        let mut values = msrs(batch)?;
        let read = vcpu
            .get_msrs(&mut values)
            .map_err(give("model specific registers"))?;
        saved.extend_from_slice(&values.as_slice()[..read]);
        let skipped = usize::from(read < batch.len());
        rest = &rest[read + skipped..];
    }
    msrs(&saved)
}

fn save_xsave(kvm: &Kvm, vcpu: &VcpuFd) -> Result<Xsave, VcpuStateError> {
    let what = "floating point state";
    let many = |_| VcpuStateError::Many("floating point registers");
    let size = usize::try_from(kvm.check_extension_int(Cap::Xsave2)).unwrap_or(0);
    if size == 0 {
        let mut xsave = Xsave::new(0).map_err(many)?;
        let state = vcpu.get_xsave().map_err(give(what))?;
        // SAFETY: only the fixed part is written, and the length of the rest stays what it is.
        unsafe { xsave.as_mut_fam_struct() }.xsave = state;
        return Ok(xsave);
    }
    let beyond = size.saturating_sub(size_of::<kvm_xsave>()).div_ceil(4);
    let mut xsave = Xsave::new(beyond).map_err(many)?;
    // SAFETY: the buffer is as long as KVM says that the state is.
    unsafe { vcpu.get_xsave2(&mut xsave) }.map_err(give(what))?;
    Ok(xsave)
}

/// Registers of CPUID that list features: leaf, subleaf, and which bits of EAX to EDX do.
const FEATURES: [(u32, u32, [u32; 4]); 6] = [
    // Without those that the guest's own settings switch (OSXSAVE), that KVM emulates without saying so (the deadline timer)
    // or that the monitor adds (hypervisor), and several threads.
    (0x1, 0, [0, 0, !(1 << 27 | 1 << 24 | 1 << 31), !(1 << 28)]),
    // Without OSPKE, which the guest switches.
    (0x7, 0, [0, u32::MAX, !(1 << 4), u32::MAX]),
    (0x7, 1, [u32::MAX, 0, 0, u32::MAX]),
    // State components and their instructions.
    (0xd, 0, [u32::MAX, 0, 0, u32::MAX]),
    (0xd, 1, [u32::MAX, 0, 0, 0]),
    (0x8000_0001, 0, [0, 0, u32::MAX, u32::MAX]),
];

fn missing_features(saved: &[kvm_cpuid_entry2], supported: &[kvm_cpuid_entry2]) -> Vec<String> {
    let find = |list: &[kvm_cpuid_entry2], leaf, sub| {
        let entry = list
            .iter()
            .find(|entry| (entry.function, entry.index) == (leaf, sub));
        entry.map_or([0; 4], |entry| [entry.eax, entry.ebx, entry.ecx, entry.edx])
    };
    let mut missing = vec![];
    for (leaf, sub, masks) in FEATURES {
        let here = find(supported, leaf, sub);
        let registers = find(saved, leaf, sub)
            .into_iter()
            .zip(here)
            .zip(masks)
            .zip("abcd".chars());
        for (((saved, here), mask), register) in registers {
            let bits = saved & !here & mask;
            if bits != 0 {
                missing.push(format!("CPUID leaf {leaf:#x}.{sub} e{register}x bits {bits:#x}"));
            }
        }
    }
    missing
}

#[cfg(test)]
mod tests {
    use super::*;

    fn msr(index: u32, data: u64) -> kvm_msr_entry {
        kvm_msr_entry {
            index,
            data,
            ..Default::default()
        }
    }

    #[test]
    fn a_timer_is_set_behind_its_counter_and_never_lost() {
        let saved = [msr(MSR_TSC_DEADLINE, 0), msr(1, 2), msr(MSR_TSC, 77)];
        assert_eq!(
            ordered(&saved),
            [msr(1, 2), msr(MSR_TSC, 77), msr(MSR_TSC_DEADLINE, 77)]
        );
        let saved = [msr(MSR_TSC_DEADLINE, 99), msr(MSR_TSC, 77)];
        assert_eq!(ordered(&saved), [msr(MSR_TSC, 77), msr(MSR_TSC_DEADLINE, 99)]);
    }

    #[test]
    fn a_processor_that_lacks_a_feature_is_found() {
        let leaf = |function, index, ecx| kvm_cpuid_entry2 {
            function,
            index,
            ecx,
            ..Default::default()
        };
        let saved = [leaf(1, 0, 0b1011 | 1 << 31), leaf(0xb, 0, u32::MAX)];
        assert_eq!(
            missing_features(&saved, &[leaf(1, 0, 0b0011)]),
            ["CPUID leaf 0x1.0 ecx bits 0x8"]
        );
        assert!(missing_features(&saved, &[leaf(1, 0, 0b1111)]).is_empty());
        assert_eq!(missing_features(&saved, &[]).len(), 1);
    }
}
