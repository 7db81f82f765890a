//! Layers of a disk that somebody else made, read, merged and written.
#![no_main]

use lighter_disk::{CLUSTER, Chain, commit, create, merge};
use lighter_fuzz::{Input, file};
use rustix::fs::{FallocateFlags, fallocate};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

/// Where a layer's map begins.
const MAP: u64 = 4096;

/// A layer with any map, or with anything at all.
fn layer(input: &mut Input<'_>) -> File {
    let layer = file(&[], 0);
    let size = u64::from(input.byte()) * (CLUSTER / 2) + u64::from(input.byte() % 3) * 512;
    if create(&layer, size).is_err() {
        return layer;
    }
    // The map and the data, and where they begin.
    layer.write_all_at(input.take(16), MAP).expect("write");
    for _ in 0..input.below(4) {
        let at = match input.byte() {
            0 => input.byte().into(),
            1 => u64::from(input.word()) % (1 << 24),
            _ => CLUSTER + u64::from(input.byte()) * 4096,
        };
        layer.write_all_at(input.blob(), at).expect("write");
    }
    layer
}

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let mut input = Input::new(bytes);
    let base = file(b"base", (u64::from(input.byte()) + 1) * (CLUSTER / 4));
    let layers: Vec<File> = (0..=input.below(3)).map(|_| layer(&mut input)).collect();
    let shared = |file: &File| Arc::new(file.try_clone().expect("another descriptor"));
    let open = |base: &File, layers: &[File]| Chain::open(shared(base), layers.iter().map(shared).collect());
    let Ok(mut chain) = open(&base, &layers) else {
        return;
    };
    chain.make_writable().expect("make it writable");
    let size = chain.size();
    for _ in 0..input.below(16) {
        let sectors = size / 512;
        let at = u64::from(input.half()) % sectors;
        let length = u64::from(input.byte()).clamp(1, sectors - at) * 512;
        let at = at * 512;
        match input.below(4) {
            0 => {
                chain.prepare_write(at, length).expect("prepare");
                let top = &chain.files()[chain.top()];
                let bytes = vec![input.byte(); length as usize];
                top.write_all_at(&bytes, chain.start() + at).expect("write");
            }
            1 => {
                let emptied = chain.prepare_empty(at, length).expect("prepare");
                let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                let top = &chain.files()[chain.top()];
                fallocate(top, hole, chain.start() + at, length).expect("punch a hole");
                chain.emptied(emptied, input.byte() & 1 == 0);
            }
            2 => chain.flush().expect("flush"),
            _ => chain.read_at(&mut vec![0; length as usize], at).expect("read"),
        }
    }
    chain.flush().expect("flush");
    let content = |chain: &Chain| {
        let mut content = vec![0; chain.size() as usize];
        chain.read_at(&mut content, 0).expect("read");
        content
    };
    let wanted = content(&chain);
    drop(chain);
    // However it is read, it is the same disk.
    let again = open(&base, &layers).expect("it is one still");
    assert!(content(&again) == wanted, "opened again");
    let merged = file(&[], 0);
    merge(&layers, &merged).expect("merge");
    assert!(
        content(&open(&base, &[merged]).expect("merged")) == wanted,
        "merged"
    );
    commit(&layers, &base).expect("commit");
    assert!(
        content(&open(&base, &layers).expect("committed")) == wanted,
        "committed"
    );
});
