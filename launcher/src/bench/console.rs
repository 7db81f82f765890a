//! Watches a console log that is yet to be made, without asking again and again: the host may have one processor, which
//! the guest needs.

use super::milestones::{Milestones, Reader};
use crate::clock::monotonic_ns;
use crate::error::{Context, Error, Result};
use rustix::fs::inotify;
use std::fs::File;
use std::io::{self, Read};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

/// How long the lines may take that were announced before the engine answered.
const ARRIVES: Duration = Duration::from_secs(60);

/// A watched console log. The thread that watches ends at the last milestone, or with the process.
#[derive(Debug)]
pub struct Watch(mpsc::Receiver<io::Result<Milestones>>);

impl Watch {
    /// Watches for the log `path`. Its folder may be made later, the folder above it is there.
    ///
    /// # Errors
    /// When that cannot be watched.
    pub fn start(path: PathBuf) -> Result<Self> {
        let failed = || format!("cannot watch for {}", path.display());
        let inotify = inotify::init(inotify::CreateFlags::CLOEXEC).context(failed)?;
        let (sender, receiver) = mpsc::channel();
        let watch = move || {
            // Nobody waits any more when the boot failed.
            let _ = sender.send(follow(&inotify, &path));
        };
        std::thread::Builder::new()
            .name("console".into())
            .spawn(watch)
            .context(|| "cannot start a thread".into())?;
        Ok(Self(receiver))
    }

    /// The milestones, of an engine that answers.
    ///
    /// # Errors
    /// When they are not on the console.
    pub fn milestones(self) -> Result<Milestones> {
        match self.0.recv_timeout(ARRIVES) {
            Ok(result) => result.context(|| "cannot read the guest's console log".into()),
            Err(_) => Err(
                Error::failure("the guest's agent did not announce its milestones on the console").hint(
                    "the guest image is older than this program: build and install both from one checkout",
                ),
            ),
        }
    }
}

fn follow(inotify: &OwnedFd, path: &Path) -> io::Result<Milestones> {
    if let Some(folder) = path.parent() {
        appear(inotify, folder)?;
    }
    appear(inotify, path)?;
    let mut file = File::open(path)?;
    inotify::add_watch(inotify, path, inotify::WatchFlags::MODIFY)?;
    let mut reader = Reader::default();
    let mut bytes = vec![];
    loop {
        file.read_to_end(&mut bytes)?;
        if let Some(milestones) = reader.feed(&bytes, monotonic_ns()) {
            return Ok(milestones);
        }
        bytes.clear();
        await_events(inotify)?;
    }
}

/// Waits until `path` is there, in a folder that is.
fn appear(inotify: &OwnedFd, path: &Path) -> io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("/"));
    // The folder of a VM comes under another name.
    let comes = inotify::WatchFlags::CREATE | inotify::WatchFlags::MOVED_TO;
    let watch = inotify::add_watch(inotify, folder, comes)?;
    while !path.try_exists()? {
        await_events(inotify)?;
    }
    Ok(inotify::remove_watch(inotify, watch)?)
}

/// Waits until something happened to what is watched, and takes all of it that is known by then.
fn await_events(inotify: &OwnedFd) -> io::Result<()> {
    let mut buffer = [MaybeUninit::uninit(); 4096];
    let mut events = inotify::Reader::new(inotify, &mut buffer);
    loop {
        events.next()?;
        if events.is_buffer_empty() {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lighter_protocol::announce::{AGENT_RUNNING, ENGINE_READY};
    use std::io::Write;

    #[test]
    fn a_log_made_later_and_written_bit_by_bit_is_followed() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("vm/console.log");
        let watch = Watch::start(path.clone()).unwrap();
        let before = monotonic_ns();
        let partial = root.path().join("partial");
        std::fs::create_dir(&partial).unwrap();
        // The thread may be anywhere by then.
        std::thread::sleep(Duration::from_millis(50));
        std::fs::rename(&partial, path.parent().unwrap()).unwrap();
        std::thread::sleep(Duration::from_millis(50));
        std::fs::write(path.with_file_name("other"), "x").unwrap();
        let mut file = File::create(&path).unwrap();
        for byte in format!("Linux\n{AGENT_RUNNING}\r\nmore\n{ENGINE_READY}\r\n").bytes() {
            file.write_all(&[byte]).unwrap();
        }
        let found = watch.milestones().unwrap();
        assert!(before <= found.agent_running_ns && found.agent_running_ns <= found.engine_ready_ns);
        assert!(found.engine_ready_ns <= monotonic_ns());
    }

    #[test]
    fn what_cannot_be_watched_is_an_error() {
        let watch = Watch::start("/nonexistent/vm/console.log".into()).unwrap();
        let error = watch.milestones().unwrap_err();
        assert!(error.message.contains("console log"), "{error}");
    }
}
