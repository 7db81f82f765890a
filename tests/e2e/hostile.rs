//! A guest that means harm: what it says to the host harms nobody but itself.

use super::Test;
use super::cost::Cost;
use super::world::{Home, until};

pub const TESTS: &[Test] = &[(
    "a_guest_that_talks_nonsense_on_every_port_is_served_and_bounded",
    nonsense,
)];

fn nonsense() {
    let home = Home::new();
    home.boot_small("vm", "512m", &["--no-mounts"]);
    let docker = home.docker("vm");
    docker.import("hostile");
    let supervisor = || Cost::of(home.pid("vm", "supervisor_pid"));
    let before = supervisor();
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
        most = most.max(supervisor().own_kib);
        // What it has of the guest's memory is not its own doing, and is bounded by that.
        let monitor = Cost::of(home.pid("vm", "monitor_pid"));
        assert!(
            monitor.own_kib + monitor.guest_kib < (512 + 64) << 10,
            "{monitor:?}"
        );
        Some(docker.ok(&["logs", "nonsense"])).filter(|log| log.ends_with("done"))
    });
    eprintln!("{said}; the supervisor: {before:?} before, {most} KiB of its own at most");
    assert!(
        most < before.own_kib + (64 << 10),
        "{before:?} before, {most} KiB"
    );
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
        (supervisor().descriptors < before.descriptors + 20).then_some(())
    });
    home.run(&["stop", "vm"]).ok();
}
