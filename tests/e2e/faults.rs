//! Things that go wrong, and what the user is told.

use super::Test;
use super::world::{Home, until};
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_remount, unmount};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

pub const TESTS: &[Test] = &[
    ("a_kernel_or_image_that_is_none_is_named", wrong_files),
    ("a_disk_that_is_not_ours_is_never_formatted", foreign_disk),
    ("a_corrupt_disk_is_named_and_left_alone", corrupt_disk),
    (
        "an_engine_that_cannot_start_shows_its_last_lines",
        engine_cannot_start,
    ),
    (
        "a_full_data_disk_is_an_error_in_the_container_and_nothing_more",
        full_data_disk,
    ),
    ("a_full_host_disk_is_told_and_survived", full_host_disk),
];

fn wrong_files() {
    let home = Home::new();
    let damaged = home.path().join("damaged");
    // The right beginning, and not enough of it.
    let read = |variable: &str| std::fs::read(std::env::var_os(variable).expect("set")).expect("read");
    std::fs::write(&damaged, &read("LIGHTER_KERNEL")[..100_000]).expect("write");
    let path = damaged.to_string_lossy().into_owned();
    let message = home.run(&["start", "--kernel", &path, "bad"]).fails_with(1);
    assert!(message.contains("kernel") && message.contains(&path), "{message}");
    std::fs::write(&damaged, &read("LIGHTER_IMAGE")[..1 << 20]).expect("write");
    let message = home.run(&["start", "--image", &path, "bad"]).fails_with(1);
    assert!(message.contains(&path), "{message}");
    home.run(&["rm", "--force", "bad"]).ok();
}

/// A VM whose disk was prepared, started: what the user is told.
fn start_with_disk(prepare: impl Fn(&Path)) -> (String, Home) {
    let home = Home::new();
    home.run(&["create", "-c", "1", "-m", "1g", "-d", "1g", "disk"])
        .ok();
    prepare(&home.vm_file("disk", "data.img"));
    let message = home.run(&["start", "disk"]).fails_with(1);
    assert!(
        message.contains("data disk") && message.contains("/dev/vdb"),
        "{message}"
    );
    (message, home)
}

fn write_at(path: &Path, bytes: &[u8], offset: u64) {
    let disk = File::options().write(true).open(path).expect("open the disk");
    disk.write_all_at(bytes, offset).expect("write to the disk");
}

fn foreign_disk() {
    let (message, home) = start_with_disk(|disk| write_at(disk, b"my only copy", 4096));
    assert!(message.contains("left untouched"), "{message}");
    home.run(&["stop", "--force", "disk"]).ok();
    let disk = File::open(home.vm_file("disk", "data.img")).expect("open");
    let mut kept = [0; 12];
    disk.read_exact_at(&mut kept, 4096).expect("read");
    assert_eq!(&kept, b"my only copy");
    home.run(&["rm", "--force", "disk"]).ok();
}

fn corrupt_disk() {
    let (message, home) = start_with_disk(|disk| {
        let made = std::process::Command::new("mkfs.ext4")
            .args(["-q", "-F"])
            .arg(disk)
            .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
            .status()
            .expect("run mkfs.ext4");
        assert!(made.success());
        // Group descriptors and the tables behind them; the superblock still says ext4.
        write_at(disk, &vec![0xa5; 4 << 20], 4096);
    });
    assert!(message.contains("e2fsck"), "{message}");
    // The VM is up for a repair by hand.
    home.run(&["exec", "disk", "--", "true"]).ok();
    home.run(&["rm", "--force", "disk"]).ok();
}

fn engine_cannot_start() {
    let home = Home::new();
    home.boot("broken");
    let spoil = "umount /var/lib/docker 2>/dev/null; mkdir -p /var/lib/bad && mv /var/lib/docker /var/lib/bad/ && echo no folder > /var/lib/docker";
    home.run(&["exec", "broken", "--", "sh", "-c", spoil]).ok();
    home.run(&["stop", "broken"]).ok();
    let message = home.run(&["start", "broken"]).fails_with(1);
    assert!(
        message.contains("dockerd ended") && message.contains("points to a file '/var/lib/docker'"),
        "{message}"
    );
    home.run(&["rm", "--force", "broken"]).ok();
}

fn full_data_disk() {
    let home = Home::new();
    home.run(&["start", "-c", "1", "-m", "1g", "-d", "1g", "full"])
        .ok();
    let docker = home.docker("full");
    docker.import("busybox");
    let fill = "dd if=/dev/zero of=/v/big bs=1M; echo dd returned $?";
    let ran = docker.run(&[
        "run",
        "--rm",
        "--network",
        "none",
        "-v",
        "hold:/v",
        "busybox",
        "sh",
        "-c",
        fill,
    ]);
    assert!(
        ran.stdout.contains("dd returned 1") && ran.stderr.contains("No space left"),
        "{ran:?}"
    );
    docker.ok(&["volume", "rm", "hold"]);
    docker.ok(&["run", "--rm", "--network", "none", "busybox", "true"]);
    home.run(&["rm", "--force", "full"]).ok();
}

fn full_host_disk() {
    let home = Home::new();
    let small = home.path().join("vms");
    std::fs::create_dir(&small).expect("make a folder");
    mount("tmpfs", &small, "tmpfs", MountFlags::empty(), Some(c"size=300m"))
        .expect("mount a small file system");
    home.run(&["start", "-c", "1", "-m", "1g", "-d", "4g", "tight"])
        .ok();
    let docker = home.docker("tight");
    docker.import("busybox");
    docker.ok(&[
        "run",
        "--rm",
        "--network",
        "none",
        "-v",
        "hold:/v",
        "busybox",
        "sh",
        "-c",
        "echo kept > /v/kept; sync",
    ]);
    let fill = "dd if=/dev/zero of=/v/big bs=1M count=1000 conv=fsync; echo dd returned $?";
    let ran = docker.run(&[
        "run",
        "--rm",
        "--network",
        "none",
        "-v",
        "hold:/v",
        "busybox",
        "sh",
        "-c",
        fill,
    ]);
    assert!(!ran.stdout.contains("dd returned 0"), "{ran:?}");
    // The logs lie on the full disk as well: what goes wrong has to be seen without them.
    until("word of the full disk", || {
        let status = home.run(&["status", "tight"]).ok();
        status.contains("the host's disk is full").then_some(())
    });
    home.run(&["stop", "--force", "tight"]).ok();
    // With room again, the VM starts and what was acknowledged is there.
    mount_remount(&small, MountFlags::empty(), "size=3g").expect("make it larger");
    home.run(&["start", "tight"]).ok();
    assert_eq!(
        docker.ok(&[
            "run",
            "--rm",
            "--network",
            "none",
            "-v",
            "hold:/v",
            "busybox",
            "cat",
            "/v/kept"
        ]),
        "kept"
    );
    home.run(&["rm", "--force", "tight"]).ok();
    unmount(&small, UnmountFlags::empty()).expect("unmount");
}
