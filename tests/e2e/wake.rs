//! VMs that suspend by themselves when they are idle, and go on when they are used.
//!
//! One is suspended, woken, saved and restored with clients all the while: twice, 50 times in the long form.

use super::cost::{Cost, disk};
use super::world::{Docker, Home, PATIENCE, is_long, processes_of, until};
use super::{Test, ports};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpStream, UdpSocket};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread::JoinHandle;

pub const TESTS: &[Test] = &[
    ("an_idle_vm_suspends_and_the_first_who_comes_wakes_it", wake),
    ("a_vm_that_stands_by_is_as_any_suspended_one", stand_by),
    ("no_client_is_lost_however_often_it_is_suspended", cycles),
];

/// The container's echo, by TCP and UDP.
pub const PORT: u16 = 7107;

/// By how much what a suspended VM keeps on the disk, and a monitor in memory, may differ: the guest's page cache does.
const GROWTH_KIB: u64 = 256 << 10;

/// The files that a disk has at the most, each of which the monitor has open.
const MOST_LAYERS: usize = 8;

/// What the allocator of a supervisor may keep of the buffers of a crowd.
const STANDING_GROWTH_KIB: u64 = 8 << 10;

/// What copies of clusters in the layers of a disk may take before they are merged.
const LAYERS_KIB: u64 = 512 << 10;

/// Clients at the moment at which a VM goes on.
const CROWD: usize = 64;

/// Boots a VM that suspends soon, with the container `quay`, which only waits.
fn boot(home: &Home) -> Docker {
    home.boot_small("vm", "512m", &["--no-mounts", "--auto-suspend", "3s"]);
    let docker = home.docker("vm");
    docker.import("ports");
    let published = ["tcp", "udp"].map(|transport| format!("{PORT}:7/{transport}"));
    ports::serve(&docker, "quay", &published.each_ref().map(String::as_str), &[]).ok();
    docker.wait_for_log("quay", "listening");
    docker
}

/// What is known of the VM, whether it runs or not.
fn status(home: &Home) -> Value {
    let ran = home.run(&["status", "--json", "vm"]);
    assert!([0, 3].contains(&ran.code()), "{ran:?}");
    serde_json::from_str(&ran.stdout).expect("JSON")
}

fn stands_by(home: &Home) -> bool {
    status(home)["running"]["phase"] == "standing-by"
}

fn until_it_stands_by(home: &Home) -> Value {
    until("standing by", || stands_by(home).then_some(()));
    status(home)
}

fn pid(status: &Value, role: &str) -> Option<Pid> {
    status["running"][role]
        .as_i64()
        .and_then(|pid| Pid::from_raw(pid as i32))
}

fn connect() -> TcpStream {
    connect_to(PORT)
}

fn connect_to(port: u16) -> TcpStream {
    let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).expect("the port is open");
    stream.set_read_timeout(Some(PATIENCE)).expect("a time-out");
    stream
}

/// What comes back over a published port.
pub fn echo(port: u16, text: &str) -> String {
    let mut stream = connect_to(port);
    stream.write_all(text.as_bytes()).expect("write");
    stream.shutdown(Shutdown::Write).expect("end a direction");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("read");
    answer
}

/// Asks the engine of `socket` whether it answers.
pub fn ping(socket: &str) -> String {
    let mut stream = UnixStream::connect(socket).expect("the socket is open");
    stream.set_read_timeout(Some(PATIENCE)).expect("a time-out");
    stream
        .write_all(b"GET /_ping HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        .expect("write");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("read");
    answer
}

/// By whom the VM is used.
fn users(home: &Home) -> Vec<String> {
    let status = status(home);
    let busy = status["running"]["activity"]["busy"].as_array().cloned();
    let by = |busy: &Value| busy["by"].as_str().expect("a word").to_owned();
    busy.unwrap_or_default().iter().map(by).collect()
}

fn wake() {
    let home = Home::new();
    let docker = boot(&home);
    let running = status(&home);
    assert_eq!(running["running"]["activity"]["auto_suspend_s"], 3);
    let supervisor = pid(&running, "supervisor_pid");

    // Whoever uses it is told of, and it does not suspend.
    let events = docker.start(&["events"], b"");
    let client = connect();
    let logs = home.start(&["logs", "-f", "vm"], b"");
    let mut exec = home.lighter(&["exec", "-i", "vm", "--", "cat"]);
    exec.stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::null());
    let mut exec = exec.spawn().expect("start");
    until("users", || {
        let users = users(&home);
        ["clients", "ports", "sessions", "logs"]
            .iter()
            .all(|user| users.iter().any(|by| by == user))
            .then_some(())
    });
    let text = home.run(&["status", "vm"]).ok();
    assert!(
        text.contains("1 client of a published port") && text.contains("suspends when idle for 0:00:03"),
        "{text}"
    );
    drop((events, client, logs));
    drop(exec.stdin.take());
    exec.wait().expect("wait");
    // So are containers that work.
    docker.ok(&["exec", "-d", "quay", "port-server", "spin"]);
    until("work", || {
        users(&home).contains(&"containers".into()).then_some(())
    });
    docker.ok(&["restart", "-t", "0", "quay"]);

    let suspended = until_it_stands_by(&home);
    assert_eq!(suspended["state"], "suspended");
    assert_eq!(pid(&suspended, "supervisor_pid"), supervisor);
    assert_eq!(pid(&suspended, "monitor_pid"), None);
    let text = home.run(&["status", "vm"]);
    assert!(text.stdout.contains("goes on when its socket"), "{text:?}");
    assert!(home.run(&["ls"]).ok().contains("suspended, wakes"));
    assert_eq!(
        home.run(&["ports", "--json", "vm"])
            .ok()
            .matches("\"host\"")
            .count(),
        4
    );
    eprintln!(
        "the supervisor that stands by: {:?}",
        Cost::of(supervisor.expect("a process"))
    );

    // By a published port, with bytes that were there first.
    assert_eq!(echo(PORT, "ahoy"), "ahoy");
    assert_eq!(pid(&status(&home), "supervisor_pid"), supervisor);
    until_it_stands_by(&home);
    // By the engine's socket.
    let names = docker.ok(&["ps", "--format", "{{.Names}} {{.State}}"]);
    assert_eq!(names, "quay running");
    until_it_stands_by(&home);
    // By a command.
    assert_eq!(home.run(&["exec", "vm", "--", "echo", "here"]).ok(), "here");
    until_it_stands_by(&home);
    // By a datagram.
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("a socket");
    socket.set_read_timeout(Some(PATIENCE)).expect("a time-out");
    socket
        .send_to(b"datagram", (Ipv4Addr::LOCALHOST, PORT))
        .expect("send");
    let mut buffer = [0; 64];
    let length = socket.recv(&mut buffer).expect("an answer");
    assert_eq!(&buffer[..length], b"datagram");
    assert!(users(&home).contains(&"ports".into()));
}

fn stand_by() {
    let home = Home::new();
    let docker = boot(&home);
    let folder = home.vm_file("vm", "suspended");

    until_it_stands_by(&home);
    let refused = home.run(&["start", "-m", "1g", "vm"]).fails_with(2);
    assert!(refused.contains("is suspended"), "{refused}");
    let refused = home.run(&["snapshot", "create", "vm"]).fails_with(3);
    assert!(refused.contains("is suspended"), "{refused}");
    let refused = home.run(&["rm", "vm"]).fails_with(1);
    assert!(refused.contains("--force removes"), "{refused}");
    assert!(stands_by(&home));

    // What it would go on from is not there for a while.
    let (memory, aside) = (folder.join("memory"), folder.join("aside"));
    std::fs::rename(&memory, &aside).expect("rename");
    let client = std::thread::spawn(|| {
        let mut stream = connect();
        stream.write_all(b"ahoy").expect("write");
        // An end, or a reset.
        !matches!(stream.read(&mut [0; 8]), Ok(1..))
    });
    docker.run(&["ps"]).fails_with(1);
    assert!(client.join().expect("a client"));
    let failed = home.run(&["start", "vm"]).fails_with(1);
    assert!(failed.contains("--boot"), "{failed}");
    let failed = home.run(&["exec", "vm", "--", "true"]).fails_with(3);
    assert!(failed.contains("did not go on"), "{failed}");
    let failed = until_it_stands_by(&home);
    let trouble = failed["running"]["trouble"]["reason"]
        .as_str()
        .unwrap_or_default();
    assert!(
        trouble.contains("did not go on") && trouble.contains("memory"),
        "{failed}"
    );
    std::fs::rename(&aside, &memory).expect("rename");
    assert_eq!(docker.ok(&["ps", "--format", "{{.Names}}"]), "quay");

    until_it_stands_by(&home);
    let stopped = home.run(&["stop", "vm"]);
    assert!(stopped.stderr.contains("suspended and stays so"), "{stopped:?}");
    let nothing_runs = || {
        // The lock is free a moment before its process is gone.
        until("end of all processes", || {
            processes_of(home.path().to_str().expect("text"))
                .is_empty()
                .then_some(())
        });
        assert!(!Path::new(&docker.socket()).exists());
        assert_eq!(status(&home)["state"], "suspended");
    };
    nothing_runs();
    home.run(&["start", "--no-context", "vm"]).ok();

    until_it_stands_by(&home);
    home.run(&["suspend", "vm"]).ok();
    nothing_runs();
    home.run(&["resume", "--no-context", "vm"]).ok();

    // Killed, it leaves a suspended VM and no socket that holds anybody up.
    let suspended = until_it_stands_by(&home);
    kill_process(
        pid(&suspended, "supervisor_pid").expect("a process"),
        Signal::KILL,
    )
    .expect("kill");
    until("end", || status(&home)["running"].is_null().then_some(()));
    assert_eq!(status(&home)["state"], "suspended");
    docker.run(&["ps"]).fails_with(1);
    assert!(TcpStream::connect((Ipv4Addr::LOCALHOST, PORT)).is_err());
    home.run(&["start", "--no-context", "vm"]).ok();
    assert_eq!(echo(PORT, "ahoy"), "ahoy");

    until_it_stands_by(&home);
    home.run(&["start", "--boot", "--no-context", "vm"]).ok();
    assert!(!folder.exists());
    assert_eq!(docker.ok(&["ps", "-q"]), "");
    until_it_stands_by(&home);
    home.run(&["rm", "--force", "vm"]).ok();
    assert_eq!(home.run(&["ls", "-q"]).ok(), "");
}

/// Clients of every kind, all at once, each of whom is to be answered.
pub fn crowd(docker: &Docker, clients: usize) -> Vec<JoinHandle<()>> {
    let client = |number: usize| {
        let docker = docker.clone();
        std::thread::spawn(move || {
            let text = format!("client {number}");
            match number % 16 {
                0 => assert_eq!(
                    docker
                        .start(&["exec", "-i", "quay", "port-server", "cat"], text.as_bytes())
                        .wait()
                        .ok(),
                    text
                ),
                1 => assert_eq!(
                    docker
                        .start(
                            &["run", "-i", "--rm", "ports", "port-server", "cat"],
                            text.as_bytes()
                        )
                        .wait()
                        .ok(),
                    text
                ),
                2 => assert_eq!(docker.ok(&["ps", "-q", "-f", "name=quay"]).len(), 12),
                3..8 => {
                    let answer = ping(&docker.socket());
                    assert!(answer.contains(" 200 OK"), "{answer}");
                }
                _ => assert_eq!(echo(PORT, &text), text),
            }
        })
    };
    (0..clients).map(client).collect()
}

#[track_caller]
pub fn all_answered(crowd: Vec<JoinHandle<()>>) {
    for client in crowd {
        client.join().expect("an answered client");
    }
}

fn cycles() {
    let cycles = if is_long() { 50 } else { 2 };
    let home = Home::new();
    let docker = boot(&home);
    // The first snapshot would make it.
    std::fs::create_dir(home.path().join("snapshots")).expect("make a folder");
    let (mut files_first, mut disk_first) = (None, None);
    let (mut standing_first, mut running_first) = (None, None);
    for cycle in 0..cycles {
        // All come while it is on its way to the disk.
        let saving = home.vm_file("vm", ".suspending");
        until("suspending", || {
            (saving.exists() || stands_by(&home)).then_some(())
        });
        all_answered(crowd(&docker, CROWD));
        // And when it has got there.
        let suspended = until_it_stands_by(&home);
        let standing = Cost::of(pid(&suspended, "supervisor_pid").expect("a process"));
        let (files, disk_kib) = disk(&home);
        all_answered(crowd(&docker, CROWD));
        // Clients that are there all the while are not disturbed when it is saved and another goes on from that.
        let events = docker.start(&["events", "--filter", "event=die"], b"");
        let client = connect();
        home.run(&["snapshot", "create", "vm", "moment"]).ok();
        let restore = home.start(&["restore", "moment", "--as", "copy", "--no-context"], b"");
        all_answered(crowd_of_copy(&home));
        restore.wait().ok();
        home.run(&["rm", "--force", "copy"]).ok();
        home.run(&["snapshot", "rm", "moment"]).ok();
        let running = Cost::of(home.pid("vm", "monitor_pid"));
        exchange(client);
        eprintln!("cycle {cycle}: standing by {standing:?}, disk {disk_kib} KiB; running {running:?}");
        standing.assert_flat(*standing_first.get_or_insert(standing), STANDING_GROWTH_KIB, 0);
        running.assert_flat(*running_first.get_or_insert(running), GROWTH_KIB, MOST_LAYERS);
        assert_eq!(files, *files_first.get_or_insert_with(|| files.clone()));
        let disk_kib_then = *disk_first.get_or_insert(disk_kib);
        assert!(disk_kib <= disk_kib_then + LAYERS_KIB, "{disk_kib_then}");
        if cycle % 10 == 0 {
            // By hand, with clients that are there: they see the end of it, and hang nowhere. Its supervisor is another then.
            let client = connect();
            home.run(&["suspend", "vm"]).ok();
            ends(client);
            events.wait();
            home.run(&["resume", "--no-context", "vm"]).ok();
            (standing_first, files_first) = (None, None);
        }
    }
}

/// Clients of the VM `copy`, from the first moment at which it can be reached.
fn crowd_of_copy(home: &Home) -> Vec<JoinHandle<()>> {
    let socket = home.path().join("run/copy/docker.sock");
    until("socket of the copy", || socket.exists().then_some(()));
    let socket = socket.to_str().expect("text").to_owned();
    let client = |_| {
        let socket = socket.clone();
        std::thread::spawn(move || assert!(ping(&socket).contains(" 200 OK")))
    };
    (0..CROWD).map(client).collect()
}

/// A client that was there goes on.
fn exchange(mut client: TcpStream) {
    client.write_all(b"still here").expect("write");
    client.shutdown(Shutdown::Write).expect("end a direction");
    let mut answer = String::new();
    client.read_to_string(&mut answer).expect("read");
    assert_eq!(answer, "still here");
}

/// The connection ends.
fn ends(mut client: TcpStream) {
    assert!(!matches!(client.read(&mut [0; 1]), Ok(1..)));
}
