//! The 64-bit entry of the Linux boot protocol (Documentation/arch/x86/boot.rst): zero page and page tables.

use super::{BootError, Entry, memory_map};
use crate::layout;
use crate::memory::{self, GuestMemory};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::{Bytes, GuestAddress};

/// Boot loader type "unknown".
const LOADER_UNKNOWN: u8 = 0xff;
/// The first protocol version with `xloadflags`.
const PROTOCOL_2_12: u16 = 0x020c;
/// `xloadflags`: there is a 64-bit entry.
const XLF_KERNEL_64: u16 = 1;
/// Where that entry is, after the start of the protected-mode kernel.
const ENTRY_OFFSET: u64 = 0x200;

/// Writes the zero page and the page tables for a kernel whose protected-mode part lies at `load`.
pub(super) fn write_zero_page(
    memory: &GuestMemory,
    header: setup_header,
    load: u64,
    rsdp: u64,
) -> Result<Entry, BootError> {
    if header.version < PROTOCOL_2_12 || header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(BootError::No64BitEntry);
    }
    let bytes = memory::size(memory);
    let needed = header
        .pref_address
        .max(load)
        .saturating_add(u64::from(header.init_size));
    if needed > bytes.min(memory::LOW_MEMORY_END) {
        return Err(BootError::TooLittleMemory {
            needed_mib: needed.div_ceil(1 << 20),
            memory_mib: bytes >> 20,
        });
    }
    let mut params = boot_params {
        hdr: header,
        acpi_rsdp_addr: rsdp,
        ..Default::default()
    };
    params.hdr.type_of_loader = LOADER_UNKNOWN;
    params.hdr.cmd_line_ptr = layout::COMMAND_LINE as u32;
    params.hdr.cmdline_size = layout::COMMAND_LINE_SIZE as u32;
    let map = memory_map(bytes);
    for (entry, (addr, size, kind)) in params.e820_table.iter_mut().zip(&map) {
        *entry = boot_e820_entry {
            addr: *addr,
            size: *size,
            r#type: *kind as u32,
        };
    }
    // At most four entries.
    params.e820_entries = map.len() as u8;
    memory
        .write_obj(params, GuestAddress(layout::BOOT_PARAMETERS))
        .map_err(BootError::Memory)?;
    write_page_tables(memory).map_err(BootError::Memory)?;
    Ok(Entry::Linux64 {
        rip: load + ENTRY_OFFSET,
    })
}

/// Maps the first 4 GiB one to one by 2 MiB pages.
fn write_page_tables(memory: &GuestMemory) -> Result<(), vm_memory::GuestMemoryError> {
    const PRESENT_WRITABLE: u64 = 3;
    const LARGE: u64 = 1 << 7;
    let table = |number: u64| layout::PAGE_TABLES + number * 0x1000;
    memory.write_obj(table(1) | PRESENT_WRITABLE, GuestAddress(table(0)))?;
    for gib in 0..4 {
        memory.write_obj(
            table(2 + gib) | PRESENT_WRITABLE,
            GuestAddress(table(1) + gib * 8),
        )?;
        for page in 0..512 {
            let address = (gib << 30) | (page << 21);
            memory.write_obj(
                address | PRESENT_WRITABLE | LARGE,
                GuestAddress(table(2 + gib) + page * 8),
            )?;
        }
    }
    Ok(())
}
