//! `lighter logs`.

use super::Target;
use crate::client::Client;
use crate::error::{Context, Error, Result};
use crate::logs::{Source, printable};
use crate::paths::Paths;
use crate::vm::Vm;
use clap::Args;
use lighter_protocol::activity::Use;
use lighter_protocol::supervisor::Request;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

/// Arguments.
#[derive(Debug, Args)]
pub struct Logs {
    #[command(flatten)]
    target: Target,
    /// Go on until the VM ends
    #[arg(short, long)]
    follow: bool,
    /// Whose log
    #[arg(long, value_enum, default_value = "engine")]
    source: Source,
    /// Only the last N lines
    #[arg(short = 'n', long, value_name = "N")]
    lines: Option<usize>,
}

impl Logs {
    /// Shows the log.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn run(self, paths: &Paths) -> Result<()> {
        let vm = Vm::load(paths, &self.target.name)?;
        let mut log = Log {
            path: vm.paths.log(self.source),
            open: None,
        };
        // Before the first look at the file, so that nothing is missed between the two.
        let follower = match Client::connect(&vm).filter(|_| self.follow) {
            Some(client) => Some(Follower::new(client, &vm, &log.path)?),
            None => None,
        };
        log.print(self.lines)?;
        match follower {
            Some(follower) => follower.run(&mut log),
            None => Ok(()),
        }
    }
}

/// A log file and how far it was shown.
struct Log {
    path: PathBuf,
    open: Option<File>,
}

impl Log {
    /// Shows what is new; of the first look, only the `last` lines.
    fn print(&mut self, last: Option<usize>) -> Result<()> {
        let what = format!("cannot read {}", self.path.display());
        let read = |error: io::Error| Error::failure(format!("{what}: {error}"));
        if let Some(file) = &mut self.open {
            copy(file).map_err(read)?;
            let now = std::fs::metadata(&self.path).map(|now| now.ino()).ok();
            let metadata = file.metadata().map_err(read)?;
            if now == Some(metadata.ino()) {
                // A console that was cut has only older lines: go on with what comes.
                if file.stream_position().map_err(read)? > metadata.len() {
                    file.seek(SeekFrom::End(0)).map_err(read)?;
                }
                return Ok(());
            }
            self.open = None;
        }
        let mut file = match File::open(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            result => result.map_err(read)?,
        };
        if let Some(count) = last {
            seek_to_last(&mut file, count).map_err(read)?;
        }
        copy(&mut file).map_err(read)?;
        self.open = Some(file);
        Ok(())
    }
}

/// Log files are small enough to be read at once.
fn copy(file: &mut File) -> io::Result<()> {
    let mut bytes = vec![];
    file.read_to_end(&mut bytes)?;
    super::print(&printable(&String::from_utf8_lossy(&bytes)))
        .map_err(|error| io::Error::other(error.message))
}

fn seek_to_last(file: &mut File, count: usize) -> io::Result<()> {
    let mut bytes = vec![];
    file.read_to_end(&mut bytes)?;
    let body = bytes.strip_suffix(b"\n").unwrap_or(&bytes);
    let breaks = body.iter().enumerate().rev().filter(|(_, byte)| **byte == b'\n');
    let start = match count {
        0 => bytes.len(),
        _ => breaks.map(|(at, _)| at + 1).nth(count - 1).unwrap_or(0),
    };
    file.seek(SeekFrom::Start(start as u64))?;
    Ok(())
}

/// Waits for changes of a log, and for the VM's end.
struct Follower {
    client: Client,
    inotify: OwnedFd,
}

impl Follower {
    fn new(mut client: Client, vm: &Vm, path: &std::path::Path) -> Result<Self> {
        let what = || format!("cannot watch {}", vm.paths.data.display());
        let purpose = Use::Logs;
        client.send(&Request::Use { purpose })?;
        client.socket().set_nonblocking(true).context(what)?;
        let inotify = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK).context(what)?;
        inotify::add_watch(
            &inotify,
            &vm.paths.data,
            WatchFlags::CREATE | WatchFlags::MOVED_TO,
        )
        .context(what)?;
        let follower = Self { client, inotify };
        follower.watch_file(path);
        Ok(follower)
    }

    /// The file itself, too: a watch of the folder for changes would wake with every write to the data disk.
    fn watch_file(&self, path: &std::path::Path) {
        // It may not be there yet; the folder's watch tells when it is.
        let _ = inotify::add_watch(&self.inotify, path, WatchFlags::MODIFY);
    }

    fn run(self, log: &mut Log) -> Result<()> {
        let what = || "cannot wait for changes".to_owned();
        let mut buffer = vec![0; 16 << 10];
        loop {
            let mut waiting = [
                PollFd::new(&self.inotify, PollFlags::IN),
                PollFd::new(self.client.socket(), PollFlags::IN),
            ];
            match poll(&mut waiting, None) {
                Err(rustix::io::Errno::INTR) => continue,
                result => result.context(what)?,
            };
            while rustix::io::read(&self.inotify, &mut buffer[..]).is_ok_and(|length| length > 0) {}
            self.watch_file(&log.path);
            let mut over = false;
            loop {
                match self.client.socket().read(&mut buffer) {
                    Ok(0) => over = true,
                    Ok(_) => continue,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Err(_) => over = true,
                }
                break;
            }
            log.print(None)?;
            if over {
                return Ok(());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_lines_begin_at_a_line() {
        let rest = |text: &str, count| {
            let mut file = tempfile::tempfile().unwrap();
            io::Write::write_all(&mut file, text.as_bytes()).unwrap();
            file.rewind().unwrap();
            seek_to_last(&mut file, count).unwrap();
            let mut rest = String::new();
            file.read_to_string(&mut rest).unwrap();
            rest
        };
        assert_eq!(rest("a\nb\nc\n", 2), "b\nc\n");
        assert_eq!(rest("a\nb\nc", 1), "c");
        assert_eq!(rest("a\nb\n", 9), "a\nb\n");
        assert_eq!(rest("a\n", 0), "");
        assert_eq!(rest("", 3), "");
    }
}
