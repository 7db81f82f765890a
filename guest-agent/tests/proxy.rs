//! The proxy as dockerd runs it: its words, a pipe as descriptor 3, and a socket as descriptor 4 with Docker 28 and later.
//! There is no supervisor here to publish anything, so each case ends before one would be asked.

use command_fds::{CommandFdExt, FdMapping};
use std::io::Read;
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::Command;

/// Runs the proxy, with `socket` as descriptor 4. Returns its exit status and what dockerd would read.
fn run(words: &str, socket: Option<OwnedFd>) -> (Option<i32>, String) {
    let (mut reader, writer) = std::io::pipe().unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_lighter-agent"));
    command
        .arg0("/usr/bin/docker-proxy")
        .args(words.split_ascii_whitespace());
    let mut mappings = vec![FdMapping {
        parent_fd: writer.into(),
        child_fd: 3,
    }];
    mappings.extend(socket.map(|parent_fd| FdMapping {
        parent_fd,
        child_fd: 4,
    }));
    command.fd_mappings(mappings).unwrap();
    let status = command.status().unwrap();
    // The parent's end of the pipe is the command's.
    drop(command);
    let mut said = String::new();
    reader.read_to_string(&mut said).unwrap();
    (status.code(), said)
}

fn words(transport: &str, port: u16) -> String {
    format!(
        "-proto {transport} -host-ip 127.0.0.1 -host-port {port} -container-ip 127.0.0.1 -container-port 9"
    )
}

#[test]
fn a_port_that_is_taken_in_the_guest_is_told_to_dockerd() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let (code, said) = run(&words("tcp", port), None);
    assert_eq!(code, Some(1));
    let expected = format!("1\ncannot listen on 127.0.0.1:{port}/tcp in the VM: Address already in use");
    assert!(said.starts_with(&expected), "{said}");
}

#[test]
fn a_socket_of_dockerd_s_is_used_and_no_other_made() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    drop(listener);
    let words = words("tcp", port) + " -use-listen-fd";
    // It could bind the port itself, but must not: what was handed over is no socket.
    let file = std::fs::File::open("/dev/null").unwrap();
    for (socket, error) in [
        (Some(file.into()), "Operation not permitted"),
        (None, "Bad file descriptor"),
    ] {
        let (code, said) = run(&words, socket);
        assert_eq!(code, Some(1));
        let expected = format!("1\ncannot listen on 127.0.0.1:{port}/tcp in the VM: {error}");
        assert!(said.starts_with(&expected), "{said}");
    }
}

#[test]
fn words_that_are_not_understood_are_told_to_dockerd() {
    let (code, said) = run(&words("sctp", 9), None);
    assert_eq!(code, Some(1));
    assert_eq!(
        said,
        "1\ncannot understand dockerd: sctp ports cannot be published, only tcp and udp ones can"
    );
}
