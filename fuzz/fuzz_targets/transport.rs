//! Registers that a driver writes in any order, and a device's state of a snapshot that somebody changed.
#![no_main]

use lighter_fuzz::{Input, device, file};
use lighter_vmm::snapshot::DeviceState;
use lighter_vmm::virtio::VirtioDevice;
use lighter_vmm::virtio::balloon::Balloon;
use lighter_vmm::virtio::block::{Block, BlockConfig};
use lighter_vmm::virtio::rng::Rng;

fn some_device(number: u16) -> Box<dyn VirtioDevice> {
    let config = BlockConfig {
        id: "fuzz".into(),
        file: file(&[], 1 << 16),
        layers: vec![],
        read_only: false,
    };
    match number {
        0 => Box::new(Rng::new()),
        1 => Box::new(Balloon::new()),
        _ => Box::new(Block::new(config).expect("a disk")),
    }
}

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    device::clear_memory();
    let mut input = Input::new(bytes);
    let number = input.below(3);
    let mut transport = device::transport(some_device(number));
    for _ in 0..input.byte() {
        // The first registers are the transport's, and few.
        let offset = u64::from(input.byte()) * 4;
        match input.below(4) {
            0 => transport.read(offset, &mut [0; 4]),
            1 => transport.write(offset, input.take(4)),
            2 => {
                transport.pause();
                let saved = transport.save().expect("it is paused");
                let own = transport.save_device().expect("its state");
                transport = device::transport(some_device(number));
                transport.restore(&saved, &own).expect("what was saved");
                transport.resume();
                transport.remind_driver();
            }
            _ => transport.write(offset, &u32::from(input.byte()).to_le_bytes()),
        }
    }
    transport.pause();
    drop(transport);
    let mut transport = device::transport(some_device(number));
    if let Ok(state) = postcard::from_bytes::<DeviceState>(input.take(1 << 16))
        && transport.restore(&state.transport, &state.own).is_ok()
    {
        transport.resume();
        transport.pause();
        transport.save().expect("it is paused");
    }
});
