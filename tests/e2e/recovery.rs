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
    let folder = tempfile::tempdir().expect("a folder");
    let (page, baseline) = (
        folder.path().join("report.html"),
        folder.path().join("baseline.json"),
    );
    let page_path = page.to_str().expect("a path");
    let json = home
        .run(&[
            "bench", "boot", "-n", "1", "--warmup", "0", "--json", "-c", "1", "-m", "1g", "--report",
            page_path,
        ])
        .ok();
    let report: serde_json::Value = serde_json::from_str(&json).expect("JSON");
    let milestones = &report["runs"][0]["milestones_ms"];
    let at = |name: &str| {
        milestones[name]
            .as_f64()
            .unwrap_or_else(|| panic!("no {name} in {report}"))
    };
    let on_one_way = |names: &[&str], error: f64| {
        let times: Vec<f64> = names.iter().map(|name| at(name)).collect();
        assert!(times.is_sorted_by(|a, b| *a <= b + error), "{names:?} {times:?}");
    };
    // The guest's stamps among the host's are uncertain by the error that is told, the host's are not.
    let error = report["clock_error_ms"]["max"].as_f64().expect("an error");
    on_one_way(
        &[
            "process-started",
            "supervisor-started",
            "monitor-started",
            "monitor-ready",
            "guest-entered",
            "agent-greeted",
            "engine-answers",
            "image-loaded",
            "first-container",
        ],
        0.0,
    );
    on_one_way(
        &[
            "guest-entered",
            "kernel-first-line",
            "root-mounted",
            "kernel-done",
            "agent-started",
            "data-mounted",
            "dockerd-ready",
            "engine-answers",
        ],
        error,
    );
    on_one_way(&["agent-started", "agent-greeted"], error);
    on_one_way(&["agent-started", "network-up", "engine-answers"], error);
    on_one_way(&["data-mounted", "containerd-ready", "engine-answers"], error);
    let html = std::fs::read_to_string(&page).expect("the page");
    assert!(
        html.ends_with("</html>\n") && html.matches("<svg").count() == 4,
        "{html}"
    );

    // What would fail after the boots fails before them.
    std::fs::write(&baseline, json.replace("runs", "ruins")).expect("a baseline");
    let baseline_path = baseline.to_str().expect("a path");
    let message = home
        .run(&["bench", "boot", "--baseline", baseline_path])
        .fails_with(1);
    assert!(message.contains(baseline_path), "{message}");
    let message = home
        .run(&["bench", "boot", "--report", "/nonexistent/x.html"])
        .fails_with(1);
    assert!(message.contains("/nonexistent/x.html"), "{message}");
    let message = home
        .run(&["bench", "compare", "--system", "/nonexistent/disk"])
        .fails_with(1);
    assert!(message.contains("/nonexistent/disk"), "{message}");
    assert_eq!(home.run(&["ls", "-q"]).ok(), "");
}
