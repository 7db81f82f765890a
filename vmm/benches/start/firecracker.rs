//! Firecracker, as a peer: boots the same guest, or goes on from a snapshot of it.

use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

/// What a guest writes to the first serial port as soon as it runs: no byte of any text.
pub const FIRST_BYTE: u8 = 0xff;

/// How long from the process's start, milliseconds.
pub struct Took {
    /// Until the guest ran.
    pub entered: f64,
    /// Until the process had ended.
    pub ended: f64,
}

/// A folder with the guest's kernel, a configuration that boots it, and perhaps a snapshot.
pub struct Firecracker<'a> {
    program: &'a Path,
    folder: tempfile::TempDir,
}

impl<'a> Firecracker<'a> {
    /// For a guest of `kernel`, a file's bytes.
    pub fn new(program: &'a Path, kernel: &[u8], memory_mib: u64) -> Self {
        let folder = tempfile::tempdir().expect("temporary folder");
        let file = folder.path().join("kernel");
        std::fs::write(&file, kernel).expect("write the kernel");
        let text = serde_json::json!({
            "boot-source": { "kernel_image_path": file, "boot_args": "quiet" },
            "drives": [],
            "machine-config": { "vcpu_count": 1, "mem_size_mib": memory_mib },
        });
        std::fs::write(folder.path().join("config.json"), text.to_string()).expect("write the configuration");
        Self { program, folder }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn start(&self, arguments: &[&str]) -> Child {
        Command::new(self.program)
            .args(arguments)
            .current_dir(self.folder.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("run firecracker")
    }

    /// Boots the guest, which writes [`FIRST_BYTE`] and ends it.
    pub fn boot(&self) -> Took {
        let began = Instant::now();
        let child = self.start(&["--no-api", "--config-file", "config.json"]);
        took(child, began)
    }

    /// Boots the guest, which waits, saves it, and sets the byte at `address` of what was saved.
    pub fn save(&self, address: u64) {
        let mut child = self.start(&["--api-sock", "socket", "--config-file", "config.json"]);
        // It answers when the guest runs.
        self.request("PATCH", "/vm", &serde_json::json!({ "state": "Paused" }));
        let what = serde_json::json!({
            "snapshot_type": "Full", "snapshot_path": "state", "mem_file_path": "memory",
        });
        self.request("PUT", "/snapshot/create", &what);
        child.kill().expect("kill firecracker");
        child.wait().expect("wait for firecracker");
        std::fs::remove_file(self.file("socket")).expect("remove its socket");
        set_byte(&self.file("memory"), address);
    }

    /// Goes on with the saved guest, which writes [`FIRST_BYTE`] and ends it.
    pub fn restore(&self) -> Took {
        let what = serde_json::json!({
            "snapshot_path": "state",
            "mem_backend": { "backend_path": "memory", "backend_type": "File" },
            "resume_vm": true,
        });
        let began = Instant::now();
        let child = self.start(&["--api-sock", "socket"]);
        self.request("PUT", "/snapshot/load", &what);
        let took = took(child, began);
        std::fs::remove_file(self.file("socket")).expect("remove its socket");
        took
    }

    /// Sends a request as soon as the socket is there.
    fn request(&self, method: &str, path: &str, body: &serde_json::Value) {
        let body = body.to_string();
        let request = format!(
            "{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n\
             Content-Length: {}\r\n\r\n{body}",
            body.len()
        );
        let mut stream = loop {
            match UnixStream::connect(self.file("socket")) {
                Ok(stream) => break stream,
                Err(_) => std::thread::sleep(Duration::from_micros(50)),
            }
        };
        stream.write_all(request.as_bytes()).expect("send a request");
        let mut answer = [0; 256];
        let length = stream.read(&mut answer).expect("read an answer");
        let answer = String::from_utf8_lossy(&answer[..length]).into_owned();
        // One whose guest ends at once may have no time to answer.
        assert!(answer.is_empty() || answer.contains(" 204 "), "{path}: {answer}");
    }
}

fn took(mut child: Child, began: Instant) -> Took {
    wait_for_first_byte(&mut child.stdout.take().expect("its output"));
    let entered = ms(began);
    child.wait().expect("wait for firecracker");
    Took {
        entered,
        ended: ms(began),
    }
}

/// Its own messages come before.
fn wait_for_first_byte(output: &mut ChildStdout) {
    let mut bytes = [0; 4096];
    loop {
        let read = output.read(&mut bytes).expect("read its output");
        assert!(read > 0, "firecracker ended before its guest ran");
        if bytes[..read].contains(&FIRST_BYTE) {
            return;
        }
    }
}

/// Sets the byte at `address` of guest memory that was saved to `file`.
pub fn set_byte(file: &Path, address: u64) {
    let file = std::fs::File::options()
        .write(true)
        .open(file)
        .expect("open memory");
    file.write_all_at(&[1], address).expect("change memory");
}

/// Milliseconds since `began`.
pub fn ms(began: Instant) -> f64 {
    began.elapsed().as_secs_f64() * 1e3
}
