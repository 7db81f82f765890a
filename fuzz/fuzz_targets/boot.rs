//! Files that claim to be kernels.
#![no_main]

use lighter_fuzz::{device::MEMORY, file};
use lighter_vmm::{boot, layout};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let mut kernel = file(bytes, bytes.len() as u64);
    let _ = boot::load(&MEMORY, &mut kernel, "console=ttyS0", layout::ACPI);
});
