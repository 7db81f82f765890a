//! What people bring: a compose file of three services, a suite on Testcontainers, a Dockerfile that installs packages.

use super::world::{Home, Running, app_file, folder_in_home, shared, until, with_shared_home};
use super::{Test, forks};
use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;

pub const TESTS: &[Test] = &[
    ("a_build_installs_packages_from_debian", packages),
    ("a_testcontainers_suite_passes", testcontainers),
    (
        "a_compose_application_of_three_services_runs_and_is_forked",
        compose,
    ),
    ("a_server_reloads_what_is_edited_on_the_host", reload),
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

/// A client of a server on the host's loopback interface.
pub fn connect(port: u16) -> TcpStream {
    TcpStream::connect(("127.0.0.1", port)).unwrap_or_else(|error| panic!("port {port}: {error}"))
}

/// What the server answers, or why it does not.
fn ask(mut stream: TcpStream) -> Result<serde_json::Value, String> {
    let mut ask = || {
        stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        std::io::Result::Ok(answer)
    };
    let answer = ask().map_err(|error| error.to_string())?;
    let (_, body) = answer.split_once("\r\n\r\n").ok_or(format!("{answer:?}"))?;
    serde_json::from_str(body).map_err(|error| format!("{error}: {answer:?}"))
}

/// What it answers.
pub fn answer(stream: TcpStream) -> serde_json::Value {
    ask(stream).unwrap_or_else(|error| panic!("{error}"))
}

fn try_get(port: u16) -> Result<serde_json::Value, String> {
    ask(TcpStream::connect(("127.0.0.1", port)).map_err(|error| error.to_string())?)
}

/// What a server on the host's loopback interface answers.
pub fn get(port: u16) -> serde_json::Value {
    answer(connect(port))
}

fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
    listener.expect("a port").port()
}

fn copy(from: &Path, to: &Path) {
    let copied = Command::new("cp").arg("-r").arg(from).arg(to).status();
    assert!(copied.expect("cp").success());
}

fn compose() {
    let home = Home::new();
    // A copy, as a user's folder would be: shared, and none of the repository's.
    let project = home.path().join("project");
    let apps = Path::new(env!("CARGO_MANIFEST_DIR")).join("e2e/apps");
    copy(&apps, &project);
    let share = project.to_string_lossy().into_owned();
    home.run(&[
        "start", "-c", "1", "-m", "1g", "-d", "10g", "--mount", &share, "composed",
    ])
    .ok();
    let docker = home.docker("composed");
    import(&docker, "app");
    let port = free_port();
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
    forks::fork(&home, "composed");
}

/// A server that answers `version`, as an ASGI application.
fn server(version: u32) -> String {
    format!(
        r#"
async def app(scope, receive, send):
    await send({{"type": "http.response.start", "status": 200, "headers": []}})
    await send({{"type": "http.response.body", "body": b"{version}"}})
"#
    )
}

/// Uvicorn watches by inotify. It is told of an edit as an editor does it: a new file takes the place of the old one. Then another program
/// of the image does with a file what databases and editors do.
fn reload() {
    let docker = shared();
    import(&docker, "app");
    let folder = folder_in_home();
    let project = folder.path().join("project");
    std::fs::create_dir(&project).expect("make a folder");
    copy(&app_file("reload"), &folder.path().join("python"));
    std::fs::write(project.join("main.py"), server(1)).expect("write");
    let port = free_port();
    let volume = format!("{}:/x", folder.path().display());
    let publish = format!("127.0.0.1:{port}:8000");
    let run = [
        "run",
        "-d",
        "--name",
        "reload",
        "-v",
        &volume,
        "-w",
        "/x/project",
        "-p",
        &publish,
    ];
    let environment = [
        "-e",
        "PYTHONPATH=/x/python",
        "-e",
        "PYTHONDONTWRITEBYTECODE=1",
        "app",
    ];
    let command = [
        "python3", "-m", "uvicorn", "--host", "0.0.0.0", "--reload", "main:app",
    ];
    docker.ok(&[&run[..], &environment, &command].concat());
    until("the first answer", || (try_get(port).ok()? == 1).then_some(()));
    // It may serve before it watches.
    for version in 2..4 {
        std::fs::write(folder.path().join("new"), server(version)).expect("write");
        std::fs::rename(folder.path().join("new"), project.join("main.py")).expect("rename");
        until("the next answer", || {
            (try_get(port).ok()? == version).then_some(())
        });
    }
    let log = docker.run(&["logs", "reload"]).stderr;
    assert!(log.contains("WatchFiles detected changes in 'main.py'"), "{log}");
    let script = include_str!("apps/files.py");
    let ran = docker.ok(&["exec", "reload", "python3", "-c", script, "/x"]);
    assert_eq!(ran, "as on any disk");
    let file = std::fs::read(folder.path().join("file")).expect("what was written through memory");
    assert!(file.starts_with(b"mappeda") && file[4096..].starts_with(b"writtena"));
    docker.ok(&["rm", "-f", "reload"]);
    docker.ok(&["rmi", "app"]);
}
