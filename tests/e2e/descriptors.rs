//! A VM's processes have no descriptors left.

use super::Test;
use super::world::{Home, folder_in_home, shared, until, with_shared_home};
use rustix::process::{Pid, Resource, Rlimit, prlimit};
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

pub const TESTS: &[Test] = &[("who_finds_no_descriptor_left_waits_and_nothing_spins", exhausted)];

/// Clients of the engine, more than there are descriptors for.
const CLIENTS: usize = 40;

/// Descriptors for them, some.
const ROOM: u64 = 20;

/// Units of processor time in a second, of the kernel's for all programs.
const TICKS: u64 = 100;

/// For how long a process is watched.
const WATCHED: Duration = Duration::from_secs(5);

/// No more than so many descriptors for a process, until this is dropped.
struct Limited {
    process: Pid,
    before: Rlimit,
}

impl Limited {
    fn new(process: Pid, most: u64) -> Self {
        let limits = format!("/proc/{}/limits", process.as_raw_nonzero());
        let limits = std::fs::read_to_string(limits).expect("read");
        let files = limits
            .lines()
            .find_map(|line| line.strip_prefix("Max open files"));
        let hard = files.and_then(|files| files.split_whitespace().nth(1)?.parse().ok());
        let limit = Rlimit {
            current: Some(most),
            // Only root could raise it again.
            maximum: Some(hard.expect("a limit")),
        };
        let before = prlimit(Some(process), Resource::Nofile, limit).expect("limit it");
        Self { process, before }
    }
}

impl Drop for Limited {
    fn drop(&mut self) {
        let _ = prlimit(Some(self.process), Resource::Nofile, self.before);
    }
}

/// Descriptors of a process.
fn open(process: Pid) -> Vec<u64> {
    let folder = format!("/proc/{}/fd", process.as_raw_nonzero());
    let listed = std::fs::read_dir(folder).expect("list").flatten();
    let number = |name: std::ffi::OsString| name.to_str()?.parse().ok();
    listed.filter_map(|entry| number(entry.file_name())).collect()
}

/// The processor time of all of a process, or of one of its threads, according to its file `stat`.
fn time(stat: &str) -> Duration {
    let stat = std::fs::read_to_string(stat).expect("read");
    // After its name, which ends with a parenthesis: of the fields from the third on, utime and stime.
    let (_, fields) = stat.rsplit_once(')').expect("a name");
    let ticks = fields.split_whitespace().skip(11).take(2);
    let ticks: u64 = ticks.map(|ticks| ticks.parse::<u64>().expect("a number")).sum();
    Duration::from_millis(1000 / TICKS * ticks)
}

/// What `stat` is of is not busy for nothing.
fn waits(stat: &str) {
    let (before, began) = (time(stat), Instant::now());
    std::thread::sleep(WATCHED);
    let (busy, watched) = (time(stat) - before, began.elapsed());
    eprintln!("{busy:?} of {watched:?}");
    assert!(busy < watched / 3, "{busy:?} of {watched:?}");
}

/// A client that asks the engine whether it answers, and stays.
struct Client(UnixStream);

impl Client {
    fn new(socket: &str) -> Self {
        let mut stream = UnixStream::connect(socket).expect("connect");
        stream
            .write_all(b"GET /_ping HTTP/1.1\r\nHost: x\r\n\r\n")
            .expect("write");
        Self(stream)
    }

    /// Whether it has an answer already.
    fn is_served(&self) -> bool {
        self.0.set_nonblocking(true).expect("set");
        let mut byte = [0];
        rustix::net::recv(&self.0, &mut byte, rustix::net::RecvFlags::PEEK)
            .is_ok_and(|(length, _)| length == 1)
    }

    /// Ends it; returns what it was answered.
    fn end(mut self) -> String {
        self.0.set_nonblocking(false).expect("set");
        self.0.shutdown(Shutdown::Write).expect("shut down");
        let mut answer = String::new();
        self.0.read_to_string(&mut answer).expect("read");
        answer
    }
}

fn exhausted() {
    let docker = shared();
    with_shared_home(|home| {
        supervisor(home, &docker.socket());
        monitor(home);
        docker.ok(&["ps"]);
    });
}

fn supervisor(home: &Home, socket: &str) {
    let process = home.pid("shared", "supervisor_pid");
    let folder = folder_in_home();
    let at = folder.path().to_str().expect("text");
    // Asks for a name until it is told, then until there is none to be had, and then until there is.
    let script = format!(
        "cd {at}
         ask() {{ busybox nslookup -type=a localhost; }}
         until ask; do sleep 1; done; touch asks
         while ask; do sleep 1; done; touch lost
         until ask; do sleep 1; done; touch found"
    );
    let asker = home.start(&["exec", "shared", "--", "sh", "-c", &script], b"");
    until("questions", || folder.path().join("asks").exists().then_some(()));
    let before = open(process);
    let last = before.iter().max().expect("some");
    let limited = Limited::new(process, last + ROOM);
    let clients: Vec<Client> = (0..CLIENTS).map(|_| Client::new(socket)).collect();
    let served = || clients.iter().filter(|client| client.is_served()).count();
    until("clients for which there is room", || {
        (served() >= 4).then_some(())
    });
    // Not one more descriptor from here on.
    let limited_more = Limited::new(process, 3);
    until("end of the names", || {
        folder.path().join("lost").exists().then_some(())
    });
    let status = home.start(&["status", "shared"], b"");
    waits(&format!("/proc/{}/stat", process.as_raw_nonzero()));
    let some = served();
    eprintln!("{some} of {CLIENTS} clients are served");
    assert!(some < CLIENTS);
    drop(limited_more);
    drop(limited);
    // Whoever has waited is served.
    status.wait().ok();
    for client in clients {
        let answer = client.end();
        assert!(answer.contains("200 OK"), "{answer:?}");
    }
    asker.wait().ok();
    assert!(folder.path().join("found").exists());
    until("few open descriptors", || {
        (open(process).len() <= before.len() + 2).then_some(())
    });
}

/// The monitor cannot take who asks it for something.
fn monitor(home: &Home) {
    let process = home.pid("shared", "monitor_pid");
    let socket = home.path().join("run/shared/monitor.sock");
    let limited = Limited::new(process, 3);
    let mut client = UnixStream::connect(socket).expect("connect");
    client.write_all(b"{\"command\":\"status\"}\n").expect("write");
    // The other threads are the guest's.
    let main = process.as_raw_nonzero();
    waits(&format!("/proc/{main}/task/{main}/stat"));
    drop(limited);
    client.shutdown(Shutdown::Write).expect("shut down");
    let mut answer = String::new();
    client.read_to_string(&mut answer).expect("read");
    assert!(answer.contains("running"), "{answer:?}");
}
