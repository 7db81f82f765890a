//! Files and images in and out of the engine, byte for byte.

use super::Test;
use super::world::{client_file, shared};
use std::io::Write;
use std::path::Path;
use std::process::Command;

pub const TESTS: &[Test] = &[
    ("a_large_file_is_copied_in_and_out_unchanged", copy),
    ("images_are_saved_and_loaded", save_and_load),
];

fn checksum(path: &Path) -> String {
    let output = Command::new("sha256sum").arg(path).output().expect("sha256sum");
    let text = String::from_utf8(output.stdout).expect("text");
    text.split_whitespace().next().expect("a checksum").to_owned()
}

fn copy() {
    let docker = shared();
    let folder = tempfile::tempdir().expect("make a folder");
    let (original, returned) = (folder.path().join("cargo"), folder.path().join("returned"));
    let mut file = std::fs::File::create(&original).expect("create");
    let mut state = 1u64;
    for _ in 0..100 {
        let block: Vec<u8> = std::iter::repeat_with(|| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 33).to_le_bytes()
        })
        .take((1 << 20) / 8)
        .flatten()
        .collect();
        file.write_all(&block).expect("write");
    }
    docker.ok(&["create", "--name", "hold", "busybox", "true"]);
    docker.ok(&["cp", &original.to_string_lossy(), "hold:/data/cargo"]);
    docker.ok(&["cp", "hold:/data/cargo", &returned.to_string_lossy()]);
    assert_eq!(std::fs::metadata(&returned).expect("returned").len(), 100 << 20);
    assert_eq!(checksum(&returned), checksum(&original));
    docker.ok(&["rm", "hold"]);
}

fn save_and_load() {
    let docker = shared();
    let folder = tempfile::tempdir().expect("make a folder");
    let archive = folder.path().join("image.tar");
    let path = archive.to_string_lossy();
    let tar = client_file("busybox.tar");
    docker.ok(&["import", &tar.to_string_lossy(), "traveller:1"]);
    let id = docker.ok(&["image", "inspect", "--format", "{{.Id}}", "traveller:1"]);
    docker.ok(&["save", "-o", &path, "traveller:1"]);
    docker.ok(&["rmi", "traveller:1"]);
    docker.run(&["image", "inspect", "traveller:1"]).fails_with(1);
    docker.ok(&["load", "-i", &path]);
    assert_eq!(
        docker.ok(&["image", "inspect", "--format", "{{.Id}}", "traveller:1"]),
        id
    );
    docker.ok(&["rmi", "traveller:1"]);
}
