//! Requests to a disk: of one file, read-only, and of layers, which have to be such afterwards.
#![no_main]

use lighter_disk::Chain;
use lighter_fuzz::{Input, device, file};
use lighter_vmm::virtio::block::{Block, BlockConfig};
use std::sync::Arc;

/// Three clusters of a layer and a sector.
const SIZE: u64 = 3 * lighter_disk::CLUSTER + 512;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let mut input = Input::new(bytes);
    let base = file(b"the beginning", SIZE);
    let kind = input.below(3);
    let layers = match kind {
        0 => {
            let layer = file(&[], 0);
            lighter_disk::create(&layer, SIZE).expect("a layer");
            vec![layer]
        }
        _ => vec![],
    };
    let again = |file: &std::fs::File| Arc::new(file.try_clone().expect("another descriptor"));
    let files = (again(&base), layers.iter().map(again).collect::<Vec<_>>());
    let mut disk = Block::new(BlockConfig {
        id: "fuzz".into(),
        file: base,
        layers,
        read_only: kind == 1,
    })
    .expect("a disk");
    device::drive(&mut disk, &mut input, |_| {});
    drop(disk);
    if kind == 0 {
        let chain = Chain::open(files.0, files.1).expect("it is one still");
        let mut content = vec![0; SIZE as usize];
        chain.read_at(&mut content, 0).expect("read");
    }
});
