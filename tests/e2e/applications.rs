//! What people bring: a compose file of three services, a suite on Testcontainers, a Dockerfile that installs packages.

use super::Test;
use super::world::{Home, Running, app_file, shared, until, with_shared_home};
use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;

pub const TESTS: &[Test] = &[
    ("a_build_installs_packages_from_debian", packages),
    ("a_testcontainers_suite_passes", testcontainers),
    ("a_compose_application_of_three_services_runs", compose),
];

fn import(docker: &super::world::Docker, name: &str) {
    docker.ok(&[
        "import",
        &app_file(&format!("{name}.tar")).to_string_lossy(),
        name,
    ]);
}

fn packages() {
    let docker = shared();
    import(&docker, "debian");
    let dockerfile = "FROM debian\nRUN apt-get update && apt-get install -y --no-install-recommends hello\nCMD [\"hello\"]\n";
    let mut build = docker.command(&["build", "-q", "-t", "hello", "-"]);
    Running::start(&mut build, dockerfile.as_bytes()).wait().ok();
    assert_eq!(docker.ok(&["run", "--rm", "hello"]), "Hello, world!");
    docker.ok(&["rmi", "hello", "debian"]);
}

fn testcontainers() {
    let variables = with_shared_home(|home| home.run(&["env", "--json", "shared"]).ok());
    let variables: BTreeMap<String, String> = serde_json::from_str(&variables).expect("JSON");
    let suite = Path::new(env!("CARGO_MANIFEST_DIR")).join("e2e/apps/suite.py");
    let mut command = Command::new("python3");
    command
        .arg(suite)
        .env("PYTHONPATH", app_file("python"))
        .envs(variables)
        // The image of the container that tidies up cannot be had without Docker's registry.
        .env("TESTCONTAINERS_RYUK_DISABLED", "true");
    let suite = Running::start(&mut command, b"").wait();
    assert!(suite.stderr.contains("\nRan 4 tests"), "{suite:?}");
    suite.ok();
}

/// What a server on the host's loopback interface answers.
fn get(port: u16) -> serde_json::Value {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).expect("connect");
    stream
        .write_all(b"GET / HTTP/1.0\r\n\r\n")
        .expect("write the request");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("read the answer");
    let (_, body) = answer
        .split_once("\r\n\r\n")
        .unwrap_or_else(|| panic!("{answer:?}"));
    serde_json::from_str(body).unwrap_or_else(|error| panic!("{error}: {answer:?}"))
}

fn compose() {
    let home = Home::new();
    // A copy, as a user's folder would be: shared, and none of the repository's.
    let project = home.path().join("project");
    let apps = Path::new(env!("CARGO_MANIFEST_DIR")).join("e2e/apps");
    let copied = Command::new("cp").arg("-r").arg(apps).arg(&project).status();
    assert!(copied.expect("cp").success());
    let share = project.to_string_lossy().into_owned();
    home.run(&[
        "start", "-c", "1", "-m", "2g", "-d", "10g", "--mount", &share, "composed",
    ])
    .ok();
    let docker = home.docker("composed");
    import(&docker, "app");
    let port = TcpListener::bind("127.0.0.1:0")
        .and_then(|listener| listener.local_addr())
        .expect("a port")
        .port();
    let compose = |arguments: &[&str]| {
        let mut command = docker.command(&[&["compose"], arguments].concat());
        command.current_dir(&project).env("WEB_PORT", port.to_string());
        Running::start(&mut command, b"").wait().ok()
    };
    compose(&["up", "--detach", "--build", "--wait", "--wait-timeout", "1700"]);
    let first = get(port);
    assert_eq!(
        first,
        serde_json::json!({"counted": 1, "written": 1, "greeting": "ahoy from the host"})
    );
    // What the host changes is there at the next look; what the database was told survives its container.
    std::fs::write(project.join("static/greeting"), "changed").expect("write");
    compose(&["rm", "--stop", "--force", "db", "web"]);
    assert!(TcpStream::connect(("127.0.0.1", port)).is_err());
    compose(&["up", "--detach", "--wait", "--wait-timeout", "1700"]);
    let second = until("the change", || {
        Some(get(port)).filter(|answer| answer["greeting"] == "changed")
    });
    assert_eq!(second["counted"], second["written"], "{second}");
    compose(&["down", "--volumes"]);
    home.run(&["rm", "--force", "composed"]).ok();
}
