//! Pages that a guest says it does not need.
#![no_main]

use lighter_fuzz::{Input, device};
use lighter_vmm::virtio::balloon::Balloon;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    device::drive(&mut Balloon::new(), &mut Input::new(bytes), |_| {});
});
