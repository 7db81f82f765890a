//! Streams between a client and a container: their bytes, their order and their ends.

use super::Test;
use super::world::{Docker, PATIENCE, shared, until};
use std::io::{BufRead, BufReader, Write};
use std::process::Stdio;
use std::sync::mpsc;

pub const TESTS: &[Test] = &[
    (
        "the_end_of_input_reaches_the_container_and_the_answer_comes_back",
        end_of_input,
    ),
    ("both_outputs_come_back_apart_and_whole", both_outputs),
    ("a_log_is_followed_while_it_grows_and_until_its_end", follow_log),
    ("attach_talks_to_a_running_container", attach),
    ("events_arrive_while_they_happen", events),
];

fn end_of_input() {
    let docker = shared();
    let echo = docker.start(&["run", "-i", "--rm", "busybox", "cat"], b"hi\n");
    assert_eq!(echo.wait().ok(), "hi");
    // The answer is sent only after the end of the input, and is longer than any buffer on the way.
    let script = "wc -c; seq 1 100000";
    let count = docker.start(
        &["run", "-i", "--rm", "busybox", "sh", "-c", script],
        &vec![b'x'; 3 << 20],
    );
    let output = count.wait().ok();
    assert!(
        output.starts_with("3145728\n1\n") && output.ends_with("\n100000"),
        "{} bytes",
        output.len()
    );
    docker.ok(&["run", "-d", "--name", "ends", "busybox", "sleep", "1000"]);
    assert_eq!(
        docker
            .start(&["exec", "-i", "ends", "sort"], b"b\na\n")
            .wait()
            .ok(),
        "a\nb"
    );
    docker.ok(&["rm", "-f", "ends"]);
}

fn both_outputs() {
    let docker = shared();
    let ran = docker.run(&[
        "run",
        "--rm",
        "busybox",
        "sh",
        "-c",
        "seq 1 20000; seq 1 20000 >&2; exit 5",
    ]);
    assert_eq!(ran.code(), 5);
    for text in [ran.stdout, ran.stderr] {
        assert!(text.starts_with("1\n2\n") && text.ends_with("\n20000\n") && text.lines().count() == 20_000);
    }
}

/// A client whose output is read line by line; an empty one is its end.
fn lines(docker: &Docker, arguments: &[&str]) -> (std::process::Child, Lines) {
    let mut command = docker.command(arguments);
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("start docker");
    let mut output = BufReader::new(child.stdout.take().expect("piped"));
    let (sender, read) = mpsc::channel();
    std::thread::spawn(move || {
        loop {
            let mut line = String::new();
            output.read_line(&mut line).expect("read");
            let end = line.is_empty();
            if sender.send(line).is_err() || end {
                break;
            }
        }
    });
    (child, Lines(read))
}

struct Lines(mpsc::Receiver<String>);

impl Lines {
    fn next(&self) -> String {
        self.0.recv_timeout(PATIENCE).expect("a line, or the end")
    }
}

fn follow_log() {
    let docker = shared();
    let script = "n=0; while [ ! -e /tmp/stop ]; do n=$((n+1)); echo line $n; sleep 0.2; done";
    docker.ok(&["run", "-d", "--name", "chatty", "busybox", "sh", "-c", script]);
    let (mut follower, lines) = lines(&docker, &["logs", "-f", "chatty"]);
    for number in 1..=3 {
        assert_eq!(lines.next(), format!("line {number}\n"));
    }
    docker.ok(&["exec", "chatty", "touch", "/tmp/stop"]);
    while !lines.next().is_empty() {}
    assert!(follower.wait().expect("wait").success());
    docker.ok(&["rm", "chatty"]);
}

fn attach() {
    let docker = shared();
    docker.ok(&[
        "run",
        "-di",
        "--name",
        "parrot",
        "busybox",
        "sh",
        "-c",
        "while read word; do echo $word $word; done",
    ]);
    let (mut client, lines) = lines(&docker, &["attach", "parrot"]);
    let mut input = client.stdin.take().expect("piped");
    for word in ["ahoy", "matey"] {
        writeln!(input, "{word}").expect("write");
        assert_eq!(lines.next(), format!("{word} {word}\n"));
    }
    // The container was not started for this client, and does not end with it.
    drop(input);
    assert_eq!(
        docker.ok(&["inspect", "--format", "{{.State.Running}}", "parrot"]),
        "true"
    );
    docker.ok(&["kill", "parrot"]);
    assert_eq!(lines.next(), "");
    assert_eq!(client.wait().expect("wait").code(), Some(137));
    docker.ok(&["rm", "parrot"]);
}

fn events() {
    let docker = shared();
    let arguments = [
        "events",
        "--filter",
        "type=volume",
        "--format",
        "{{.Action}} {{.Actor.ID}}",
    ];
    let (mut client, lines) = lines(&docker, &arguments);
    // Nothing tells when the engine has begun to listen for the client: there are events until one arrives, whichever it is.
    until("event", || {
        docker.ok(&["volume", "create", "early"]);
        docker.ok(&["volume", "rm", "early"]);
        lines.0.try_recv().ok()
    });
    docker.ok(&["volume", "create", "event"]);
    docker.ok(&["volume", "rm", "event"]);
    let mut later = std::iter::repeat_with(|| lines.next()).filter(|line| !line.ends_with(" early\n"));
    assert_eq!(later.next().as_deref(), Some("create event\n"));
    assert_eq!(later.next().as_deref(), Some("destroy event\n"));
    client.kill().expect("end the client");
    client.wait().expect("wait");
}
