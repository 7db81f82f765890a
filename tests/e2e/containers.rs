//! What people do with containers.

use super::Test;
use super::world::{client_file, shared, until};

pub const TESTS: &[Test] = &[
    ("the_engine_says_what_it_is", the_engine_says_what_it_is),
    (
        "containers_return_their_exit_status",
        containers_return_their_exit_status,
    ),
    ("a_container_lives_its_life", a_container_lives_its_life),
    ("volumes_outlive_containers", volumes_outlive_containers),
    (
        "containers_find_each_other_by_name",
        containers_find_each_other_by_name,
    ),
    ("limits_are_kept", limits_are_kept),
    ("compose_runs_two_services", compose_runs_two_services),
];

/// The longest of all, so it comes last.
pub const CROWD: &[Test] = &[(
    "sixty_four_clients_run_containers_at_once",
    sixty_four_clients_run_containers_at_once,
)];

fn the_engine_says_what_it_is() {
    let docker = shared();
    assert!(
        docker
            .ok(&["version", "--format", "{{.Server.Version}}"])
            .starts_with("26.1")
    );
    let info = docker.ok(&[
        "info",
        "--format",
        "{{.Driver}} {{.CgroupVersion}} {{.OSType}} {{len .Warnings}}",
    ]);
    assert_eq!(info, "overlay2 2 linux 0", "{}", docker.ok(&["info"]));
}

fn containers_return_their_exit_status() {
    let docker = shared();
    docker
        .run(&["run", "--rm", "busybox", "sh", "-c", "exit 42"])
        .fails_with(42);
    docker
        .run(&["run", "--rm", "busybox", "no-such-program"])
        .fails_with(127);
    docker
        .run(&["run", "--rm", "busybox", "/etc/passwd"])
        .fails_with(126);
    docker
        .run(&["run", "--rm", "no-such-image:at-all"])
        .fails_with(125);
}

fn a_container_lives_its_life() {
    let docker = shared();
    let script = "trap 'exit 3' TERM; echo up; while true; do sleep 0.1; done";
    docker.ok(&["run", "-d", "--name", "life", "busybox", "sh", "-c", script]);
    docker.wait_for_log("life", "up");
    assert!(docker.ok(&["top", "life"]).contains("trap"));
    assert_eq!(docker.ok(&["exec", "life", "cat", "/proc/1/comm"]), "sh");
    docker.run(&["exec", "life", "sh", "-c", "exit 9"]).fails_with(9);
    let stats = docker.ok(&[
        "stats",
        "--no-stream",
        "--format",
        "{{.PIDs}} {{.MemUsage}}",
        "life",
    ]);
    assert!(!stats.starts_with("0 ") && stats.contains("iB"), "{stats}");
    let waiting = docker.start(&["wait", "life"], b"");
    docker.ok(&["kill", "--signal", "TERM", "life"]);
    assert_eq!(waiting.wait().ok(), "3");
    let arguments = [
        "events",
        "--since",
        "1h",
        "--until",
        "0s",
        "--filter",
        "container=life",
        "--format",
        "{{.Action}}",
    ];
    for action in ["create", "start", "kill", "die"] {
        // The end of a container is told to those who wait for it, and as an event, at the same time.
        until(action, || {
            docker
                .ok(&arguments)
                .lines()
                .any(|line| line == action)
                .then_some(())
        });
    }
    docker.ok(&["rm", "life"]);
}

fn volumes_outlive_containers() {
    let docker = shared();
    docker.ok(&["volume", "create", "kept"]);
    docker.ok(&[
        "run",
        "--rm",
        "-v",
        "kept:/v",
        "busybox",
        "sh",
        "-c",
        "echo treasure > /v/chest",
    ]);
    assert_eq!(
        docker.ok(&["run", "--rm", "-v", "kept:/v:ro", "busybox", "cat", "/v/chest"]),
        "treasure"
    );
    docker.ok(&["volume", "rm", "kept"]);
}

fn containers_find_each_other_by_name() {
    let docker = shared();
    docker.ok(&["network", "create", "quay"]);
    let serve = "echo served > /tmp/index.html; exec httpd -f -p 80 -h /tmp";
    docker.ok(&[
        "run",
        "-d",
        "--name",
        "server",
        "--network",
        "quay",
        "busybox",
        "sh",
        "-c",
        serve,
    ]);
    // The server listens when it listens.
    let fetch = "until wget -q -O - http://server/; do sleep 0.2; done";
    assert_eq!(
        docker.ok(&["run", "--rm", "--network", "quay", "busybox", "sh", "-c", fetch]),
        "served"
    );
    docker.ok(&["rm", "-f", "server"]);
    docker.ok(&["network", "rm", "quay"]);
}

fn limits_are_kept() {
    let docker = shared();
    let arguments = [
        "run",
        "--rm",
        "--memory",
        "64m",
        "--pids-limit",
        "50",
        "--cpus",
        "0.5",
        "busybox",
    ];
    let read = "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/pids.max /sys/fs/cgroup/cpu.max";
    let limits = docker.ok(&[&arguments[..], &["sh", "-c", read]].concat());
    assert_eq!(
        limits.lines().collect::<Vec<_>>(),
        ["67108864", "50", "50000 100000"]
    );
}

fn compose_runs_two_services() {
    let docker = shared();
    let folder = tempfile::tempdir().expect("make a folder");
    let file = folder.path().join("compose.yaml");
    let text = "
services:
  web:
    image: busybox
    command: sh -c 'echo from compose > /tmp/index.html; exec httpd -f -p 80 -h /tmp'
  client:
    image: busybox
    depends_on: [web]
    command: sh -c 'until wget -q -O - http://web/; do sleep 0.2; done'
";
    std::fs::write(&file, text).expect("write compose.yaml");
    let path = file.to_string_lossy();
    let compose =
        |arguments: &[&str]| docker.ok(&[&["compose", "-p", "fleet", "-f", &path], arguments].concat());
    compose(&["up", "-d"]);
    let log = until("answer of the web service", || {
        let log = compose(&["logs", "client"]);
        log.contains("from compose").then_some(log)
    });
    assert!(log.contains("client"), "{log}");
    compose(&["down", "-t", "1"]);
    assert_eq!(
        docker.ok(&["ps", "-aq", "--filter", "label=com.docker.compose.project=fleet"]),
        ""
    );
    assert!(client_file("config").exists());
}

fn sixty_four_clients_run_containers_at_once() {
    let docker = shared();
    let clients: Vec<_> = (0..64)
        .map(|number| {
            docker.start(
                &[
                    "run",
                    "--rm",
                    "--network",
                    "none",
                    "busybox",
                    "echo",
                    &number.to_string(),
                ],
                b"",
            )
        })
        .collect();
    for (number, client) in clients.into_iter().enumerate() {
        assert_eq!(client.wait().ok(), number.to_string());
    }
}
