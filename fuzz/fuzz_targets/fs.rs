//! Requests for files of a shared folder.
#![no_main]

use lighter_fuzz::{Input, device};
use lighter_vmm::virtio::fs::{Fs, FsConfig};
use rustix::process::{Resource, Rlimit, setrlimit};
use std::fs::{self, File};
use std::sync::LazyLock;
use tempfile::TempDir;

/// Where files that a guest makes cannot get long.
static FOLDER: LazyLock<TempDir> = LazyLock::new(|| {
    let most = Some(1 << 20);
    // SAFETY: ignoring a signal runs no code.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
    setrlimit(
        Resource::Fsize,
        Rlimit {
            current: most,
            maximum: most,
        },
    )
    .expect("limit files");
    tempfile::tempdir().expect("a folder")
});

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let mut input = Input::new(bytes);
    let outside = FOLDER.path();
    let shared = outside.join("shared");
    fs::create_dir_all(shared.join("folder")).expect("make a folder");
    fs::write(outside.join("secret"), "not the guest's").expect("write");
    fs::write(shared.join("file"), "the guest's").expect("write");
    let mut share = Fs::new(FsConfig {
        tag: "fuzz".into(),
        path: "fuzz".into(),
        folder: File::open(&shared).expect("open").into(),
        read_only: input.below(4) == 0,
        descriptors: 64,
    })
    .expect("a device");
    device::drive(&mut share, &mut input, |_| {});
    drop(share);
    let kept = fs::read(outside.join("secret")).expect("it is there");
    assert_eq!(kept, b"not the guest's");
    assert_eq!(
        fs::read_dir(outside).expect("read").count(),
        2,
        "what is beside the folder"
    );
    fs::remove_dir_all(&shared).expect("remove");
});
