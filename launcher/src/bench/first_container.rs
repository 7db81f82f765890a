//! The first container of an engine: what `docker run` of a static program does, by the Engine's API.

use super::engine::Engine;
use crate::error::Result;
use lighter_measure::tar::archive;
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::path::Path;
use std::time::Instant;

/// The name of its image.
const IMAGE: &str = "lighter-bench-hello";

/// What the program writes.
const HELLO: &[u8] = b"hello\n";

/// When it got where, CLOCK_MONOTONIC, nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Container {
    /// Its image is in the engine.
    pub image_loaded_ns: u64,
    /// Its first byte is here.
    pub first_byte_ns: u64,
}

/// Runs a container of a new image and waits for what it writes.
///
/// # Errors
/// When the engine refuses, or the time is over.
pub fn run(socket: &Path, deadline: Instant) -> Result<Container> {
    let engine = Engine { socket, deadline };
    let image = archive("hello", "755", &program());
    let started = engine.run(IMAGE, &image, json!({ "Cmd": ["/hello"] }), HELLO)?;
    Ok(Container {
        image_loaded_ns: started.image_loaded_ns,
        first_byte_ns: started.first_byte_ns,
    })
}

/// A static x86-64 program that writes [`HELLO`] and ends: an ELF header, one segment, and twelve instructions.
fn program() -> Vec<u8> {
    const BASE: u64 = 0x40_0000;
    const HEADERS: u64 = 64 + 56;
    const CODE: [u8; 24] = [
        0x6a,
        0x01,
        0x58, // push 1; pop rax: write
        0x89,
        0xc7, // mov edi, eax: standard output
        0x48,
        0x8d,
        0x35,
        0x0c,
        0,
        0,
        0, // lea rsi, [rip + 12]: behind the code
        0x6a,
        HELLO.len() as u8,
        0x5a, // push, pop rdx
        0x0f,
        0x05, // syscall
        0x6a,
        0x3c,
        0x58, // push 60; pop rax: exit
        0x31,
        0xff, // xor edi, edi
        0x0f,
        0x05, // syscall
    ];
    let length = HEADERS + (CODE.len() + HELLO.len()) as u64;
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    let halves = |values: &[u16]| {
        values
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect::<Vec<_>>()
    };
    // ET_EXEC, EM_X86_64.
    file.extend(halves(&[2, 62]));
    file.extend(1_u32.to_le_bytes());
    for value in [BASE + HEADERS, 64, 0] {
        file.extend(value.to_le_bytes());
    }
    file.extend(0_u32.to_le_bytes());
    file.extend(halves(&[64, 56, 1, 64, 0, 0]));
    // PT_LOAD, readable and executable.
    file.extend(1_u32.to_le_bytes());
    file.extend(5_u32.to_le_bytes());
    for value in [0, BASE, BASE, length, length, 0x1000] {
        file.extend(value.to_le_bytes());
    }
    file.extend(CODE);
    file.extend(HELLO);
    file
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader, Read, Write};
    use std::os::unix::net::UnixListener;
    use std::process::{Command, Stdio};
    use std::time::Duration;

    #[test]
    fn the_image_has_a_program_that_runs() {
        let folder = tempfile::tempdir().unwrap();
        let mut tar = Command::new("tar")
            .args(["-x", "-C"])
            .arg(folder.path())
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        tar.stdin
            .take()
            .unwrap()
            .write_all(&archive("hello", "755", &program()))
            .unwrap();
        assert!(tar.wait().unwrap().success());
        let output = Command::new(folder.path().join("hello")).output().unwrap();
        assert!(output.status.success());
        assert_eq!(output.stdout, HELLO);
    }

    /// Answers each connection with the next text, and returns the first lines of what was asked.
    fn engine(answers: &'static [&'static str]) -> (tempfile::TempDir, std::thread::JoinHandle<Vec<String>>) {
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(folder.path().join("docker.sock")).unwrap();
        let serve = move || {
            let mut kept = vec![];
            let answer = |answer: &&str| {
                let (stream, _) = listener.accept().unwrap();
                let mut reader = BufReader::new(stream.try_clone().unwrap());
                let mut first = String::new();
                reader.read_line(&mut first).unwrap();
                let mut length = 0;
                loop {
                    let mut line = String::new();
                    reader.read_line(&mut line).unwrap();
                    if let Some(value) = line.strip_prefix("Content-Length: ") {
                        length = value.trim().parse().unwrap();
                    }
                    if line == "\r\n" {
                        break;
                    }
                }
                reader.read_exact(&mut vec![0; length]).unwrap();
                (&stream).write_all(answer.as_bytes()).unwrap();
                // An attached stream stays open.
                if answer.contains(" 101 ") {
                    kept.push(stream);
                }
                first
            };
            answers.iter().map(answer).collect()
        };
        (folder, std::thread::spawn(serve))
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(60)
    }

    #[test]
    fn a_container_is_created_attached_to_and_started() {
        let (folder, served) = engine(&[
            "HTTP/1.1 200 OK\r\n\r\n{\"status\":\"sha256:0\"}\n",
            "HTTP/1.1 201 Created\r\n\r\n{\"Id\":\"abc123\",\"Warnings\":[]}\n",
            "HTTP/1.1 101 UPGRADED\r\n\r\n\u{1}\0\0\0\0\0\0\u{6}hello\n",
            "HTTP/1.1 204 No Content\r\n\r\n",
        ]);
        let container = run(&folder.path().join("docker.sock"), soon()).unwrap();
        assert!(container.image_loaded_ns < container.first_byte_ns);
        let asked = served.join().unwrap();
        assert!(
            asked[2].starts_with("POST /containers/abc123/attach?"),
            "{asked:?}"
        );
        assert!(
            asked[3].starts_with("POST /containers/abc123/start "),
            "{asked:?}"
        );
    }

    #[test]
    fn what_the_engine_refuses_is_told() {
        let (folder, _) = engine(&["HTTP/1.1 200 OK\r\n\r\n{\"status\":\"x\"}\n{\"error\":\"no space\"}\n"]);
        let error = run(&folder.path().join("docker.sock"), soon()).unwrap_err();
        assert!(error.message.contains("no space"), "{error}");
        let (folder, _) = engine(&[
            "HTTP/1.1 200 OK\r\n\r\n{}\n",
            "HTTP/1.1 409 Conflict\r\n\r\n{\"message\":\"no such luck\"}\n",
        ]);
        let error = run(&folder.path().join("docker.sock"), soon()).unwrap_err();
        assert!(
            error.message.contains("409") && error.message.contains("no such luck"),
            "{error}"
        );
    }
}
