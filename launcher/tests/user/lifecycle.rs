//! Lives of VMs whose guest is a few instructions, on this host's KVM: starts that meet stops, processes that are killed,
//! guests that crash. Each leaves a state from which the next command works.

use crate::world::{Ran, World, expect, ran, tree};
use lighter_tests::tiny_guest::Kernel;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// Slow machines run these, too.
const PATIENCE: Duration = Duration::from_secs(120);

/// `hlt; jmp` to it: a guest that never gets anywhere.
const IDLE: [u8; 3] = [0xf4, 0xeb, 0xfd];
/// `ud2`, without an interrupt table: a triple fault.
const CRASH: [u8; 2] = [0x0f, 0x0b];

/// The monitor, built as the program under test was.
fn monitor() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| {
        let mut build = Command::new(env!("CARGO"));
        build.args(["build", "--quiet", "-p", "lighter-vmm"]);
        if !cfg!(debug_assertions) {
            build.arg("--release");
        }
        assert!(build.status().unwrap().success(), "the monitor does not build");
        Path::new(env!("CARGO_BIN_EXE_lighter")).with_file_name("lighter-vmm")
    })
}

/// A world whose VMs boot `kernel`, or `None` after having seen that `start` says why there is none.
fn world(kernel: &Kernel) -> Option<World> {
    let world = World::new();
    std::fs::create_dir(world.path("artifacts")).unwrap();
    std::fs::write(world.path("artifacts/vmlinux"), kernel.to_bytes()).unwrap();
    std::fs::write(world.path("artifacts/rootfs.erofs"), [0; 4096]).unwrap();
    if !Path::new("/dev/kvm").exists() {
        world.fails(&["start"], 1, &["cannot open /dev/kvm", "firmware"]);
        return None;
    }
    Some(world)
}

fn idle() -> Option<World> {
    world(&Kernel::Pvh(IDLE.to_vec()))
}

fn command(world: &World, arguments: &[&str]) -> Command {
    let mut command = world.command(arguments);
    command.env("LIGHTER_VMM", monitor());
    command
}

fn run(world: &World, arguments: &[&str]) -> Ran {
    ran(command(world, arguments).output().unwrap())
}

fn spawn(world: &World, arguments: &[&str]) -> Child {
    let mut command = command(world, arguments);
    command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Starts the VM and leaves it in its endless boot.
fn start_and_leave(world: &World) -> (u32, u32) {
    let arguments = ["start", "--memory", "256m", "--wait-timeout", "2"];
    let mut starter = spawn(world, &arguments);
    let pids = until_it_boots(world, "default");
    assert!(starter.wait().unwrap().code() == Some(124));
    pids
}

/// Waits until the guest of a VM runs; returns its supervisor's and its monitor's process id.
fn until_it_boots(world: &World, name: &str) -> (u32, u32) {
    until("the guest runs", || {
        let status = run(world, &["status", name, "--json"]);
        let status: serde_json::Value = serde_json::from_str(&status.stdout).ok()?;
        let running = &status["running"];
        running["timeline"]["guest_entered_ns"].as_u64()?;
        let pid = |key: &str| u32::try_from(running[key].as_u64().unwrap()).unwrap();
        Some((pid("supervisor_pid"), pid("monitor_pid")))
    })
}

fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(begun.elapsed() < PATIENCE, "never: {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn is_alive(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // A zombie was killed; whoever adopted it has not looked yet.
    stat.rsplit(')')
        .next()
        .is_some_and(|rest| !rest.is_empty() && !rest.starts_with(" Z"))
}

fn kill(pid: u32) {
    assert!(
        Command::new("kill")
            .args(["-9", &pid.to_string()])
            .status()
            .unwrap()
            .success()
    );
    until("the killed process is gone", || (!is_alive(pid)).then_some(()));
}

/// Nothing runs and no socket is left.
fn assert_clean(world: &World, (supervisor, monitor): (u32, u32)) {
    until("both processes are gone", || {
        (!is_alive(supervisor) && !is_alive(monitor)).then_some(())
    });
    assert!(
        tree(&world.path("run")).is_empty(),
        "{:?}",
        tree(&world.path("run"))
    );
}

#[test]
fn a_start_that_takes_too_long_returns_124_and_goes_on_until_it_is_stopped() {
    let Some(world) = idle() else { return };
    let pids = start_and_leave(&world);
    for socket in tree(&world.path("run/default")) {
        assert_eq!(
            std::fs::metadata(&socket).unwrap().permissions().mode() & 0o777,
            0o600,
            "{socket:?}"
        );
    }
    let again = run(&world, &["start", "--wait-timeout", "1"]);
    expect(
        &again,
        124,
        &["not ready in time", "lighter stop default"],
        &["start"],
    );
    assert_eq!(
        until_it_boots(&world, "default"),
        pids,
        "the second start joined the first"
    );
    expect(
        &run(&world, &["start", "-c", "9"]),
        2,
        &["is running", "lighter stop"],
        &["start"],
    );
    expect(&run(&world, &["rm"]), 1, &["is running"], &["rm"]);
    let stop = run(&world, &["stop"]);
    expect(&stop, 0, &[], &["stop"]);
    assert_clean(&world, pids);
    let status = run(&world, &["status"]);
    assert_eq!(status.code, 3);
    assert!(status.stdout.contains("stopped"), "{}", status.stdout);
}

#[test]
fn two_starts_at_once_share_one_vm() {
    let Some(world) = idle() else { return };
    let arguments = ["start", "--memory", "256m", "--wait-timeout", "5"];
    let starters: Vec<Child> = (0..4).map(|_| spawn(&world, &arguments)).collect();
    let pids = until_it_boots(&world, "default");
    for starter in starters {
        let ran = ran(starter.wait_with_output().unwrap());
        expect(&ran, 124, &["not ready in time"], &arguments);
    }
    assert_eq!(until_it_boots(&world, "default"), pids);
    expect(&run(&world, &["rm", "--force"]), 0, &[], &["rm"]);
    assert_clean(&world, pids);
    assert!(tree(&world.path("vms")).is_empty());
}

#[test]
fn a_stop_during_a_start_stops_the_vm_and_tells_the_starter() {
    let Some(world) = world(&Kernel::BzImage(IDLE.to_vec())) else {
        return;
    };
    let starter = spawn(&world, &["start", "--memory", "256m"]);
    let pids = until_it_boots(&world, "default");
    // A client of the engine that came early waits, and is not left waiting.
    let mut client = UnixStream::connect(world.path("run/default/docker.sock")).unwrap();
    expect(&run(&world, &["stop"]), 0, &[], &["stop"]);
    assert_eq!(client.read(&mut [0]).unwrap(), 0);
    let starter = ran(starter.wait_with_output().unwrap());
    expect(&starter, 1, &["was stopped while it was starting"], &["start"]);
    assert_clean(&world, pids);
}

#[test]
fn a_killed_supervisor_takes_the_monitor_along_and_the_next_start_works() {
    let Some(world) = idle() else { return };
    let pids = start_and_leave(&world);
    kill(pids.0);
    until("the monitor died with it", || (!is_alive(pids.1)).then_some(()));
    let word = "its supervisor ended without a word";
    let status = run(&world, &["status"]);
    assert_eq!(status.code, 3);
    assert!(
        status.stdout.contains("failed") && status.stdout.contains(word),
        "{}",
        status.stdout
    );
    expect(&run(&world, &["env"]), 3, &["not running", word], &["env"]);
    let next = start_and_leave(&world);
    assert_ne!(next.0, pids.0);
    kill(next.0);
    expect(&run(&world, &["stop"]), 0, &[], &["stop"]);
    assert_clean(&world, next);
}

#[test]
fn a_killed_monitor_is_reported_and_the_next_start_works() {
    let Some(world) = idle() else { return };
    let starter = spawn(&world, &["start", "--memory", "256m"]);
    let pids = until_it_boots(&world, "default");
    kill(pids.1);
    let starter = ran(starter.wait_with_output().unwrap());
    expect(&starter, 1, &["lighter-vmm was killed (SIGKILL)"], &["start"]);
    assert_clean(&world, pids);
    let status = run(&world, &["status"]);
    assert!(
        status.stdout.contains("failed") && status.stdout.contains("was killed (SIGKILL)"),
        "{}",
        status.stdout
    );
    let next = start_and_leave(&world);
    expect(&run(&world, &["stop", "--force"]), 0, &[], &["stop"]);
    assert_clean(&world, next);
}

#[test]
fn a_supervisor_that_is_told_to_terminate_ends_its_vm() {
    let Some(world) = idle() else { return };
    let pids = start_and_leave(&world);
    assert!(
        Command::new("kill")
            .arg(pids.0.to_string())
            .status()
            .unwrap()
            .success()
    );
    assert_clean(&world, pids);
}

#[test]
fn a_guest_that_crashes_is_a_named_error() {
    let Some(world) = world(&Kernel::Pvh(CRASH.to_vec())) else {
        return;
    };
    let start = ["start", "--memory", "256m"];
    expect(
        &run(&world, &start),
        1,
        &["did not start", "the guest crashed", "--source console"],
        &start,
    );
    assert!(tree(&world.path("run")).is_empty());
}

#[test]
fn a_file_that_is_no_kernel_is_a_named_error() {
    let Some(world) = world(&Kernel::Bytes(b"this is not what it claims".to_vec())) else {
        return;
    };
    let start = ["start", "--memory", "256m"];
    expect(&run(&world, &start), 1, &["did not start", "kernel"], &start);
    assert!(tree(&world.path("run")).is_empty());
}

#[test]
fn a_data_disk_that_another_vm_uses_is_a_named_error() {
    let Some(world) = idle() else { return };
    let pids = start_and_leave(&world);
    expect(&run(&world, &["create", "thief"]), 0, &[], &["create"]);
    let disk = world.path("vms/thief/data.img");
    std::fs::remove_file(&disk).unwrap();
    std::fs::hard_link(world.path("vms/default/data.img"), &disk).unwrap();
    let start = ["start", "thief", "--memory", "256m"];
    expect(
        &run(&world, &start),
        1,
        &["did not start", "disk data", "in use by another VM"],
        &start,
    );
    assert!(is_alive(pids.1), "the first VM goes on");
    expect(&run(&world, &["stop"]), 0, &[], &["stop"]);
}

#[test]
fn a_throw_away_vm_ends_with_the_process_that_started_it() {
    let Some(world) = idle() else { return };
    let mut runner = spawn(&world, &["run", "--memory", "256m", "--", "true"]);
    let name = format!("run-{}", runner.id());
    let pids = until_it_boots(&world, &name);
    runner.kill().unwrap();
    runner.wait().unwrap();
    assert_clean(&world, pids);
    until("its folder is gone", || {
        (!world.path("vms").join(&name).exists()).then_some(())
    });
}

#[test]
fn logs_are_followed_until_the_vm_ends() {
    let Some(world) = idle() else { return };
    let pids = start_and_leave(&world);
    let follower = spawn(&world, &["logs", "--follow", "--source", "monitor"]);
    expect(&run(&world, &["stop", "--force"]), 0, &[], &["stop"]);
    assert_eq!(ran(follower.wait_with_output().unwrap()).code, 0);
    assert_clean(&world, pids);
}
