//! What a VM runs on changes under it: the host's clock, and Lighter itself.

use super::Test;
use super::wake::ping;
use super::world::{Home, Ran, Running, SMALL, programs, until, write_program};
use rustix::time::{ClockId, Timespec, clock_gettime, clock_settime};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

pub const TESTS: &[Test] = &[(
    "a_vm_goes_on_when_the_clock_jumps_and_when_lighter_is_replaced",
    changes,
)];

/// A day, seconds.
const DAY: i64 = 86_400;

/// How far the guest's clock may be from the host's after a jump, seconds. It is told in whole ones, after a slow command.
const CLOSE: i64 = 30;

/// Installs Lighter in `folder`, as a package does: other files, in the place of those that are there. These have some more bytes, which
/// no program looks at.
fn install(folder: &Path) {
    for name in ["lighter", "lighter-vmm"] {
        let new = folder.join(format!("{name}.new"));
        let mut program = std::fs::read(programs().join(name)).expect("read");
        program.extend([0; 4096]);
        write_program(&new, program);
        std::fs::rename(new, folder.join(name)).expect("rename");
    }
}

/// Runs the Lighter that is installed in `folder`.
fn installed(folder: &Path, home: &Home, arguments: &[&str]) -> Ran {
    let mut command = Command::new(folder.join("lighter"));
    home.is_home_of(command.args(arguments));
    Running::start(&mut command, b"").wait()
}

/// The host's time, seconds since 1970.
fn now() -> i64 {
    clock_gettime(ClockId::Realtime).tv_sec
}

/// Sets the host's clock forward.
fn jump(seconds: i64) {
    let now = clock_gettime(ClockId::Realtime);
    let then = Timespec {
        tv_sec: now.tv_sec + seconds,
        ..now
    };
    clock_settime(ClockId::Realtime, then).expect("set the clock");
}

fn changes() {
    let home = Home::new();
    let folder = home.path().join("programs");
    std::fs::create_dir(&folder).expect("make a folder");
    install(&folder);
    let first = std::fs::metadata(folder.join("lighter")).expect("look").ino();
    // Long after the end of this test, but within the day by which the clock jumps.
    let idle = ["--auto-suspend", "10h", "vm"];
    installed(&folder, &home, &[&["start"], &SMALL[..], &idle].concat()).ok();
    let docker = home.docker("vm");
    docker.import("busybox");
    docker.ok(&["run", "-d", "--name", "waits", "busybox", "sleep", "100000"]);
    let pids = ["supervisor_pid", "monitor_pid"].map(|role| home.pid("vm", role));
    let runs = || {
        assert!(ping(&docker.socket()).contains("200 OK"));
        assert_eq!(docker.ok(&["ps", "--format", "{{.Names}}"]), "waits");
        let now = ["supervisor_pid", "monitor_pid"].map(|role| home.pid("vm", role));
        assert_eq!(now, pids);
        assert_eq!(home.status("vm")["running"]["phase"], "ready");
    };

    // The clock of a host that somebody works on is left alone.
    if std::env::var_os("LIGHTER_EMULATED").is_some() {
        for seconds in [DAY, -2 * DAY, DAY] {
            jump(seconds);
            until("guest whose clock is the host's", || {
                let guest = installed(&folder, &home, &["exec", "vm", "--", "date", "+%s"]).ok();
                let guest: i64 = guest.parse().expect("seconds");
                ((guest - now()).abs() < CLOSE).then_some(())
            });
            runs();
        }
    }

    install(&folder);
    let second = std::fs::metadata(folder.join("lighter")).expect("look").ino();
    assert_ne!(first, second);
    runs();
    let lighter = |arguments: &[&str]| installed(&folder, &home, arguments);
    assert_eq!(lighter(&["exec", "vm", "--", "echo", "ahoy"]).ok(), "ahoy");
    let status = lighter(&["status", "vm"]).ok();
    assert!(status.contains("state      running"), "{status}");
    // What the old one has saved, the new one goes on from.
    lighter(&["suspend", "vm"]).ok();
    lighter(&["resume", "vm"]).ok();
    assert_eq!(docker.ok(&["ps", "--format", "{{.Names}}"]), "waits");
    // The supervisor of before ends at the word of the program of today.
    install(&folder);
    lighter(&["stop", "vm"]).ok();
    assert_eq!(lighter(&["status", "vm"]).code(), 3);
    lighter(&["start", "vm"]).ok();
    docker.ok(&["start", "waits"]);
    lighter(&["rm", "--force", "vm"]).ok();
}
