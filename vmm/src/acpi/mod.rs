//! The hardware's description to the guest: hardware-reduced ACPI (ACPI 6.5, section 4.1).
//!
//! CPUs and the interrupt controller (MADT), what the machine lacks (FADT), and in the DSDT: a virtio-mmio device for
//! each window, the power button and the generation identifier with the event device that announces them, and the
//! power-off state.

mod dsdt;

use crate::layout;
use crate::memory::GuestMemory;
use acpi_tables::Aml;
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::xsdt::XSDT;
use vm_memory::{Bytes, GuestAddress};

const OEM_ID: [u8; 6] = *b"LIGHTR";
const OEM_TABLE_ID: [u8; 8] = *b"LIGHTER ";

/// FADT boot architecture flags (table 5.11): no VGA, no CMOS clock; an 8042 is absent by its flag not being set.
const NO_VGA: u16 = 1 << 2;
const NO_CMOS_RTC: u16 = 1 << 5;
/// Written to [`layout::RESET_PORT`] by the guest to reset.
pub const RESET_VALUE: u8 = 1;

/// Whether a write to [`layout::SLEEP_CONTROL_PORT`] is the guest powering off (ACPI 6.5, section 4.8.3.7: SLP_TYP and
/// SLP_EN).
pub fn is_power_off(sleep_control: u8) -> bool {
    const SLEEP_ENABLE: u8 = 1 << 5;
    sleep_control & SLEEP_ENABLE != 0 && sleep_control >> 2 & 7 == dsdt::SLEEP_TYPE_OFF
}

/// Why there are no tables.
#[derive(Debug, thiserror::Error)]
pub enum AcpiError {
    /// They do not fit between [`layout::ACPI`] and [`layout::ACPI_END`].
    #[error("ACPI tables of {0} bytes do not fit")]
    TooLong(u64),
    /// Guest memory is too small.
    #[error("cannot write ACPI tables to guest memory")]
    Memory(#[source] vm_memory::GuestMemoryError),
}

/// Writes the tables for `cpus` vCPUs and `devices` virtio devices; returns where the RSDP is.
///
/// # Errors
/// When they do not fit.
pub fn write_tables(memory: &GuestMemory, cpus: u8, devices: usize) -> Result<u64, AcpiError> {
    let rsdp = layout::ACPI;
    let mut tables = Tables {
        memory,
        next: rsdp + Rsdp::len() as u64,
    };
    let dsdt = tables.add(&dsdt::build(devices))?;
    let fadt = tables.add(&bytes(&fadt(dsdt)))?;
    let madt = tables.add(&bytes(&madt(cpus)))?;
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, 1);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = tables.add(&bytes(&xsdt))?;
    memory
        .write_slice(&bytes(&Rsdp::new(OEM_ID, xsdt)), GuestAddress(rsdp))
        .map_err(AcpiError::Memory)?;
    Ok(rsdp)
}

struct Tables<'a> {
    memory: &'a GuestMemory,
    next: u64,
}

impl Tables<'_> {
    /// Writes a table behind the last one; returns its address.
    fn add(&mut self, table: &[u8]) -> Result<u64, AcpiError> {
        let address = self.next.next_multiple_of(16);
        let end = address + table.len() as u64;
        if end > layout::ACPI_END {
            return Err(AcpiError::TooLong(end - layout::ACPI));
        }
        self.memory
            .write_slice(table, GuestAddress(address))
            .map_err(AcpiError::Memory)?;
        self.next = end;
        Ok(address)
    }
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = vec![];
    table.to_aml_bytes(&mut bytes);
    bytes
}

fn fadt(dsdt: u64) -> acpi_tables::fadt::FADT {
    let register = |port: u16| GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, port.into());
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, 1)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::ResetRegSup);
    fadt.iapc_boot_arch = (NO_VGA | NO_CMOS_RTC).into();
    fadt.reset_reg = register(layout::RESET_PORT);
    fadt.reset_value = RESET_VALUE;
    fadt.sleep_control_reg = register(layout::SLEEP_CONTROL_PORT);
    fadt.sleep_status_reg = register(layout::SLEEP_STATUS_PORT);
    fadt.finalize()
}

fn madt(cpus: u8) -> MADT {
    let local = LocalInterruptController::Address(layout::LOCAL_APIC);
    let mut madt = MADT::new(OEM_ID, OEM_TABLE_ID, 1, local);
    for cpu in 0..cpus {
        madt.add_structure(ProcessorLocalApic::new(cpu, cpu, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, layout::IOAPIC, 0));
    madt
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    #[test]
    fn only_the_right_sleep_type_powers_off() {
        assert!(is_power_off(5 << 2 | 1 << 5));
        assert!(!is_power_off(5 << 2));
        assert!(!is_power_off(4 << 2 | 1 << 5));
    }

    #[test]
    fn every_table_of_every_machine_is_found_from_the_rsdp_with_a_right_checksum() {
        let memory = crate::memory::create(16).unwrap();
        for cpus in 1..=64 {
            for devices in 0..=layout::MAX_VIRTIO_DEVICES {
                tables_are_right(&memory, cpus, devices);
            }
        }
    }

    fn tables_are_right(memory: &GuestMemory, cpus: u8, devices: usize) {
        let rsdp = write_tables(memory, cpus, devices).unwrap();
        let read = |at: u64, length: usize| {
            let mut bytes = vec![0; length];
            memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
            bytes
        };
        let word = |at: u64| memory.read_obj::<u32>(GuestAddress(at)).unwrap() as usize;
        let root = read(rsdp, Rsdp::len());
        assert_eq!((&root[..8], sum(&root)), (&b"RSD PTR "[..], 0));
        let xsdt = memory.read_obj::<u64>(GuestAddress(rsdp + 24)).unwrap();
        let entries: Vec<u64> = (0..2)
            .map(|n| memory.read_obj(GuestAddress(xsdt + 36 + n * 8)).unwrap())
            .collect();
        let dsdt = memory.read_obj::<u64>(GuestAddress(entries[0] + 140)).unwrap();
        let mut places = vec![(rsdp, rsdp + Rsdp::len() as u64)];
        for (at, name) in [
            (xsdt, b"XSDT"),
            (entries[0], b"FACP"),
            (entries[1], b"APIC"),
            (dsdt, b"DSDT"),
        ] {
            let table = read(at, word(at + 4));
            assert_eq!(
                (&table[..4], sum(&table)),
                (&name[..], 0),
                "{cpus} CPUs, {devices} devices"
            );
            places.push((at, at + table.len() as u64));
        }
        places.sort_unstable();
        let apart = places.is_sorted_by(|one, next| one.1 <= next.0);
        assert!(apart && places[4].1 <= layout::ACPI_END, "{places:?}");
    }
}
