//! Who a VM is that goes on from another's snapshot.

use super::Test;
use super::world::{Docker, Home, PATIENCE, until};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

pub const TESTS: &[Test] = &[
    (
        "a_fork_is_itself_before_it_serves_and_so_is_the_fork_of_a_fork",
        forks,
    ),
    ("a_fork_leaves_the_swarm_of_its_source", swarm),
];

/// Where the web server's port is published.
const PORT: u16 = 7480;

/// Counts connections to the outside that the guest's kernel remembers.
const OUTSIDE: &str = "grep -c 'dst=192.168.127.2 ' /proc/net/nf_conntrack; true";

/// Runs a command in the VM, outside of containers.
#[track_caller]
fn inside(home: &Home, vm: &str, script: &str) -> String {
    home.run(&["exec", vm, "--", "sh", "-c", script]).ok()
}

/// What must be different in two engines, each with its name.
fn marks(home: &Home, vm: &str, docker: &Docker) -> Vec<(&'static str, String)> {
    let random = "/proc/sys/kernel/random/uuid";
    vec![
        ("hostname", inside(home, vm, "hostname")),
        ("name of the engine", docker.ok(&["info", "-f", "{{.Name}}"])),
        ("machine-id", inside(home, vm, "cat /etc/machine-id")),
        (
            "machine-id in a container",
            docker.ok(&["exec", "web", "cat", "/etc/machine-id"]),
        ),
        ("MAC", inside(home, vm, "cat /sys/class/net/eth0/address")),
        (
            "engine ID on the disk",
            inside(home, vm, "cat /var/lib/docker/engine-id"),
        ),
        ("random bytes", inside(home, vm, &format!("cat {random}"))),
        // By a program that ran when the snapshot was taken.
        (
            "random bytes of a container",
            docker.ok(&["exec", "web", "cat", random]),
        ),
    ]
}

/// What a web client is told on `port`.
fn get(port: u16) -> Option<String> {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).ok()?;
    stream.set_read_timeout(Some(PATIENCE)).ok()?;
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n").ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    answer.trim().lines().last().map(str::to_owned)
}

/// The published ports of the VM: where on all IPv4 addresses of the host, and in place of which.
fn ports(home: &Home, vm: &str) -> Vec<(u16, Option<u16>)> {
    let port = |value: &serde_json::Value| value.as_str()?.strip_prefix("0.0.0.0:")?.parse().ok();
    let listed: serde_json::Value =
        serde_json::from_str(&home.run(&["ports", "--json", vm]).ok()).expect("JSON");
    let listed = listed.as_array().expect("a list");
    listed
        .iter()
        .filter_map(|entry| Some((port(&entry["host"])?, port(&entry["instead_of"]))))
        .collect()
}

/// Checks what a fork has of its own when its first command has ended; returns its engine and its web server's port.
fn assert_itself(home: &Home, vm: &str, source: &[(&'static str, String)]) -> (Docker, u16) {
    let docker = home.docker(vm);
    assert_clock(&docker);
    let own = marks(home, vm, &docker);
    for ((what, own), (_, other)) in own.iter().zip(source) {
        assert_ne!(own, other, "{what} of {vm}");
    }
    assert_eq!(own[0].1, vm);
    let status = home.status(vm);
    assert_eq!(status["running"]["identity"], "taken", "{status}");
    assert_ne!(status["running"]["trouble"]["device"], "identity", "{status}");
    // The proxies ask for their ports by themselves.
    let (port, instead_of) = until("port of the fork", || ports(home, vm).first().copied());
    assert_eq!(instead_of, Some(PORT));
    assert_ne!(port, PORT);
    assert_eq!(get(port).as_deref(), Some("webserver"));
    let table = home.run(&["ports", vm]).ok();
    assert!(table.contains("INSTEAD OF"), "{table}");
    // Its own path on the host, beside that of its source.
    let mount = format!("{}:/var/run/docker.sock", docker.socket());
    docker.ok(&[
        "run",
        "--rm",
        "-v",
        &mount,
        "busybox",
        "test",
        "-S",
        "/var/run/docker.sock",
    ]);
    // Nothing is remembered of the network that it was on.
    let known = inside(
        home,
        vm,
        "grep -c 'dst=192.168.127.2 ' /proc/net/nf_conntrack; true",
    );
    assert_eq!(known, "0", "connections to the outside");
    (docker, port)
}

/// The engine's clock is the host's. In the emulated machine, where a command takes seconds, this says only that it does not
/// stand where the snapshot did: how far it is off is what the guest measured itself.
fn assert_clock(docker: &Docker) {
    let now = || {
        SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .expect("a time")
            .as_millis()
    };
    let before = now();
    let time: u128 = docker
        .ok(&["exec", "web", "date", "+%s"])
        .parse::<u128>()
        .expect("seconds")
        * 1000;
    assert!(
        (before - 1100..=now() + 100).contains(&time),
        "{time} after {before}"
    );
}

fn forks() {
    let home = Home::new();
    home.boot_small("source", "512m", &["--no-mounts"]);
    let source = home.docker("source");
    source.import("busybox");
    let published = format!("{PORT}:80");
    let serve = "echo webserver > /tmp/index.html; exec httpd -f -h /tmp";
    source.ok(&[
        "run",
        "-d",
        "--name",
        "web",
        "-p",
        &published,
        "-v",
        "/etc/machine-id:/etc/machine-id:ro",
        "busybox",
        "sh",
        "-c",
        serve,
    ]);
    until("web server", || get(PORT).filter(|answer| answer == "webserver"));
    let of_source = marks(&home, "source", &source);
    // A connection through the network, for the kernel to remember.
    let listener = TcpListener::bind("127.0.0.1:0").expect("listen");
    let there = listener.local_addr().expect("an address").port();
    let link = format!("sleep 100000 | nc 192.168.127.1 {there}");
    source.ok(&["run", "-d", "--name", "link", "busybox", "sh", "-c", &link]);
    listener.set_nonblocking(true).expect("set");
    let (mut outside, _) = until("connection", || listener.accept().ok());
    let hears = |outside: &mut TcpStream, word: &str| {
        let state = |error: &dyn std::fmt::Display| {
            let remembered = inside(&home, "source", "cat /proc/net/nf_conntrack");
            format!("the source's connection to the outside ended: {error}, {remembered}")
        };
        writeln!(outside, "{word}").unwrap_or_else(|error| panic!("{}", state(&error)));
        until("what the outside sends", || {
            let said = source.run(&["logs", "link"]).stdout;
            let running = source.ok(&["inspect", "-f", "{{.State.Running}}", "link"]);
            assert_eq!(running, "true", "{}", state(&said));
            said.contains(word).then_some(())
        });
    };
    hears(&mut outside, "ahoy");
    assert_ne!(inside(&home, "source", OUTSIDE), "0");
    // The clocks of forks have something to catch up.
    std::thread::sleep(Duration::from_secs(2));

    home.run(&["fork", "source", "--as", "f", "--no-context"]).ok();
    let (fork, port) = assert_itself(&home, "f-1", &of_source);
    // The source has lost nothing.
    assert_eq!(get(PORT).as_deref(), Some("webserver"));
    assert_eq!(ports(&home, "source"), [(PORT, None)]);
    hears(&mut outside, "again");
    assert_ne!(inside(&home, "source", OUTSIDE), "0");

    let of_fork = marks(&home, "f-1", &fork);
    home.run(&["fork", "f-1", "--as", "g", "--no-context"]).ok();
    let (_, port_of_second) = assert_itself(&home, "g-1", &of_source);
    assert_ne!(port, port_of_second);
    let of_second = marks(&home, "g-1", &home.docker("g-1"));
    for ((what, one), (_, other)) in of_fork.iter().zip(&of_second) {
        assert_ne!(one, other, "{what}");
    }
    // How far its clock was off is known by now, and was corrected.
    until("measured clock", || {
        let offset = home.status("g-1")["running"]["clock_offset_ns"].as_i64()?;
        (offset.abs() < 100_000_000).then_some(())
    });

    // A port that is free is had again, and ends with its container.
    home.run(&["rm", "--force", "source"]).ok();
    home.run(&["rm", "--force", "g-1"]).ok();
    home.run(&["fork", "f-1", "--as", "h", "--no-context"]).ok();
    let (back, _) = until("port of the last", || ports(&home, "h-1").first().copied());
    assert_eq!(back, PORT);
    assert_eq!(get(PORT).as_deref(), Some("webserver"));
    home.docker("h-1").ok(&["rm", "-f", "web"]);
    TcpListener::bind(("0.0.0.0", PORT)).expect("a port that is free");
}

fn swarm() {
    let home = Home::new();
    home.boot_small("source", "768m", &["--no-mounts"]);
    let source = home.docker("source");
    source.ok(&["swarm", "init", "--advertise-addr", "192.168.127.2"]);
    home.run(&["fork", "source", "--as", "f", "--no-context"]).ok();
    let state = ["info", "-f", "{{.Swarm.LocalNodeState}}"];
    assert_eq!(home.docker("f-1").ok(&state), "inactive");
    let told = home.run(&["status", "f-1"]).ok();
    assert!(told.contains("it has left the swarm"), "{told}");
    assert_eq!(source.ok(&state), "active");
}
