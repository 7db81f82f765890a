//! The PVH boot data (Xen's x86/HVM direct boot ABI): start info and memory map.

use super::{BootError, memory_map};
use crate::layout;
use crate::memory::{self, GuestMemory};
use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_start_info};
use vm_memory::{Bytes, GuestAddress};

/// "xEn3" with the top bit of the E set.
const MAGIC: u32 = 0x336e_c578;

/// Writes the start info at [`layout::BOOT_PARAMETERS`].
pub(super) fn write_start_info(memory: &GuestMemory, rsdp: u64) -> Result<(), BootError> {
    let map = memory_map(memory::size(memory));
    let info = hvm_start_info {
        magic: MAGIC,
        version: 1,
        cmdline_paddr: layout::COMMAND_LINE,
        rsdp_paddr: rsdp,
        memmap_paddr: layout::MEMORY_MAP,
        // At most four entries.
        memmap_entries: map.len() as u32,
        ..Default::default()
    };
    memory
        .write_obj(info, GuestAddress(layout::BOOT_PARAMETERS))
        .map_err(BootError::Memory)?;
    let mut place = layout::MEMORY_MAP;
    for (addr, size, kind) in map {
        let entry = hvm_memmap_table_entry {
            addr,
            size,
            type_: kind as u32,
            reserved: 0,
        };
        memory
            .write_obj(entry, GuestAddress(place))
            .map_err(BootError::Memory)?;
        place += size_of::<hvm_memmap_table_entry>() as u64;
    }
    Ok(())
}
