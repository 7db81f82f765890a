//! The guest's physical address space and interrupt lines: every fixed place in one table.
//!
//! ```text
//!          0 ┬ memory; boot data in the first MiB (below)
//! 0xc0000000 ┼ device registers: virtio-mmio, IOAPIC, local APIC, KVM's own pages
//!      4 GiB ┼ the rest of memory
//! ```

/// Global descriptor table of the boot CPU.
pub const GDT: u64 = 0x500;
/// PVH start info, or the 64-bit protocol's zero page.
pub const BOOT_PARAMETERS: u64 = 0x6000;
/// PVH memory map.
pub const MEMORY_MAP: u64 = 0x7000;
/// Page tables for the 64-bit protocol: one PML4, one PDPT, four page directories.
pub const PAGE_TABLES: u64 = 0x9000;
/// Kernel command line.
pub const COMMAND_LINE: u64 = 0x20000;
/// Longest command line with its closing zero, as the kernel's COMMAND_LINE_SIZE.
pub const COMMAND_LINE_SIZE: usize = 2048;
/// End of usable memory in the first 640 KiB.
pub const LOW_RAM_END: u64 = 0x9fc00;
/// ACPI tables, RSDP first; where a kernel would also look for them by itself (ACPI 6.5, 5.2.5.1).
pub const ACPI: u64 = 0xe0000;
/// End of the place for ACPI tables.
pub const ACPI_END: u64 = 0xff000;
/// The virtual machine's generation identifier, 16 bytes.
pub const GENERATION_ID: u64 = 0xff000;
/// Where kernels are loaded, and memory is usable again.
pub const HIGH_RAM: u64 = 0x10_0000;

/// First virtio-mmio register window.
pub const VIRTIO_MMIO: u64 = 0xd000_0000;
/// Distance from one window to the next, and its size.
pub const VIRTIO_MMIO_STRIDE: u64 = 0x1000;
/// I/O interrupt controller.
pub const IOAPIC: u32 = 0xfec0_0000;
/// Local interrupt controllers.
pub const LOCAL_APIC: u32 = 0xfee0_0000;
/// A page that KVM needs on some CPUs (KVM_SET_IDENTITY_MAP_ADDR).
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
/// Three pages that KVM needs on some CPUs (KVM_SET_TSS_ADDR).
pub const KVM_TSS: usize = 0xfffb_d000;

/// I/O port of the serial console.
pub const SERIAL_PORT: u16 = 0x3f8;
/// Number of the serial console's ports.
pub const SERIAL_PORTS: u16 = 8;
/// ACPI sleep control register (power-off).
pub const SLEEP_CONTROL_PORT: u16 = 0x600;
/// ACPI sleep status register.
pub const SLEEP_STATUS_PORT: u16 = 0x601;
/// ACPI reset register.
pub const RESET_PORT: u16 = 0x602;

/// Interrupt of the serial console.
pub const SERIAL_GSI: u32 = 4;
/// Interrupt of the ACPI event device: power button.
pub const POWER_BUTTON_GSI: u32 = 5;
/// Interrupt of the ACPI event device: a new generation identifier.
pub const GENERATION_GSI: u32 = 6;
/// First interrupt for virtio devices; each has one.
pub const VIRTIO_GSI: u32 = 7;
/// Pins of the I/O interrupt controller.
pub const IOAPIC_PINS: u32 = 24;

/// How many virtio devices there is room for.
pub const MAX_VIRTIO_DEVICES: usize = (IOAPIC_PINS - VIRTIO_GSI) as usize;
