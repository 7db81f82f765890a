//! Puts a kernel into guest memory and says how the first vCPU enters it.
//!
//! Two ways: an ELF `vmlinux` by its PVH entry (32-bit protected mode, no paging), a bzImage by the 64-bit entry of the
//! Linux boot protocol. Nothing else runs before the kernel: no firmware, no initramfs.

mod linux64;
mod pvh;

use crate::layout;
use crate::memory::{self, GuestMemory};
use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::{BzImage, Elf, KernelLoader};
use std::fs::File;
use std::os::unix::fs::FileExt;
use vm_memory::{Address, Bytes, GuestAddress};

/// How the boot vCPU starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// PVH: protected mode, paging off, EBX points to the start info.
    Pvh {
        /// Instruction pointer.
        rip: u64,
    },
    /// Long mode with an identity map of the first 4 GiB, RSI points to the zero page.
    Linux64 {
        /// Instruction pointer.
        rip: u64,
    },
}

/// Why a kernel cannot be booted.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The file cannot be read.
    #[error("cannot read the kernel")]
    Read(#[source] std::io::Error),
    /// The file is neither an ELF nor a bzImage.
    #[error("the kernel is neither an ELF vmlinux nor a bzImage (it begins with {0:02x?})")]
    Unknown([u8; 4]),
    /// The file is cut, or does not fit into memory.
    #[error("cannot load the kernel into {memory_mib} MiB of memory: the file is damaged, or needs more")]
    Load {
        /// Size of guest memory, MiB.
        memory_mib: u64,
        /// What the loader found.
        #[source]
        source: linux_loader::loader::Error,
    },
    /// A vmlinux that was built without CONFIG_PVH.
    #[error("the kernel has no PVH entry; build it with CONFIG_PVH=y")]
    NoPvhEntry,
    /// A bzImage too old for, or built without, the 64-bit entry.
    #[error("the bzImage has no 64-bit entry; boot protocol 2.12 or newer is needed")]
    No64BitEntry,
    /// The kernel unpacks itself beyond the end of memory.
    #[error("the kernel needs {needed_mib} MiB of memory to unpack itself, the VM has {memory_mib}")]
    TooLittleMemory {
        /// What it needs.
        needed_mib: u64,
        /// What there is.
        memory_mib: u64,
    },
    /// The command line is too long or not ASCII.
    #[error("the kernel command line has {0} bytes; ASCII and at most {max} are allowed", max = layout::COMMAND_LINE_SIZE - 1)]
    CommandLine(usize),
    /// Guest memory is too small even for the boot data.
    #[error("cannot write boot data to guest memory")]
    Memory(#[source] vm_memory::GuestMemoryError),
}

/// Loads `kernel`, writes its command line and boot parameters. `rsdp` is where the ACPI tables begin.
///
/// # Errors
/// When the file is no kernel that can be booted here, see [`BootError`].
pub fn load(
    memory: &GuestMemory,
    kernel: &mut File,
    command_line: &str,
    rsdp: u64,
) -> Result<Entry, BootError> {
    write_command_line(memory, command_line)?;
    let mut magic = [0; 4];
    kernel.read_exact_at(&mut magic, 0).map_err(BootError::Read)?;
    let memory_mib = memory::size(memory) >> 20;
    let load_error = |source| BootError::Load { memory_mib, source };
    let high = Some(GuestAddress(layout::HIGH_RAM));
    if magic == *b"\x7fELF" {
        let loaded = Elf::load(&**memory, None, kernel, high).map_err(load_error)?;
        let PvhBootCapability::PvhEntryPresent(entry) = loaded.pvh_boot_cap else {
            return Err(BootError::NoPvhEntry);
        };
        pvh::write_start_info(memory, rsdp)?;
        return Ok(Entry::Pvh {
            rip: entry.raw_value(),
        });
    }
    let mut header_magic = [0; 4];
    kernel
        .read_exact_at(&mut header_magic, 0x202)
        .map_err(|_| BootError::Unknown(magic))?;
    if header_magic != *b"HdrS" {
        return Err(BootError::Unknown(magic));
    }
    let loaded = BzImage::load(&**memory, None, kernel, high).map_err(load_error)?;
    let header = loaded.setup_header.ok_or(BootError::No64BitEntry)?;
    linux64::write_zero_page(memory, header, loaded.kernel_load.raw_value(), rsdp)
}

fn write_command_line(memory: &GuestMemory, text: &str) -> Result<(), BootError> {
    if !text.is_ascii() || text.contains('\0') || text.len() >= layout::COMMAND_LINE_SIZE {
        return Err(BootError::CommandLine(text.len()));
    }
    let mut bytes = text.as_bytes().to_vec();
    bytes.push(0);
    memory
        .write_slice(&bytes, GuestAddress(layout::COMMAND_LINE))
        .map_err(BootError::Memory)
}

/// What a stretch of the guest's address space is, as in PVH and E820 memory maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
enum Kind {
    Ram = 1,
    Reserved = 2,
}

/// The memory map for the kernel: (start, length, kind).
fn memory_map(bytes: u64) -> Vec<(u64, u64, Kind)> {
    let mut map = vec![
        (0, layout::LOW_RAM_END, Kind::Ram),
        (
            layout::LOW_RAM_END,
            layout::HIGH_RAM - layout::LOW_RAM_END,
            Kind::Reserved,
        ),
    ];
    for (start, length) in memory::regions(bytes) {
        let usable = start.max(layout::HIGH_RAM);
        if start + length > usable {
            map.push((usable, start + length - usable, Kind::Ram));
        }
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn file(bytes: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    fn load_bytes(bytes: &[u8]) -> Result<Entry, BootError> {
        load(
            &memory::create(64).unwrap(),
            &mut file(bytes),
            "quiet",
            layout::ACPI,
        )
    }

    #[test]
    fn files_that_are_no_kernel_are_named() {
        assert!(matches!(load_bytes(b""), Err(BootError::Read(_))));
        assert!(matches!(
            load_bytes(&[7; 4096]),
            Err(BootError::Unknown([7, 7, 7, 7]))
        ));
        assert!(matches!(load_bytes(b"\x7fELF cut"), Err(BootError::Load { .. })));
    }

    #[test]
    fn a_cut_bzimage_is_refused() {
        let mut bytes = vec![0; 0x300];
        bytes[0x1f1] = 4;
        bytes[0x202..0x206].copy_from_slice(b"HdrS");
        bytes[0x206..0x208].copy_from_slice(&0x20fu16.to_le_bytes());
        bytes[0x211] = 1;
        assert!(matches!(load_bytes(&bytes), Err(BootError::Load { .. })));
    }

    #[test]
    fn a_command_line_that_does_not_fit_is_refused() {
        let memory = memory::create(16).unwrap();
        assert!(matches!(
            write_command_line(&memory, &"x".repeat(2048)),
            Err(BootError::CommandLine(2048))
        ));
        assert!(matches!(
            write_command_line(&memory, "käse"),
            Err(BootError::CommandLine(_))
        ));
        assert!(matches!(
            write_command_line(&memory, "a\0b"),
            Err(BootError::CommandLine(_))
        ));
        write_command_line(&memory, &"x".repeat(2047)).unwrap();
    }

    #[test]
    fn the_memory_map_leaves_out_the_device_hole() {
        let map = memory_map(4 << 30);
        assert_eq!(
            map[2],
            (
                layout::HIGH_RAM,
                memory::LOW_MEMORY_END - layout::HIGH_RAM,
                Kind::Ram
            )
        );
        assert_eq!(map[3], (memory::HIGH_MEMORY, 1 << 30, Kind::Ram));
        assert_eq!(memory_map(64 << 20).len(), 3);
    }
}
