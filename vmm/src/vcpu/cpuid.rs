//! What the guest learns from CPUID: the host's CPU as KVM offers it, with this VM's topology.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// KVM_CPUID_FEATURES.
const KVM_FEATURES: u32 = 0x4000_0001;
/// Asynchronous page faults, and the two refinements of them. They make a guest wait for a host page in its own way, which
/// hung or crashed guests with several vCPUs under nested KVM; guest memory here is seldom swapped, so nothing is lost.
const ASYNC_PF: u32 = 1 << 4 | 1 << 10 | 1 << 14;

/// Adapts what KVM supports to vCPU `index` of `cpus`, which share one package and have one thread a core.
///
/// # Errors
/// When there are more entries than KVM takes.
pub fn adapt(supported: &CpuId, index: u8, cpus: u8) -> Result<CpuId, vmm_sys_util::fam::Error> {
    let mut entries = vec![];
    for mut entry in supported.as_slice().iter().copied() {
        match entry.function {
            // KVM leaves the extended topology to the monitor, and lists each leaf once, empty.
            EXTENDED_TOPOLOGY | EXTENDED_TOPOLOGY_2 => {
                if entry.index == 0 {
                    entries.extend((0..3).map(|level| topology_level(entry.function, level, index, cpus)));
                }
            }
            _ => {
                adapt_entry(&mut entry, index, cpus);
                entries.push(entry);
            }
        }
    }
    CpuId::from_entries(&entries)
}

/// [`adapt`] for each of `cpus` vCPUs.
///
/// # Errors
/// As there.
pub fn of_all(supported: &CpuId, cpus: u8) -> Result<Vec<CpuId>, vmm_sys_util::fam::Error> {
    (0..cpus).map(|index| adapt(supported, index, cpus)).collect()
}

/// Extended topology enumeration, and its second version.
const EXTENDED_TOPOLOGY: u32 = 0xb;
const EXTENDED_TOPOLOGY_2: u32 = 0x1f;

/// A level of the extended topology: one thread a core, then the cores, then the end.
fn topology_level(function: u32, level: u32, index: u8, cpus: u8) -> kvm_cpuid_entry2 {
    const THREAD: u32 = 1;
    const CORE: u32 = 2;
    let (eax, ebx, kind) = match level {
        0 => (0, 1, THREAD),
        1 => (core_bits(cpus), cpus.into(), CORE),
        _ => (0, 0, 0),
    };
    kvm_cpuid_entry2 {
        function,
        index: level,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax,
        ebx,
        ecx: level | kind << 8,
        edx: index.into(),
        ..Default::default()
    }
}

/// Bits of an APIC identifier that number the cores.
fn core_bits(cpus: u8) -> u32 {
    u8::BITS - (cpus - 1).leading_zeros()
}

fn adapt_entry(entry: &mut kvm_cpuid_entry2, index: u8, cpus: u8) {
    let id = u32::from(index);
    let count = u32::from(cpus);
    match entry.function {
        0x1 => {
            const HYPERVISOR: u32 = 1 << 31;
            const TSC_DEADLINE: u32 = 1 << 24;
            const SEVERAL_THREADS: u32 = 1 << 28;
            entry.ebx = entry.ebx & 0xffff | id << 24 | count << 16;
            // KVM emulates the deadline timer on any host but does not list it (KVM_CAP_TSC_DEADLINE_TIMER).
            entry.ecx |= HYPERVISOR | TSC_DEADLINE;
            entry.edx = if cpus > 1 {
                entry.edx | SEVERAL_THREADS
            } else {
                entry.edx & !SEVERAL_THREADS
            };
        }
        // Deterministic cache parameters: levels 1 and 2 are a core's own, the last level is shared by all.
        0x4 if entry.eax & 0x1f != 0 => {
            let level = entry.eax >> 5 & 7;
            let sharing = if level < 3 { 0 } else { count - 1 };
            entry.eax = entry.eax & 0x3fff | sharing << 14 | ((1 << core_bits(cpus)) - 1).min(63) << 26;
        }
        // The performance-energy bias belongs to the host.
        0x6 => entry.ecx &= !(1 << 3),
        // Performance counters are not virtualised.
        0xa => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
        KVM_FEATURES => entry.eax &= !ASYNC_PF,
        // AMD: size identifiers.
        0x8000_0008 => entry.ecx = core_bits(cpus) << 12 | (count - 1),
        // AMD: cache sharing, as leaf 4.
        0x8000_001d if entry.eax & 0x1f != 0 => {
            let level = entry.eax >> 5 & 7;
            let sharing = if level < 3 { 0 } else { count - 1 };
            entry.eax = entry.eax & 0x3fff | sharing << 14;
        }
        // AMD: extended APIC identifier, core, node.
        0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (id, id, 0),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn adapted(function: u32, sub: u32, index: u8, cpus: u8) -> kvm_cpuid_entry2 {
        let mut entry = kvm_cpuid_entry2 {
            function,
            index: sub,
            eax: u32::MAX,
            ebx: u32::MAX,
            ecx: u32::MAX,
            edx: u32::MAX,
            ..Default::default()
        };
        adapt_entry(&mut entry, index, cpus);
        entry
    }

    #[test]
    fn each_vcpu_has_its_own_identifier() {
        assert_eq!(adapted(1, 0, 3, 8).ebx >> 16, 3 << 8 | 8);
        assert_eq!(topology_level(0xb, 0, 3, 8).edx, 3);
        assert_eq!(adapted(0x8000_001e, 0, 3, 8).eax, 3);
    }

    #[test]
    fn the_topology_has_one_package_for_any_number_of_cpus() {
        for (cpus, bits) in [(1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (64, 6), (255, 8)] {
            let cores = topology_level(0xb, 1, 0, cpus);
            assert_eq!((cores.eax, cores.ebx), (bits, u32::from(cpus)));
        }
        assert_eq!(adapted(1, 0, 0, 1).edx & 1 << 28, 0);
    }

    #[test]
    fn the_extended_topology_replaces_the_empty_leaf_of_kvm() {
        let leaf = |function, index| kvm_cpuid_entry2 {
            function,
            index,
            ..Default::default()
        };
        let supported = CpuId::from_entries(&[leaf(1, 0), leaf(0xb, 0), leaf(0xb, 1), leaf(0xd, 0)]).unwrap();
        let adapted = adapt(&supported, 1, 2).unwrap();
        let leaves: Vec<_> = adapted
            .as_slice()
            .iter()
            .map(|leaf| (leaf.function, leaf.index))
            .collect();
        assert_eq!(leaves, [(1, 0), (0xb, 0), (0xb, 1), (0xb, 2), (0xd, 0)]);
    }

    #[test]
    fn asynchronous_page_faults_are_not_offered() {
        assert_eq!(adapted(KVM_FEATURES, 0, 0, 1).eax & ASYNC_PF, 0);
    }
}
