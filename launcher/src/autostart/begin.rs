//! A start by systemd that a command follows: the supervisor meets the command at a socket, hears there how it is to begin, and tells
//! what happens, as one that the command has started itself does.

use super::systemd::{self, SystemdError};
use super::{service, socket};
use crate::boot::Begin;
use crate::error::{Context, Error, Result};
use crate::lock::Lock;
use crate::paths::Paths;
use crate::supervisor::machine::listen;
use crate::vm::Vm;
use serde::{Deserialize, Serialize};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// The longest commission, bytes: a path is in it.
const MAX_COMMISSION: u64 = 16 << 10;

/// How long the command may take to say what it has ready.
const PATIENCE: Duration = Duration::from_secs(10);

/// How the supervisor is to begin: [`Begin`], over a socket.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Commission {
    from: Option<PathBuf>,
    template: bool,
}

impl Commission {
    /// That of `begin`.
    pub fn new(begin: Begin<'_>) -> Self {
        match begin {
            Begin::Boot => Self::default(),
            Begin::BootForTemplate => Self {
                template: true,
                from: None,
            },
            Begin::From(folder) => Self {
                template: false,
                from: Some(folder.into()),
            },
        }
    }

    /// What it says.
    pub fn begin(&self) -> Begin<'_> {
        match (&self.from, self.template) {
            (Some(folder), _) => Begin::From(folder),
            (None, true) => Begin::BootForTemplate,
            (None, false) => Begin::Boot,
        }
    }

    /// Meets the command that has asked systemd for the start of `vm`, if one has. The caller holds the edit lock.
    pub fn fetch(vm: &Vm) -> Option<(Self, UnixStream)> {
        let stream = UnixStream::connect(vm.paths.starter_socket()).ok()?;
        stream.set_read_timeout(Some(PATIENCE)).ok()?;
        let mut line = String::new();
        BufReader::new((&stream).take(MAX_COMMISSION))
            .read_line(&mut line)
            .ok()?;
        stream.set_read_timeout(None).ok()?;
        Some((serde_json::from_str(&line).ok()?, stream))
    }
}

/// What comes first.
enum News {
    Supervisor(UnixStream),
    Systemd(std::result::Result<String, SystemdError>),
}

/// Has systemd start `vm`, and returns a connection to its supervisor; `None` when somebody else's start was quicker, or the time is over. The
/// caller holds `edit`, the edit lock, which the supervisor takes in turn.
///
/// # Errors
/// Why systemd does not start it.
pub fn start(
    paths: &Paths,
    vm: &Vm,
    edit: Lock,
    begin: Begin<'_>,
    deadline: Instant,
) -> Result<Option<UnixStream>> {
    let failed = || format!("cannot have systemd start VM {}", vm.name);
    paths.create_runtime(&vm.paths)?;
    let listener = listen(&vm.paths.starter_socket())?;
    drop(edit);
    // After failures it would not start it for a while. Units that have not failed are none to reset.
    let units = [service(vm), socket(vm)];
    let _ = systemd::run(&["reset-failed", &units[0], &units[1]]);
    let (sender, news) = channel();
    std::thread::spawn({
        let sender = sender.clone();
        move || {
            if let Ok((stream, _)) = listener.accept() {
                let _ = sender.send(News::Supervisor(stream));
            }
        }
    });
    std::thread::spawn(move || {
        let _ = sender.send(News::Systemd(systemd::run(&["start", &units[0]])));
    });
    let first = news.recv_timeout(deadline.saturating_duration_since(Instant::now()));
    let _ = std::fs::remove_file(vm.paths.starter_socket());
    match first {
        Ok(News::Supervisor(mut stream)) => {
            let mut line = serde_json::to_vec(&Commission::new(begin)).context(failed)?;
            line.push(b'\n');
            stream.write_all(&line).context(failed)?;
            Ok(Some(stream))
        }
        Ok(News::Systemd(Ok(_))) | Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
            Ok(None)
        }
        Ok(News::Systemd(Err(error))) => {
            let error = Error::from(error);
            let hint = format!(
                "systemctl --user status {} tells more; lighter autostart disable {} does without systemd",
                service(vm),
                vm.name
            );
            let hint = [error.hint.clone().unwrap_or_default(), hint].join("; ");
            let message = format!("{}: {}", failed(), error.message);
            Err(Error { message, ..error }.hint(hint))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    #[test]
    fn a_commission_says_how_to_begin() {
        for begin in [Begin::Boot, Begin::BootForTemplate, Begin::From(Path::new("/s"))] {
            let json = serde_json::to_string(&Commission::new(begin)).unwrap();
            let commission: Commission = serde_json::from_str(&json).unwrap();
            assert_eq!(commission.begin(), begin);
        }
    }
}
