//! A snapshot's files, whose checksums are right and the content wrong.
#![no_main]

use lighter_fuzz::{Input, file};
use lighter_vmm::snapshot::{self, working_set};
use sha2::{Digest, Sha256};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let mut input = Input::new(bytes);
    let whole = input.byte();
    let content = input.take(usize::MAX);
    let bytes = match whole & 1 {
        0 => content.to_vec(),
        _ => [
            &b"LGHTSNAP"[..],
            &snapshot::VERSION.to_le_bytes(),
            &(content.len() as u64).to_le_bytes(),
            &Sha256::digest(content),
            content,
        ]
        .concat(),
    };
    // What is understood can be written, and is then the same.
    if let Ok(state) = snapshot::read(&mut file(&bytes, bytes.len() as u64)) {
        let [mut first, mut second] = [file(&[], 0), file(&[], 0)];
        snapshot::write(&state, &mut first).expect("write");
        rewind(&mut first);
        let again = snapshot::read(&mut first).expect("read");
        snapshot::write(&again, &mut second).expect("write");
        assert_eq!(all(&mut first), all(&mut second));
    }
    let parts = working_set::read(&mut file(content, content.len() as u64), 64 << 20);
    let mut written = file(&[], 0);
    working_set::write(&parts, &mut written).expect("write");
    rewind(&mut written);
    assert_eq!(working_set::read(&mut written, 64 << 20), parts);
});

fn rewind(file: &mut std::fs::File) {
    std::io::Seek::rewind(file).expect("rewind");
}

fn all(file: &mut std::fs::File) -> Vec<u8> {
    rewind(file);
    let mut bytes = vec![];
    std::io::Read::read_to_end(file, &mut bytes).expect("read");
    bytes
}
