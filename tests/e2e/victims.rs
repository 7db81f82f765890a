//! Memory runs out, and the kernel takes a process: in the guest a container's and the engine's, on the host each of a VM's.
//!
//! Which one is the kernel's choice; here it has one only, the process that is alone in a control group that is above its limit.

use super::Test;
use super::network::{passt_of, serve_once};
use super::world::{Docker, Home, Running, SMALL, processes_of, until};
use rustix::process::Pid;
use std::path::{Path, PathBuf};
use std::process::Command;

pub const TESTS: &[Test] = &[(
    "whatever_the_kernel_kills_for_want_of_memory_comes_back_or_is_told_of",
    victims,
)];

/// A control group of the host's.
struct Group(PathBuf);

impl Group {
    fn new(name: &str) -> Self {
        let path = Path::new("/sys/fs/cgroup").join(format!("lighter-e2e-{name}-{}", std::process::id()));
        std::fs::create_dir(&path).expect("make a control group");
        Self(path)
    }

    fn write(&self, file: &str, text: &str) {
        std::fs::write(self.0.join(file), text).unwrap_or_else(|error| panic!("{file}: {error}"));
    }

    fn take(&self, process: Pid) {
        self.write("cgroup.procs", &process.as_raw_nonzero().to_string());
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // One that has processes cannot be removed: a test has failed.
        let _ = std::fs::remove_dir(&self.0);
    }
}

/// A host whose memory can run out for one process of a VM's.
struct Host {
    home: Home,
    /// Where everything begins: what it has then is counted here for as long as it has it.
    limited: Group,
    others: Group,
}

impl Host {
    fn new() -> Self {
        Self {
            home: Home::new(),
            limited: Group::new("limited"),
            others: Group::new("others"),
        }
    }

    fn start(&self, arguments: &[&str]) {
        let mut command = Command::new("sh");
        command.args(["-c", "echo $$ > \"$0\" && exec \"$@\""]);
        command.arg(self.limited.0.join("cgroup.procs"));
        Running::start(&mut self.home.lighter_by(command, arguments), b"")
            .wait()
            .ok();
    }

    fn path(&self) -> &str {
        self.home.path().to_str().expect("text")
    }

    /// Memory runs out for `victim` alone.
    fn run_out(&self, victim: Pid) {
        let all = processes_of(self.path());
        assert!(all.iter().any(|process| process.pid == victim), "{all:?}");
        for process in all {
            match process.pid == victim {
                true => self.limited.take(victim),
                false => self.others.take(process.pid),
            }
        }
        let killed = || {
            let events = std::fs::read_to_string(self.limited.0.join("memory.events")).expect("read");
            let count = events.lines().find_map(|line| line.strip_prefix("oom_kill "));
            count.expect("a count").parse::<u32>().expect("a number")
        };
        let before = killed();
        self.limited.write("memory.max", "0");
        assert_eq!(killed(), before + 1);
        self.limited.write("memory.max", "max");
    }

    /// Nothing of a VM that is over runs, or is in use.
    fn nothing_runs(&self, mounts: &str) {
        until("end of all processes", || {
            processes_of(self.path()).is_empty().then_some(())
        });
        let sockets = std::fs::read_to_string("/proc/net/unix").expect("read");
        assert!(!sockets.contains(self.path()), "{sockets}");
        assert_eq!(mounted(), mounts);
    }

    /// What whoever uses the VM is told: that it does not run, and why.
    fn is_told(&self, why: &str) {
        let told = self.home.run(&["exec", "prey", "--", "true"]).fails_with(3);
        assert!(
            told.contains(why) && told.contains("lighter start prey"),
            "{told}"
        );
        let status = self.home.run(&["status", "prey"]);
        assert_eq!(status.code(), 3);
        assert!(
            status.stdout.contains("state      failed") && status.stdout.contains(why),
            "{status:?}"
        );
    }
}

fn mounted() -> String {
    std::fs::read_to_string("/proc/self/mounts").expect("read")
}

/// The engine answers, and has what it was given.
fn is_whole(docker: &Docker) {
    let read = ["run", "--rm", "--network", "none", "-v", "kept:/v", "busybox"];
    assert_eq!(docker.ok(&[&read[..], &["cat", "/v/kept"]].concat()), "kept");
}

fn victims() {
    let mounts = mounted();
    let host = Host::new();
    let home = &host.home;
    host.start(&[&["start", "prey"], &SMALL[..]].concat());
    let docker = home.docker("prey");
    docker.import("busybox");
    let keep = ["run", "--rm", "--network", "none", "-v", "kept:/v", "busybox"];
    let write = ["sh", "-c", "echo kept > /v/kept; sync"];
    docker.ok(&[&keep[..], &write].concat());

    containers(&docker, home);
    for daemon in ["dockerd", "containerd"] {
        engine(&docker, home, daemon);
    }

    let supervisor = home.pid("prey", "supervisor_pid");
    let passt = passt_of(supervisor).expect("a passt");
    host.run_out(passt);
    until("word of it", || {
        let log = home.run(&["logs", "--source", "monitor", "prey"]).ok();
        log.contains("passt was killed (SIGKILL); another one is being started")
            .then_some(())
    });
    until("the next passt", || {
        let all_is_well = home.status("prey")["running"]["trouble"].is_null();
        passt_of(supervisor).filter(|next| *next != passt && all_is_well)
    });
    fetches(home);
    is_whole(&docker);

    host.run_out(home.pid("prey", "monitor_pid"));
    host.nothing_runs(&mounts);
    host.is_told("the monitor lighter-vmm was killed (SIGKILL)");
    let message = docker.run(&["ps"]).fails_with(1);
    assert!(
        message.contains("Cannot connect to the Docker daemon"),
        "{message}"
    );
    host.start(&["start", "prey"]);
    is_whole(&docker);

    host.run_out(home.pid("prey", "supervisor_pid"));
    host.nothing_runs(&mounts);
    host.is_told("its supervisor ended without a word");
    host.start(&["start", "prey"]);
    is_whole(&docker);

    home.run(&["stop", "prey"]).ok();
    host.nothing_runs(&mounts);
    assert!(!home.path().join("run/prey").exists());
    home.run(&["rm", "--force", "prey"]).ok();
}

/// A container takes all memory there is: it is the one to go.
fn containers(docker: &Docker, home: &Home) {
    let before = failures(home);
    let boot = inside(
        home,
        "cat /proc/sys/kernel/random/boot_id; pidof dockerd containerd",
    );
    let ran = docker.run(&[
        "run",
        "--name",
        "hog",
        "--network",
        "none",
        "busybox",
        "tail",
        "/dev/zero",
    ]);
    assert_eq!(ran.code(), 137, "{ran:?}");
    let state = docker.ok(&["inspect", "-f", "{{.State.ExitCode}} {{.State.OOMKilled}}", "hog"]);
    assert_eq!(state, "137 true");
    docker.ok(&["rm", "hog"]);
    let after = inside(
        home,
        "cat /proc/sys/kernel/random/boot_id; pidof dockerd containerd",
    );
    assert_eq!((failures(home), after), (before, boot));
    is_whole(docker);
}

/// A part of the engine is taken: it is started again.
fn engine(docker: &Docker, home: &Home, daemon: &str) {
    let before = failures(home);
    let run_out = format!(
        "cd /sys/fs/cgroup; mkdir others; victim=$(pidof {daemon})
         for process in $(cat engine/cgroup.procs); do
             [ $process = $victim ] || echo $process > others/cgroup.procs
         done
         echo 0 > engine/memory.max; echo max > engine/memory.max
         for process in $(cat others/cgroup.procs); do echo $process > engine/cgroup.procs; done
         rmdir others"
    );
    inside(home, &run_out);
    // The death is noticed before the next command could meet the engine that died.
    until("word of the failure", || (failures(home) > before).then_some(()));
    let told =
        format!("{daemon} was killed by the guest's kernel, whose memory was full; starting it again in");
    until("line of it", || {
        let log = home.run(&["logs", "--source", "agent", "prey"]).ok();
        log.contains(&told).then_some(())
    });
    // After the death of containerd dockerd connects to it again when it sees fit.
    until("an engine that answers", || {
        let read = ["run", "--rm", "--network", "none", "busybox", "true"];
        docker.run(&read).status.success().then_some(())
    });
    is_whole(docker);
}

fn failures(home: &Home) -> Option<u64> {
    home.status("prey")["running"]["engine_failures"].as_u64()
}

fn inside(home: &Home, script: &str) -> String {
    home.run(&["exec", "prey", "--", "sh", "-c", script]).ok()
}

/// The guest has a network.
fn fetches(home: &Home) {
    let address = super::network::own_address();
    let port = serve_once("0.0.0.0", b"ahoy".to_vec());
    // The link may be a moment behind.
    let fetch = format!("until wget -q -T 60 -O - http://{address}:{port}/; do sleep 0.1; done");
    let fetched = inside(home, &fetch);
    assert_eq!(fetched, "ahoy");
}
