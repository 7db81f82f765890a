//! What becomes of a VM and its data when it is stopped, killed, resized or thrown away.

use super::Test;
use super::wake::ping;
use super::world::{Home, Running, shared, until, with_shared_home};
use rustix::process::Signal;
use std::process::Command;

pub const TESTS: &[Test] = &[
    ("everything_about_a_running_vm_can_be_read", reading_verbs),
    (
        "the_first_answer_after_a_jump_of_the_hosts_clock_has_the_right_time",
        clock_jumps,
    ),
    ("commands_in_the_vm_return_their_status", exec),
    ("data_survives_a_stop_and_the_disk_grows", stop_and_start),
    ("a_throw_away_engine_serves_one_command_and_is_gone", throw_away),
];

fn reading_verbs() {
    with_shared_home(|home| {
        let json = |arguments: &[&str]| -> serde_json::Value {
            serde_json::from_str(&home.run(arguments).ok()).expect("JSON")
        };
        let status = json(&["status", "--json", "shared"]);
        assert_eq!(status["state"], "running", "{status}");
        // The first comparison is made while everything starts, and may find it off by that.
        until("clock that is right within 100 ms", || {
            let status = json(&["status", "--json", "shared"]);
            let offset = status["running"]["clock_offset_ns"].as_i64()?;
            (offset.abs() < 100_000_000).then_some(())
        });
        assert_eq!(json(&["ls", "--json"])[0]["name"], "shared");
        assert_eq!(json(&["inspect", "shared"])["name"], "shared");
        assert_eq!(home.run(&["ls", "-q"]).ok(), "shared");
        assert!(
            home.run(&["logs", "--source", "agent", "shared"])
                .ok()
                .contains("dockerd is ready")
        );
        assert!(
            home.run(&["logs", "--source", "engine", "shared"])
                .ok()
                .contains("containerd successfully booted")
        );
        assert!(
            home.run(&["logs", "--source", "console", "-n", "5", "shared"])
                .status
                .success()
        );
        assert!(
            home.run(&["logs", "--source", "monitor", "shared"])
                .status
                .success()
        );
    });
}

/// What `date` says, seconds since 1970.
fn date(arguments: &[&str]) -> i64 {
    let ran = Running::start(Command::new("date").args(arguments), b"").wait();
    ran.ok().parse().expect("a number")
}

/// A host that has slept finds its clock ahead of where it was, as one does whose clock is set. Where it is this machine's alone, it is.
fn clock_jumps() {
    let socket = shared().socket();
    let jumps: &[&str] = match std::env::var_os("LIGHTER_EMULATED") {
        Some(_) => &["+1 hour", "-1 hour"],
        None => &["now"],
    };
    for jump in jumps {
        if *jump != "now" {
            date(&["+%s", "--set", jump]);
        }
        let before = date(&["+%s"]);
        let answer = ping(&socket);
        let after = date(&["+%s"]);
        let told = answer.lines().find_map(|line| line.strip_prefix("Date: "));
        let told = date(&[
            "+%s",
            "--date",
            told.unwrap_or_else(|| panic!("no date in {answer}")),
        ]);
        assert!(
            (before - 1..=after + 1).contains(&told),
            "{before} {told} {after} after {jump}"
        );
    }
}

fn exec() {
    with_shared_home(|home| {
        let exec =
            |arguments: &[&str], input: &[u8]| home.start(&[&["exec"], arguments].concat(), input).wait();
        assert_eq!(exec(&["shared", "--", "cat", "/proc/1/comm"], b"").ok(), "init");
        assert_eq!(exec(&["shared", "--", "hostname"], b"").ok(), "shared");
        assert_eq!(exec(&["shared", "--", "sh", "-c", "exit 33"], b"").code(), 33);
        assert_eq!(
            exec(&["shared", "--", "sh", "-c", "kill -9 $$"], b"").code(),
            128 + 9
        );
        assert_eq!(exec(&["shared", "--", "/no/such/program"], b"").code(), 127);
        assert_eq!(exec(&["shared", "--", "/etc/passwd"], b"").code(), 126);
        assert_eq!(exec(&["-i", "shared", "--", "sort"], b"b\na\n").ok(), "a\nb");
        assert_eq!(
            exec(
                &[
                    "-e",
                    "CARGO=tea",
                    "-w",
                    "/tmp",
                    "shared",
                    "--",
                    "sh",
                    "-c",
                    "echo $CARGO $PWD"
                ],
                b""
            )
            .ok(),
            "tea /tmp"
        );
    });
}

fn stop_and_start() {
    let home = Home::new();
    home.boot("keep");
    let docker = home.docker("keep");
    docker.import("busybox");
    docker.ok(&[
        "run",
        "--name",
        "writer",
        "-v",
        "hold:/v",
        "busybox",
        "sh",
        "-c",
        "echo kept > /v/file",
    ]);
    docker.ok(&[
        "run",
        "-d",
        "--name",
        "server",
        "--restart",
        "always",
        "busybox",
        "sleep",
        "100000",
    ]);
    home.run(&["stop", "keep"]).ok();
    home.run(&["stop", "keep"]).ok();
    home.run(&["exec", "keep", "--", "true"]).fails_with(3);
    home.run(&["start", "keep", "-d", "5g", "-m", "1200m"]).ok();
    assert_eq!(
        docker.ok(&["run", "--rm", "-v", "hold:/v", "busybox", "cat", "/v/file"]),
        "kept"
    );
    until("restarted container", || {
        (!docker.ok(&["ps", "-q", "--filter", "name=server"]).is_empty()).then_some(())
    });
    let blocks = home
        .run(&[
            "exec",
            "keep",
            "--",
            "sh",
            "-c",
            "df -m /var/lib | tail -n 1 | awk '{print $2}'",
        ])
        .ok();
    assert!(
        blocks.parse::<u32>().expect("a size") > 4500,
        "the file system has {blocks} MiB of 5120"
    );
    // A running VM is not removed by accident.
    home.run(&["rm", "keep"]).fails_with(1);
    home.run(&["rm", "--force", "keep"]).ok();
    assert!(!home.vm_file("keep", "data.img").exists());
}

fn throw_away() {
    let home = Home::new();
    let script = "docker info --format '{{.ServerVersion}} {{.NCPU}}' && exit 17";
    let mut command = home.lighter(&["run", "-c", "2", "-m", "1g", "--", "sh", "-c", script]);
    let ran = Running::start(&mut command, b"").wait();
    assert_eq!(ran.code(), 17, "{ran:?}");
    assert!(
        ran.stdout.starts_with("26.1") && ran.stdout.trim().ends_with(" 2"),
        "{ran:?}"
    );
    assert_eq!(home.run(&["ls", "-q"]).ok(), "");
    let left = std::fs::read_dir(home.path().join("vms")).map_or(0, Iterator::count);
    assert_eq!(left, 0);
    // It ends with its command's, also by a signal.
    let run = home.start(&["run", "-c", "1", "-m", "1g", "--", "sleep", "100000"], b"");
    until("throw-away VM", || {
        (!home.run(&["ls", "-q"]).ok().is_empty()).then_some(())
    });
    run.signal(Signal::TERM);
    assert!(!run.wait().status.success());
    // Its supervisor sees the end of the command, and then ends the VM.
    until("end of the throw-away VM", || {
        home.run(&["ls", "-q"]).ok().is_empty().then_some(())
    });
}
