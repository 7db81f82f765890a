//! Running VMs that are saved, and VMs that go on from what was saved.

use super::Test;
use super::world::{Docker, Home, until};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use rustix::process::{Signal, kill_process};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

pub const TESTS: &[Test] = &[
    (
        "a_vm_goes_on_where_it_was_saved_and_apart_from_its_source",
        restore,
    ),
    (
        "forks_need_nothing_of_their_source_and_no_kill_leaves_half_a_snapshot",
        fork,
    ),
];

/// Counts in a volume, ten times a second.
const COUNT: &str = "i=0; while :; do i=$((i + 1)); echo $i > /v/n.new; mv /v/n.new /v/n; sleep 0.1; done";

/// Starts a VM of a small size with a container that counts.
pub fn counting(home: &Home, name: &str, mounts: &[&str]) -> Docker {
    home.boot_small(name, "512m", mounts);
    let docker = home.docker(name);
    docker.import("busybox");
    docker.ok(&[
        "run",
        "-d",
        "--name",
        "counter",
        "-v",
        "numbers:/v",
        "busybox",
        "sh",
        "-c",
        COUNT,
    ]);
    goes_on(&docker);
    docker
}

/// How far the container has counted.
pub fn number(docker: &Docker) -> u64 {
    let ran = docker.run(&["exec", "counter", "cat", "/v/n"]);
    ran.stdout.trim().parse().unwrap_or(0)
}

/// Waits until the container has counted further; returns how far.
pub fn goes_on(docker: &Docker) -> u64 {
    let before = number(docker);
    until("higher number", || {
        Some(number(docker)).filter(|&now| now > before)
    })
}

/// The snapshots there are.
pub fn snapshots(home: &Home) -> String {
    home.run(&["snapshot", "ls", "-q"]).ok()
}

fn file(home: &Home, snapshot: &str, name: &str) -> PathBuf {
    home.path().join("snapshots").join(snapshot).join(name)
}

/// Changes one bit in the middle of a file, and changes it back when called again.
fn flip(path: &Path) {
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .open(path)
        .expect("open");
    let middle = file.metadata().expect("length").len() / 2;
    let mut byte = [0];
    file.read_exact_at(&mut byte, middle).expect("read");
    file.write_all_at(&[byte[0] ^ 1], middle).expect("write");
}

fn restore() {
    let home = Home::new();
    let kernel = home.path().join("kernel");
    std::fs::copy(
        std::env::var_os("LIGHTER_KERNEL").expect("LIGHTER_KERNEL"),
        &kernel,
    )
    .expect("copy");
    let options = ["--no-mounts", "--kernel", kernel.to_str().expect("text")];
    // A full disk.
    let source = counting(&home, "source", &options);
    let store = home.path().join("snapshots");
    std::fs::create_dir(&store).expect("make a folder");
    mount("tmpfs", &store, "tmpfs", MountFlags::empty(), Some(c"size=8m"))
        .expect("mount a small file system");
    let full = home.run(&["snapshot", "create", "source", "full"]).fails_with(1);
    assert!(full.contains("No space left"), "{full}");
    assert_eq!(snapshots(&home), "");
    unmount(&store, UnmountFlags::empty()).expect("unmount, for nothing is open there");
    goes_on(&source);

    assert_eq!(
        home.run(&["snapshot", "create", "source", "one"]).ok(),
        "source/one"
    );
    let saved = goes_on(&source);
    let taken = home.run(&["snapshot", "create", "source", "one"]).fails_with(1);
    assert!(taken.contains("exists already"), "{taken}");
    let mode = |name| {
        let metadata = std::fs::metadata(file(&home, "source/one", name));
        metadata.expect("a file").permissions().mode() & 0o777
    };
    assert_eq!(["manifest.json", "state", "memory"].map(mode), [0o600; 3]);
    assert_eq!(mode("disk"), 0o400, "it is a file that the source has, too");
    home.run(&["snapshot", "inspect", "--verify", "one"]).ok();

    // Damage is found before anything is made, as far as it is looked for.
    let state = file(&home, "source/one", "state");
    flip(&state);
    let damaged = home.run(&["restore", "one", "--as", "copy"]).fails_with(1);
    assert!(damaged.contains("state does not have the checksum"), "{damaged}");
    flip(&state);
    let disk = file(&home, "source/one", "disk");
    flip(&disk);
    let damaged = home
        .run(&["snapshot", "inspect", "--verify", "one"])
        .fails_with(1);
    assert!(damaged.contains("disk does not have the checksum"), "{damaged}");
    flip(&disk);
    let refused = |part: &str| {
        let refused = home.run(&["restore", "one", "--as", "copy"]).fails_with(1);
        assert!(refused.contains(part), "{part:?} in {refused}");
    };
    let memory = file(&home, "source/one", "memory");
    let length = std::fs::metadata(&memory).expect("length").len();
    let mut last = [0; 4096];
    let open = std::fs::File::options()
        .read(true)
        .write(true)
        .open(&memory)
        .expect("open");
    open.read_exact_at(&mut last, length - 4096).expect("read");
    open.set_len(length - 4096).expect("cut");
    refused(&format!("{} has {} bytes", memory.display(), length - 4096));
    open.write_all_at(&last, length - 4096).expect("write");
    let aside = home.path().join("aside");
    std::fs::rename(&disk, &aside).expect("rename");
    refused(&format!("cannot read {}", disk.display()));
    std::fs::rename(&aside, &disk).expect("rename");
    flip(&kernel);
    refused(&format!("{} has SHA-256", kernel.display()));
    flip(&kernel);
    let there = home.run(&["restore", "one"]).fails_with(1);
    assert!(there.contains("source exists already"), "{there}");
    assert_eq!(home.run(&["ls", "-q"]).ok(), "source");

    let exported = home.path().join("exported");
    let exported = exported.to_str().expect("text");
    home.run(&["snapshot", "export", "one", exported]).ok();
    home.run(&["snapshot", "rm", "one"]).ok();
    assert_eq!(
        home.run(&["snapshot", "import", exported, "other/two"]).ok(),
        "other/two"
    );
    assert_eq!(snapshots(&home), "other/two");

    home.run(&["restore", "two", "--as", "copy", "--no-context"]).ok();
    let copy = home.docker("copy");
    let running = copy.ok(&["ps", "--format", "{{.Names}} {{.State}}"]);
    assert_eq!(running, "counter running");
    goes_on(&copy);
    // Its processes are those of the source, and the two know nothing of each other.
    copy.ok(&["exec", "counter", "sh", "-c", "echo copy > /v/who"]);
    source.run(&["exec", "counter", "cat", "/v/who"]).fails_with(1);
    assert!(goes_on(&source) > saved);
    assert_eq!(copy.ok(&["inspect", "-f", "{{.RestartCount}}", "counter"]), "0");
    // Its clock did not stay behind.
    let now = || {
        SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .expect("a time")
            .as_secs()
    };
    let before = now();
    let time: u64 = copy
        .ok(&["exec", "counter", "date", "+%s"])
        .parse()
        .expect("a time");
    assert!((before - 1..=now() + 1).contains(&time), "{time} after {before}");
    // It goes on without the snapshot, and boots as any VM.
    home.run(&["snapshot", "rm", "two"]).ok();
    goes_on(&copy);
    home.run(&["stop", "copy"]).ok();
}

fn fork() {
    let home = Home::new();
    let source = counting(&home, "source", &["--no-mounts"]);
    assert_eq!(
        home.run(&["fork", "source", "-n", "2", "--as", "f", "--no-context"])
            .ok(),
        "f-1\nf-2"
    );
    goes_on(&source);
    let taken = home.run(&["fork", "source", "--as", "f"]).fails_with(1);
    assert!(taken.contains("f-1 exists already"), "{taken}");
    home.run(&["rm", "--force", "source"]).ok();
    let forks = ["f-1", "f-2"].map(|name| home.docker(name));
    for (fork, name) in forks.iter().zip(["f-1", "f-2"]) {
        goes_on(fork);
        fork.ok(&["exec", "counter", "sh", "-c", &format!("echo {name} >> /v/who")]);
    }
    for (fork, name) in forks.iter().zip(["f-1", "f-2"]) {
        assert_eq!(fork.ok(&["exec", "counter", "cat", "/v/who"]), name);
    }
    assert_eq!(snapshots(&home), "");

    // The command is killed.
    let begun = |vm: &str, name: &str| {
        let partial = file(&home, vm, &format!(".{name}.partial/memory"));
        until("beginning of a snapshot", || partial.exists().then_some(()));
    };
    let create = home.start(&["snapshot", "create", "f-1", "killed"], b"");
    begun("f-1", "killed");
    create.signal(Signal::KILL);
    assert!(!create.wait().status.success());
    assert_eq!(snapshots(&home), "");
    until("snapshot when the one before is over", || {
        let ran = home.run(&["snapshot", "create", "f-1", "kept"]);
        assert!(ran.status.success() || ran.stderr.contains("is being"), "{ran:?}");
        ran.status.success().then_some(())
    });
    assert_eq!(snapshots(&home), "f-1/kept");
    let left = std::fs::read_dir(home.path().join("snapshots/f-1")).expect("a folder");
    assert_eq!(left.count(), 1, "what was given up is swept");

    // The supervisor is, and with it the VM.
    let pid = home.pid("f-1", "supervisor_pid");
    let create = home.start(&["snapshot", "create", "f-1", "half"], b"");
    begun("f-1", "half");
    kill_process(pid, Signal::KILL).expect("kill");
    let ran = create.wait();
    let said = ran.fails_with(1);
    assert!(said.contains("cannot take a snapshot"), "{said}");
    assert_eq!(snapshots(&home), "f-1/kept");

    // The monitor is.
    let pid = home.pid("f-2", "monitor_pid");
    let create = home.start(&["snapshot", "create", "f-2", "half"], b"");
    begun("f-2", "half");
    kill_process(pid, Signal::KILL).expect("kill");
    let said = create.wait().fails_with(1);
    assert!(said.contains("cannot take a snapshot"), "{said}");
    assert_eq!(snapshots(&home), "f-1/kept");

    // Two at once: each has a VM of its own.
    home.run(&["rm", "--force", "f-1"]).ok();
    let restores = ["a", "b"].map(|name| home.start(&["restore", "kept", "--as", name, "--no-context"], b""));
    for (restore, name) in restores.into_iter().zip(["a", "b"]) {
        restore.wait().ok();
        goes_on(&home.docker(name));
    }

    // A fork of what was restored from a snapshot of a fork; then its disk, which nobody else has any part of, is frozen again and
    // again.
    home.run(&["rm", "--force", "b"]).ok();
    home.run(&["fork", "a", "--as", "g", "--no-context"]).ok();
    for name in ["a", "f-2"] {
        home.run(&["rm", "--force", name]).ok();
    }
    home.run(&["snapshot", "rm", "kept"]).ok();
    let last = home.docker("g-1");
    let files = || {
        let entries = std::fs::read_dir(home.vm_file("g-1", "")).expect("a folder");
        let names = entries.map(|entry| entry.expect("an entry").file_name());
        names
            .filter(|name| name.as_encoded_bytes().starts_with(b"data.img"))
            .count()
    };
    for round in 0..5 {
        last.ok(&[
            "exec",
            "counter",
            "sh",
            "-c",
            &format!("echo {round} >> /v/who; sync"),
        ]);
        home.run(&["snapshot", "create", "g-1", "again"]).ok();
        home.run(&["snapshot", "rm", "g-1/again"]).ok();
        assert!((2..=8).contains(&files()), "{} files", files());
    }
    home.run(&["stop", "g-1"]).ok();
    home.run(&["start", "g-1", "--no-context"]).ok();
    last.ok(&["start", "counter"]);
    let who = last.ok(&["exec", "counter", "cat", "/v/who"]);
    assert_eq!(
        who.split_whitespace().collect::<Vec<_>>(),
        ["f-1", "0", "1", "2", "3", "4"]
    );
}
