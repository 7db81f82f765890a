//! Commands that meet, daemons that die in the guest, and the boot benchmark.

use super::Test;
use super::world::{Home, shared, until, with_shared_home};

pub const TESTS: &[Test] = &[
    ("a_killed_engine_comes_back_with_its_containers", killed_engine),
    (
        "starts_and_stops_that_meet_leave_a_vm_that_works",
        commands_that_meet,
    ),
    (
        "the_boot_benchmark_measures_every_milestone_and_leaves_nothing",
        bench,
    ),
];

fn killed_engine() {
    let docker = shared();
    docker.ok(&[
        "run",
        "-d",
        "--name",
        "phoenix",
        "--restart",
        "always",
        "busybox",
        "sleep",
        "100000",
    ]);
    let failures = || {
        with_shared_home(|home| home.status("shared")["running"]["engine_failures"].as_u64())
            .expect("a number")
    };
    for daemon in ["dockerd", "containerd"] {
        let before = failures();
        let kill = format!("kill -9 $(pidof {daemon})");
        with_shared_home(|home| home.run(&["exec", "shared", "--", "sh", "-c", &kill]).ok());
        // The death is noticed before the next command could meet the engine that died.
        until("word of the failure", || (failures() > before).then_some(()));
        // The container is started anew after the death of dockerd, and outlives that of containerd, to which dockerd
        // then connects again when it sees fit.
        until("container that answers", || {
            let risen = docker.run(&["exec", "phoenix", "echo", "risen"]);
            (risen.stdout == "risen\n").then_some(())
        });
    }
    docker.ok(&["rm", "-f", "phoenix"]);
}

fn commands_that_meet() {
    let home = Home::new();
    let arguments = ["start", "-c", "1", "-m", "1g", "meet"];
    let starters = [home.start(&arguments, b""), home.start(&arguments, b"")];
    for starter in starters {
        starter.wait().ok();
    }
    let first = home.pid("meet", "supervisor_pid");
    let restart = home.start(&["restart", "meet"], b"");
    until("agent of the second life", || {
        let status = home.run(&["status", "--json", "meet"]);
        let status: serde_json::Value = serde_json::from_str(&status.stdout).ok()?;
        let running = &status["running"];
        running["timeline"]["agent_running_ns"].as_u64()?;
        (running["supervisor_pid"] != first.as_raw_nonzero().get()).then_some(())
    });
    home.run(&["stop", "meet"]).ok();
    let message = restart.wait().fails_with(1);
    assert!(message.contains("was stopped while it was starting"), "{message}");
    assert_eq!(home.run(&["status", "meet"]).code(), 3);
    home.run(&["start", "meet"]).ok();
    home.docker("meet").ok(&["version"]);
    home.run(&["stop", "meet"]).ok();
    home.run(&["rm", "--force", "meet"]).ok();
}

fn bench() {
    let home = Home::new();
    let report = home
        .run(&["bench", "boot", "-n", "1", "--json", "-c", "1", "-m", "1g"])
        .ok();
    let report: serde_json::Value = serde_json::from_str(&report).expect("JSON");
    let run = &report["runs"][0];
    let stamps = [
        "monitor_started_ms",
        "monitor_ready_ms",
        "guest_entered_ms",
        "agent_running_ms",
        "engine_answers_ms",
    ];
    let stamps = stamps.map(|stamp| {
        run[stamp]
            .as_f64()
            .unwrap_or_else(|| panic!("no {stamp} in {report}"))
    });
    assert!(stamps.is_sorted(), "{stamps:?}");
    assert_eq!(home.run(&["ls", "-q"]).ok(), "");
}
