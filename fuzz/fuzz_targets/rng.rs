//! Requests for random bytes.
#![no_main]

use lighter_fuzz::{Input, device};
use lighter_vmm::virtio::rng::Rng;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    device::drive(&mut Rng::new(), &mut Input::new(bytes), |_| {});
});
