//! Events to the supervisor, as JSON lines with the host's monotonic time.

use lighter_protocol::monitor::{Event, EventKind};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

/// The way to the supervisor; clones are the same.
#[derive(Clone, Debug)]
pub struct Events {
    to: Arc<Mutex<File>>,
}

impl Events {
    /// Sends over `to`. A supervisor that does not read loses events; it never holds up the VM.
    ///
    /// # Errors
    /// When the descriptor cannot be made non-blocking.
    pub fn new(to: OwnedFd) -> io::Result<Self> {
        // SAFETY: fcntl on an open descriptor.
        let flags = unsafe { libc::fcntl(to.as_raw_fd(), libc::F_GETFL) };
        // SAFETY: as above.
        if flags < 0 || unsafe { libc::fcntl(to.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self {
            to: Arc::new(Mutex::new(to.into())),
        })
    }

    /// Sends what happened now.
    pub fn send(&self, kind: EventKind) {
        self.send_at(monotonic_ns(), kind);
    }

    /// Sends what happened at `monotonic_ns`.
    pub fn send_at(&self, monotonic_ns: u64, kind: EventKind) {
        let Ok(mut line) = serde_json::to_vec(&Event { monotonic_ns, kind }) else {
            return;
        };
        line.push(b'\n');
        // One write for a line: short ones are not cut (pipe(7)).
        let _ = self
            .to
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .write_all(&line);
    }
}

/// CLOCK_MONOTONIC, nanoseconds.
pub fn monotonic_ns() -> u64 {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `now` is valid for writing; the clock exists on every Linux.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    // Both are never negative for this clock.
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}
