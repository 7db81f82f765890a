//! Firecracker as a peer that goes on from a snapshot: it boots the same kernel and image until the engine answers over vsock, is saved by
//! its own API, and goes on from that in a new process, again and again, to the engine's answer.
//!
//! That is less than a restore of Lighter's does: the engine's socket is not served, and the guest keeps the identity that it had.

use super::peer::{Guest, Peer, Running, until_ready, version};
use super::peer_settings::{VSOCK, firecracker_config};
use super::stats::{Percentiles, Ratio};
use super::system::answer;
use super::warm;
use crate::clock::monotonic_ns;
use crate::error::{Code, Context, Error, Result};
use crate::logs::printable;
use crate::snapshots::copy::copy;
use serde::Serialize;
use serde_json::{Value, json};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tokio::runtime::Runtime;

/// Files in the folder that it runs in.
const API: &str = "api";
const DISK: &str = "disk";
const SAVED_DISK: &str = "disk.saved";
const CONFIG: &str = "config";
const STATE: &str = "state";
const MEMORY: &str = "memory";

/// Between two looks whether its API is there, which it does not tell.
const BETWEEN_LOOKS: Duration = Duration::from_micros(50);

/// Between two looks whether somebody listens in its guest: a connection is refused while that has not noticed yet that it was saved.
const BETWEEN_TRIES: Duration = Duration::from_millis(1);

/// The most that is read of an answer of its API, bytes.
const MAX_ANSWER: usize = 4 << 10;

/// A guest that Firecracker has saved.
#[derive(Debug)]
pub struct SavedPeer {
    version: String,
    program: PathBuf,
    folder: TempDir,
    /// What waits for the engine's answer; made before anything is timed.
    runtime: Runtime,
}

/// What was measured of it.
#[derive(Debug, Serialize)]
pub struct PeerFigures {
    /// Its name and version.
    what: String,
    /// From the start of its process to the engine's answer.
    answer_ms: Percentiles,
    /// How many times that is of Lighter's restore beside it.
    slower: Ratio,
}

impl PeerFigures {
    /// Of pairs of times: the peer's, and Lighter's beside each of them.
    ///
    /// # Errors
    /// When nothing was measured.
    pub fn new(peer: &SavedPeer, peer_ms: &[f64], lighter_ms: &[f64]) -> Result<Self> {
        let none = || Error::failure(format!("nothing was measured of {}", peer.version));
        Ok(Self {
            what: peer.version.clone(),
            answer_ms: Percentiles::of(peer_ms.iter().copied()).ok_or_else(none)?,
            slower: Ratio::of(peer_ms, lighter_ms).ok_or_else(none)?,
        })
    }

    /// For people.
    pub fn text(&self) -> String {
        format!(
            "{}, from its start with a snapshot of the same kernel and image to the engine's answer on its vsock: p50 {:.0} ms, p99 {:.0} ms; \
             {:.2} times Lighter's restore beside it (middle half {:.2} to {:.2})\n",
            self.what,
            self.answer_ms.p50,
            self.answer_ms.p99,
            self.slower.median,
            self.slower.low,
            self.slower.high
        )
    }
}

fn runtime() -> io::Result<Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()
}

impl SavedPeer {
    /// Boots `guest` in `peer` until its engine answers, and saves it, in a new folder in `parent`.
    ///
    /// # Errors
    /// When the peer is not Firecracker, its guest does not boot by `deadline`, or it cannot be saved.
    pub fn new(peer: &Peer, guest: &Guest, parent: &Path, deadline: Instant) -> Result<Self> {
        if !peer.can_be_saved() {
            let text = format!("snapshots of {} are not measured", peer.name());
            return Err(Error::new(Code::Usage, text).hint("compare with Firecracker: --peer firecracker"));
        }
        let program = peer.find()?;
        let made = || format!("cannot make a folder in {}", parent.display());
        let runtime = runtime().context(|| "cannot wait for an engine in Firecracker".into())?;
        let saved = Self {
            version: version(&program)?,
            program,
            folder: tempfile::tempdir_in(parent).context(made)?,
            runtime,
        };
        saved.save(guest, deadline)?;
        Ok(saved)
    }

    fn save(&self, guest: &Guest, deadline: Instant) -> Result<()> {
        let config = firecracker_config(guest, DISK);
        let failed = || {
            format!(
                "cannot write what Firecracker needs to {}",
                self.folder.path().display()
            )
        };
        fs::write(self.file(CONFIG), config.to_string()).context(failed)?;
        File::create(self.file(DISK))
            .and_then(|disk| disk.set_len(guest.disk.0))
            .context(failed)?;
        let (mut output, writer) = io::pipe().context(failed)?;
        let errors = writer.try_clone().context(failed)?;
        let mut running = self.start(&["--config-file", CONFIG], writer.into(), errors.into())?;
        until_ready("Firecracker", &mut output, &mut running, deadline)?;
        self.wait_for_answer(deadline)?;
        self.request("PATCH", "/vm", &json!({ "state": "Paused" }), deadline)?;
        let files = json!({ "snapshot_type": "Full", "snapshot_path": STATE, "mem_file_path": MEMORY });
        self.request("PUT", "/snapshot/create", &files, deadline)?;
        drop(running);
        fs::rename(self.file(DISK), self.file(SAVED_DISK)).context(failed)
    }

    /// Goes on from what was saved, with a copy of its disk; returns how long it took from the start of the process to the engine's
    /// answer, milliseconds. Call it from the main thread.
    ///
    /// # Errors
    /// When the engine does not answer by `deadline`.
    pub fn restore(&self, deadline: Instant) -> Result<f64> {
        let failed = || format!("cannot copy a disk in {}", self.folder.path().display());
        for socket in [API, VSOCK] {
            match fs::remove_file(self.file(socket)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error).context(failed),
                _ => {}
            }
        }
        let disk = File::create(self.file(DISK)).context(failed)?;
        File::open(self.file(SAVED_DISK))
            .and_then(|saved| copy(&saved, &disk))
            .context(failed)?;
        let what = json!({
            "snapshot_path": STATE,
            "mem_backend": { "backend_path": MEMORY, "backend_type": "File" },
            "resume_vm": true,
        });
        let began_ns = warm::begin();
        let _running = self.start(&[], Stdio::null(), Stdio::null())?;
        self.request("PUT", "/snapshot/load", &what, deadline)?;
        self.wait_for_answer(deadline)?;
        Ok(monotonic_ns().saturating_sub(began_ns) as f64 / 1e6)
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn start(&self, arguments: &[&str], output: Stdio, errors: Stdio) -> Result<Running> {
        let mut command = Command::new(&self.program);
        command
            .args(["--api-sock", API])
            .args(arguments)
            .current_dir(self.folder.path())
            .stdin(Stdio::null())
            .stdout(output)
            .stderr(errors);
        let failed = || format!("cannot start {}", self.program.display());
        Running::start(&mut command, None).context(failed)
    }

    fn wait_for_answer(&self, deadline: Instant) -> Result<()> {
        let vsock = self.file(VSOCK);
        let asking = async { tokio::time::timeout_at(deadline.into(), answer(&vsock, BETWEEN_TRIES)).await };
        let late = || Error::new(Code::Timeout, "the engine in Firecracker does not answer in time");
        self.runtime.block_on(asking).unwrap_or_else(|_| Err(late()))
    }

    /// Asks its API, as soon as there is one.
    fn request(&self, method: &str, path: &str, body: &Value, deadline: Instant) -> Result<()> {
        let what = || format!("cannot ask Firecracker for {method} {path}");
        let body = body.to_string();
        let request = format!(
            "{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        let mut stream = loop {
            match UnixStream::connect(self.file(API)) {
                Ok(stream) => break stream,
                Err(error) if Instant::now() >= deadline => return Err(error).context(what),
                Err(_) => std::thread::sleep(BETWEEN_LOOKS),
            }
        };
        let left = deadline.saturating_duration_since(Instant::now());
        let mut exchange = || {
            stream.set_read_timeout(Some(left.max(Duration::from_millis(1))))?;
            stream.write_all(request.as_bytes())?;
            let mut answer = [0; MAX_ANSWER];
            let length = stream.read(&mut answer)?;
            Ok::<_, io::Error>(String::from_utf8_lossy(&answer[..length]).into_owned())
        };
        let answer = exchange().context(what)?;
        match answer.split(' ').nth(1) {
            Some("204") => Ok(()),
            _ => Err(Error::failure(format!(
                "{}: it said {:?}",
                what(),
                printable(answer.trim())
            ))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::peer::tests::guest;

    /// A script in place of Firecracker.
    fn saved(script: &str) -> Result<SavedPeer> {
        let folder = tempfile::tempdir().unwrap();
        let program = folder.path().join("firecracker");
        // Written by another process: what another test starts meanwhile would have it open for writing, and it could not be run.
        let write = r#"printf '#!/bin/sh\n%s\n' "$1" > "$0" && chmod +x "$0""#;
        let written = Command::new("sh")
            .arg("-c")
            .arg(write)
            .arg(&program)
            .arg(script)
            .status();
        assert!(written.unwrap().success());
        let peer: Peer = format!("firecracker={}", program.display()).parse().unwrap();
        let deadline = Instant::now() + Duration::from_secs(60);
        let saved = SavedPeer::new(&peer, &guest(), folder.path(), deadline);
        // Nothing but the program is left in the folder of one that did not work.
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
        saved
    }

    #[test]
    fn a_guest_that_does_not_boot_is_told_and_leaves_nothing() {
        let script = "[ $1 = --version ] && echo Firecracker v1 && exit\n\
                      [ -e config ] && [ -e disk ] && grep -q uds_path config && echo no kernel && exit 3";
        let error = saved(script).unwrap_err();
        let told = "Firecracker ended before the guest's engine was ready (exit status: 3)";
        assert_eq!(
            (error.message.as_str(), error.lines),
            (told, vec!["no kernel".to_owned()])
        );
        assert!(saved("exit 1").unwrap_err().message.contains("--version"));
    }

    #[test]
    fn other_monitors_are_refused() {
        let peer: Peer = "qemu=/bin/true".parse().unwrap();
        let error = SavedPeer::new(&peer, &guest(), Path::new("/nonexistent"), Instant::now()).unwrap_err();
        assert_eq!(error.message, "snapshots of qemu are not measured");
    }

    #[test]
    fn it_is_compared_with_the_restore_beside_it() {
        let peer = SavedPeer {
            version: "Firecracker v1".into(),
            program: PathBuf::new(),
            folder: tempfile::tempdir().unwrap(),
            runtime: runtime().unwrap(),
        };
        let figures = PeerFigures::new(&peer, &[30.0, 60.0], &[20.0, 30.0]).unwrap();
        assert_eq!((figures.answer_ms.p50, figures.slower.median), (45.0, 1.75));
        assert!(
            figures.text().contains("1.75 times Lighter's restore"),
            "{}",
            figures.text()
        );
        assert!(PeerFigures::new(&peer, &[], &[]).is_err());
    }
}
