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
    /// Its jailer, that is to start it.
    jailer: Option<&'a Path>,
    folder: tempfile::TempDir,
}

/// One that runs.
struct Started {
    began: Instant,
    child: Child,
    /// Where it has its files.
    folder: PathBuf,
}

/// The name that its jailer has for it.
const ID: &str = "bench";

/// What it reads of its folder.
const FILES: [&str; 4] = ["kernel", "config.json", "state", "memory"];

impl<'a> Firecracker<'a> {
    /// For a guest of `kernel`, a file's bytes.
    pub fn new(program: &'a Path, jailer: Option<&'a Path>, kernel: &[u8], memory_mib: u64) -> Self {
        let folder = tempfile::tempdir().expect("temporary folder");
        std::fs::write(folder.path().join("kernel"), kernel).expect("write the kernel");
        let text = serde_json::json!({
            "boot-source": { "kernel_image_path": "kernel", "boot_args": "quiet" },
            "drives": [],
            "machine-config": { "vcpu_count": 1, "mem_size_mib": memory_mib },
        });
        std::fs::write(folder.path().join("config.json"), text.to_string()).expect("write the configuration");
        Self {
            program,
            jailer,
            folder,
        }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn start(&self, arguments: &[&str]) -> Started {
        let (mut command, folder) = match self.jailer {
            None => (Command::new(self.program), self.folder.path().to_owned()),
            Some(jailer) => self.jail(jailer),
        };
        command
            .args(arguments)
            .current_dir(self.folder.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        let began = Instant::now();
        let child = command.spawn().expect("run firecracker");
        Started { began, child, folder }
    }

    /// A new jail, with all files, and what starts it there.
    fn jail(&self, jailer: &Path) -> (Command, PathBuf) {
        let base = self.file("jails");
        if base.exists() {
            std::fs::remove_dir_all(&base).expect("remove the jail before");
        }
        let name = self.program.file_name().expect("a program's name");
        let root = base.join(name).join(ID).join("root");
        std::fs::create_dir_all(&root).expect("make the jail");
        for file in FILES.iter().filter(|file| self.file(file).exists()) {
            std::fs::hard_link(self.file(file), root.join(file)).expect("link a file into the jail");
        }
        let mut command = Command::new(jailer);
        // Nobody.
        command.args(["--id", ID, "--uid", "65534", "--gid", "65534"]);
        command.arg("--exec-file").arg(self.program);
        command.arg("--chroot-base-dir").arg(base).arg("--");
        (command, root)
    }

    /// Boots the guest, which writes [`FIRST_BYTE`] and ends it.
    pub fn boot(&self) -> Took {
        self.start(&["--no-api", "--config-file", "config.json"]).took()
    }

    /// Boots the guest, which waits, saves it, and sets the byte at `address` of what was saved.
    pub fn save(&self, address: u64) {
        let mut started = self.start(&["--api-sock", "socket", "--config-file", "config.json"]);
        // It answers when the guest runs.
        started.request("PATCH", "/vm", &serde_json::json!({ "state": "Paused" }));
        let what = serde_json::json!({
            "snapshot_type": "Full", "snapshot_path": "state", "mem_file_path": "memory",
        });
        started.request("PUT", "/snapshot/create", &what);
        started.child.kill().expect("kill firecracker");
        started.child.wait().expect("wait for firecracker");
        for file in ["state", "memory"] {
            let made = started.folder.join(file);
            if made != self.file(file) {
                std::fs::rename(made, self.file(file)).expect("take what was saved out of the jail");
            }
        }
        std::fs::remove_file(started.folder.join("socket")).expect("remove its socket");
        set_byte(&self.file("memory"), address);
    }

    /// Goes on with the saved guest, which writes [`FIRST_BYTE`] and ends it.
    pub fn restore(&self) -> Took {
        let what = serde_json::json!({
            "snapshot_path": "state",
            "mem_backend": { "backend_path": "memory", "backend_type": "File" },
            "resume_vm": true,
        });
        let started = self.start(&["--api-sock", "socket"]);
        started.request("PUT", "/snapshot/load", &what);
        let socket = started.folder.join("socket");
        let took = started.took();
        std::fs::remove_file(socket).expect("remove its socket");
        took
    }
}

impl Started {
    /// Sends a request as soon as the socket is there.
    fn request(&self, method: &str, path: &str, body: &serde_json::Value) {
        let body = body.to_string();
        let request = format!(
            "{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n\
             Content-Length: {}\r\n\r\n{body}",
            body.len()
        );
        let mut stream = loop {
            match UnixStream::connect(self.folder.join("socket")) {
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

    /// Waits for what the guest does first, and for the end.
    fn took(mut self) -> Took {
        wait_for_first_byte(&mut self.child.stdout.take().expect("its output"));
        let entered = ms(self.began);
        self.child.wait().expect("wait for firecracker");
        Took {
            entered,
            ended: ms(self.began),
        }
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
