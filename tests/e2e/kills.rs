//! Kills in the middle of what makes VMs and snapshots: of the command, of the new VM's supervisor, of its monitor. Where,
//! says a system call that is about to be made: it is the first process to make it so many times that is killed.

use super::Test;
use super::snapshots::{counting, goes_on, snapshots};
use super::world::{Home, Ran, processes_of, until};
use std::fs::File;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};

pub const TESTS: &[Test] = &[(
    "a_kill_at_any_point_of_a_restore_a_fork_or_a_snapshot_loses_nothing",
    kills,
)];

/// A system call, and the how many-th of a process.
type Point = (&'static str, u32);

/// Of `restore`: the folder, the disk, the settings and the name of the VM; its supervisor as it listens and starts the monitor; the
/// monitor as it starts threads, and as it hears from the agent.
const RESTORE: &[Point] = &[
    ("mkdir", 2),
    ("linkat", 1),
    ("renameat", 2),
    ("rename", 1),
    ("socketpair", 1),
    ("listen", 1),
    ("listen", 2),
    ("listen", 4),
    ("clone", 1),
    ("clone3", 5),
    ("sendmsg", 1),
    ("sendmsg", 3),
];

/// Of `fork`: the same, with what is saved first.
const FORK: &[Point] = &[
    ("mkdir", 3),
    ("mkdir", 5),
    ("linkat", 1),
    ("fsync", 1),
    ("renameat", 2),
    ("rename", 1),
    ("socketpair", 1),
    ("listen", 1),
    ("listen", 3),
    ("clone", 1),
    ("clone3", 5),
    ("sendmsg", 2),
    ("unlinkat", 2),
];

/// Of `snapshot create`, whose command is killed here; the source's supervisor and monitor are elsewhere.
const CREATE: &[Point] = &[
    ("mkdir", 3),
    ("fsync", 1),
    ("fsync", 3),
    ("fsync", 5),
    ("rename", 1),
    ("fsync", 6),
    ("fsync", 7),
];

/// Runs `lighter` with a kill at `point` of it or of what it starts.
fn killed_at((call, time): Point, home: &Home, arguments: &[&str]) -> Ran {
    let mut command = Command::new("strace");
    // The command is this process's child, and is waited for; the tracer stays with what it leaves running.
    command.args(["-D", "-f", "-qq", "-o", "/dev/null", "-e"]);
    command.arg(format!("trace={call}")).arg("-e");
    command.arg(format!("inject={call}:signal=KILL:when={time}"));
    let said = ["stdout", "stderr"].map(|name| home.path().join(name));
    let [stdout, stderr] = said.each_ref().map(|path| File::create(path).expect("create"));
    let status = home
        .lighter_by(command, arguments)
        .stdin(Stdio::null())
        .stdout(stdout)
        .stderr(stderr)
        .status()
        .expect("strace");
    let [stdout, stderr] = said.map(|path| std::fs::read_to_string(path).expect("read"));
    Ran {
        status,
        stdout,
        stderr,
    }
}

fn vms(home: &Home) -> Vec<String> {
    home.run(&["ls", "-q"]).ok().lines().map(str::to_owned).collect()
}

fn kills() {
    let home = Home::new();
    let source = counting(&home, "source", &["--no-mounts"]);
    home.run(&["snapshot", "create", "source", "one"]).ok();
    let path = home.path().to_str().expect("text").to_owned();
    let running = processes_of(&path).len();
    let tried = |command: &str, point: Point, arguments: &[&str]| {
        let ran = killed_at(point, &home, arguments);
        let (call, time) = point;
        eprintln!("{command}, {call} {time}: {} {}", ran.status, ran.stderr.trim());
        if ran.status.signal().is_none() && !ran.status.success() {
            let name = arguments.last().expect("arguments");
            assert!(
                ran.stderr.contains(&format!("VM {name}")),
                "{command}, {call} {time}: {ran:?}"
            );
        }
        // What there is can be used, and be removed.
        for name in vms(&home) {
            if name != "source" {
                home.run(&["rm", "--force", &name]).ok();
            }
        }
        assert_eq!(vms(&home), ["source"], "{command}, {call} {time}");
        until(
            &format!("end of what {command} killed at {call} {time} left"),
            || (processes_of(&path).len() == running).then_some(()),
        );
        ran
    };

    let restore = ["restore", "--no-context", "one", "--as", "copy"];
    for &point in RESTORE {
        let ran = tried("restore", point, &restore);
        assert!(!ran.status.success(), "no process came to {point:?} of restore");
    }
    assert_eq!(snapshots(&home), "source/one");
    home.run(&restore).ok();
    goes_on(&home.docker("copy"));
    home.run(&["rm", "--force", "copy"]).ok();

    let fork = ["fork", "--no-context", "source", "--as", "f"];
    for &point in FORK {
        let ran = tried("fork", point, &fork);
        assert!(!ran.status.success(), "no process came to {point:?} of fork");
    }
    assert_eq!(snapshots(&home), "source/one");
    goes_on(&source);
    home.run(&fork).ok();
    goes_on(&home.docker("f-1"));
    home.run(&["rm", "--force", "f-1"]).ok();

    for &point in CREATE {
        // One that was cut off may still be being written.
        let ran = until("snapshot when the one before is over", || {
            let ran = tried("snapshot create", point, &["snapshot", "create", "source", "two"]);
            (!ran.stderr.contains("is being")).then_some(ran)
        });
        assert_eq!(ran.status.signal(), Some(9), "{point:?} of snapshot create");
        // A whole one, or none.
        if snapshots(&home) != "source/one" {
            assert_eq!(snapshots(&home), "source/one\nsource/two");
            home.run(&["snapshot", "inspect", "--verify", "two"]).ok();
            home.run(&["snapshot", "rm", "two"]).ok();
        }
    }
    goes_on(&source);
    home.run(&["snapshot", "inspect", "--verify", "one"]).ok();
    let left = std::fs::read_dir(home.path().join("snapshots/source")).expect("a folder");
    assert_eq!(left.count(), 1, "what was given up is swept");
}
