//! VMs that are suspended, and go on.

use super::snapshots::{counting, goes_on, number};
use super::world::{Docker, Home, processes_of, until};
use super::{Test, network};
use rustix::process::{Signal, kill_process};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::path::Path;

pub const TESTS: &[Test] = &[("a_suspended_vm_costs_no_process_and_goes_on_as_itself", suspend)];

/// Where the web server's port is published.
const PORT: u16 = 7481;

/// How often it is suspended.
const CYCLES: usize = 3;

fn serves() -> Option<()> {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, PORT)).ok()?;
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n").ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    answer.contains(" 200 OK").then_some(())
}

/// What stays as it is as long as the guest was not booted anew.
fn marks(home: &Home, docker: &Docker) -> Vec<String> {
    let inside = |command: &str| home.run(&["exec", "vm", "--", "sh", "-c", command]).ok();
    vec![
        inside("cat /etc/machine-id /sys/class/net/eth0/address /proc/sys/kernel/random/boot_id"),
        docker.ok(&["info", "-f", "{{.ID}} {{.Name}}"]),
        docker.ok(&["ps", "--no-trunc", "--format", "{{.ID}} {{.Names}} {{.Ports}}"]),
    ]
}

fn state(home: &Home) -> String {
    let report: serde_json::Value = serde_json::from_str(&home.run(&["inspect", "vm"]).ok()).expect("JSON");
    report["state"].as_str().expect("a state").to_owned()
}

fn suspend() {
    let home = Home::new();
    let shared = tempfile::tempdir().expect("a folder");
    let path = shared.path().to_str().expect("text");
    let docker = counting(&home, "vm", &["--mount", path]);
    // It keeps a file of the host's open.
    let lines = shared.path().join("lines");
    docker.ok(&[
        "run",
        "-d",
        "-v",
        &format!("{path}:/shared"),
        "busybox",
        "sh",
        "-c",
        "exec >> /shared/lines; while :; do echo line; sleep 0.1; done",
    ]);
    let written = || std::fs::metadata(&lines).map_or(0, |metadata| metadata.len());
    until("line", || (written() > 0).then_some(()));
    docker.ok(&[
        "run",
        "-d",
        "--name",
        "web",
        "-p",
        &format!("{PORT}:80"),
        "busybox",
        "sh",
        "-c",
        "mkdir /www && echo hello > /www/index.html && exec httpd -f -h /www",
    ]);
    until("web server", serves);
    let before = marks(&home, &docker);
    let folder = home.vm_file("vm", "suspended");
    let mut counted = 0;
    for _ in 0..CYCLES {
        let events = docker.start(&["events"], b"");
        counted = goes_on(&docker).max(counted);
        home.run(&["suspend", "vm"]).ok();
        assert_eq!(state(&home), "suspended");
        assert_eq!(processes_of(home.path().to_str().expect("text")), []);
        assert!(!Path::new(&docker.socket()).exists());
        // Its clients are not left hanging.
        events.wait();
        home.run(&["suspend", "vm"]).ok();
        let refused = home.run(&["start", "-m", "1g", "vm"]).fails_with(2);
        assert!(refused.contains("is suspended"), "{refused}");
        let exec = home.run(&["exec", "vm", "--", "true"]).fails_with(3);
        assert!(exec.contains("is suspended"), "{exec}");
        home.run(&["stop", "vm"]).ok();
        home.run(&["resume", "--no-context", "vm"]).ok();
        assert!(!folder.exists());
        let now = number(&docker);
        assert!(now >= counted, "{now} after {counted}");
        goes_on(&docker);
        until("web server that goes on", serves);
        let length = written();
        until("line in the file of the host", || {
            (written() > length).then_some(())
        });
        assert_eq!(marks(&home, &docker), before);
    }
    // Its network is made when it is wanted.
    network::assert_reaches_host(&home, "vm");
    assert!(home.status("vm")["running"]["network_pid"].is_u64());
    let refused = home.run(&["resume", "nobody"]).fails_with(4);
    assert!(refused.contains("no VM named nobody"), "{refused}");

    // Killed while it saves: it ends as by a power cut, and there is nothing to go on from.
    let pid = home.pid("vm", "supervisor_pid");
    let suspend = home.start(&["suspend", "vm"], b"");
    until("beginning", || {
        home.vm_file("vm", ".suspending/memory").exists().then_some(())
    });
    kill_process(pid, Signal::KILL).expect("kill");
    let failed = suspend.wait().fails_with(1);
    assert!(failed.contains("cannot suspend VM vm"), "{failed}");
    assert!(!folder.exists());
    home.run(&["start", "--no-context", "vm"]).ok();
    docker.ok(&["start", "counter"]);
    counted = goes_on(&docker).max(1);
    // What is not synced may be lost then, as in any power cut.
    docker.ok(&["exec", "counter", "sh", "-c", "cp /v/n /v/kept && sync"]);

    // What it would go on from is damaged: that is told, and its disk is whole.
    home.run(&["suspend", "vm"]).ok();
    let memory = std::fs::File::options()
        .write(true)
        .open(folder.join("memory"))
        .expect("open");
    memory.set_len(4096).expect("shorten");
    let damaged = home.run(&["start", "vm"]).fails_with(1);
    assert!(
        damaged.contains("cannot go on") && damaged.contains("--boot"),
        "{damaged}"
    );
    assert_eq!(state(&home), "suspended");
    home.run(&["start", "--boot", "--no-context", "vm"]).ok();
    assert!(!folder.exists());
    let kept: u64 = docker
        .ok(&["run", "--rm", "-v", "numbers:/v", "busybox", "cat", "/v/kept"])
        .parse()
        .expect("a number");
    assert!(kept > 0, "{kept} after {counted}");
}
