//! A guest that means harm: what it says to the host harms nobody but itself.

use super::Test;
use super::world::{Home, until};

pub const TESTS: &[Test] = &[(
    "a_guest_that_talks_nonsense_on_every_port_is_served_and_bounded",
    nonsense,
)];

/// Memory that is a process's own, KiB.
fn own_memory(home: &Home, role: &str) -> u64 {
    let pid = home.pid("vm", role).as_raw_nonzero();
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("status");
    let own = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
    let own = own.expect("RssAnon").trim().trim_end_matches(" kB");
    own.parse().expect("a number")
}

fn nonsense() {
    let home = Home::new();
    home.boot_small("vm", "512m", &["--no-mounts"]);
    let docker = home.docker("vm");
    docker.import("hostile");
    let before = own_memory(&home, "supervisor_pid");
    let open = |role: &str| {
        let pid = home.pid("vm", role).as_raw_nonzero();
        std::fs::read_dir(format!("/proc/{pid}/fd"))
            .expect("list")
            .count()
    };
    let open_before = open("supervisor_pid");
    // Docker keeps its containers from speaking to the host otherwise.
    let options = [
        "run",
        "-d",
        "--name",
        "nonsense",
        "--security-opt",
        "seccomp=unconfined",
    ];
    docker.ok(&[&options[..], &["hostile", "hostile-agent"]].concat());
    let mut most = 0;
    let said = until("the end of the nonsense", || {
        assert!(home.status("vm")["running"].is_object());
        most = most.max(own_memory(&home, "supervisor_pid"));
        // What it has of the guest's memory is not its own doing, and is bounded by that.
        assert!(own_memory(&home, "monitor_pid") < (512 + 64) << 10);
        Some(docker.ok(&["logs", "nonsense"])).filter(|log| log.ends_with("done"))
    });
    eprintln!("{said}; the supervisor's own memory: {before} KiB before, {most} KiB at most");
    assert!(most < before + (64 << 10), "{before} KiB before, {most} KiB");
    assert_eq!(
        docker.ok(&["inspect", "-f", "{{.State.ExitCode}}", "nonsense"]),
        "0"
    );
    docker.ok(&["rm", "-f", "nonsense"]);
    // Everything goes on: the agent, commands, the engine; and what was held is let go.
    assert_eq!(home.run(&["exec", "vm", "--", "echo", "ahoy"]).ok(), "ahoy");
    until("an agent that is heard", || {
        let version = home.status("vm")["running"]["agent_version"].as_str()?.to_owned();
        version
            .starts_with(|first: char| first.is_ascii_digit())
            .then_some(())
    });
    until("few open descriptors", || {
        (open("supervisor_pid") < open_before + 20).then_some(())
    });
    home.run(&["stop", "vm"]).ok();
}
