//! What fuzz targets share: bytes that are read as a story ([`Input`]), and a driver that makes it happen to a device ([`device`]).

pub mod device;
mod input;

pub use input::Input;

use std::fs::File;
use std::os::unix::fs::FileExt;

/// A file that is nowhere but in memory, with `content` and of `length` bytes.
pub fn file(content: &[u8], length: u64) -> File {
    let fd = rustix::fs::memfd_create("fuzz", rustix::fs::MemfdFlags::CLOEXEC).expect("a file");
    let file = File::from(fd);
    file.set_len(length).expect("set its length");
    file.write_all_at(content, 0).expect("write");
    file
}
