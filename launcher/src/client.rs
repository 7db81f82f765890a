//! The CLI's side of a supervisor's control socket.

use crate::error::{Code, Context, Error, Result};
use crate::lock;
use crate::supervisor::suspension::is_suspended;
use crate::vm::{VANISHED, Vm};
use lighter_protocol::activity::Use;
use lighter_protocol::publish::PublishedPort;
use lighter_protocol::supervisor::{MAX_LINE, Phase, Request, SnapshotAnswer, Status, Taken};
use serde::de::DeserializeOwned;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// A connection to a running supervisor.
#[derive(Debug)]
pub struct Client {
    stream: BufReader<UnixStream>,
}

/// What came over the connection.
#[derive(Debug)]
pub enum Update {
    /// The VM's status.
    Status(Box<Status>),
    /// The supervisor is gone.
    Closed,
    /// The deadline passed.
    TimedOut,
}

/// A line that was waited for.
enum Answer<T> {
    /// It came.
    Is(Box<T>),
    /// The supervisor is gone.
    Closed,
    /// The deadline passed.
    TimedOut,
}

/// How a wait for the supervisor's end went, with the last status it sent.
#[derive(Debug)]
pub enum Ended {
    /// It is gone.
    Gone(Option<Box<Status>>),
    /// The deadline passed.
    TimedOut(Option<Box<Status>>),
}

impl Client {
    /// Connects to the supervisor of `vm`, or returns `None` when none answers.
    pub fn connect(vm: &Vm) -> Option<Self> {
        UnixStream::connect(vm.paths.control_socket())
            .ok()
            .map(Self::over)
    }

    /// Speaks over a socket whose other end a supervisor has.
    pub fn over(stream: UnixStream) -> Self {
        Self {
            stream: BufReader::new(stream),
        }
    }

    /// Sends a request.
    ///
    /// # Errors
    /// When the supervisor is gone.
    pub fn send(&mut self, request: &Request) -> Result<()> {
        let mut line = serde_json::to_vec(request).context(|| "cannot encode a request".into())?;
        line.push(b'\n');
        self.stream
            .get_mut()
            .write_all(&line)
            .context(|| "cannot speak with the VM's supervisor".into())
    }

    /// Ends this side: a throw-away VM ends with it, and its updates go on until it has.
    pub fn hang_up(&self) {
        let _ = self.stream.get_ref().shutdown(std::net::Shutdown::Write);
    }

    /// The socket, for waiting until something comes.
    pub fn socket(&self) -> &UnixStream {
        self.stream.get_ref()
    }

    /// Waits until the supervisor is gone, which may be of another version of Lighter. Returns the last status it sent that was
    /// understood.
    ///
    /// # Errors
    /// When what comes is no answer of any version.
    pub fn wait_for_end(&mut self, deadline: Option<Instant>) -> Result<Ended> {
        let mut last = None;
        loop {
            match self.answer::<serde_json::Value>(deadline)? {
                Answer::Is(status) => last = serde_json::from_value(*status).ok().or(last),
                Answer::Closed => return Ok(Ended::Gone(last)),
                Answer::TimedOut => return Ok(Ended::TimedOut(last)),
            }
        }
    }

    /// Waits for the next status.
    ///
    /// # Errors
    /// When what comes is not understood.
    pub fn next(&mut self, deadline: Option<Instant>) -> Result<Update> {
        Ok(match self.answer(deadline)? {
            Answer::Is(status) => Update::Status(status),
            Answer::Closed => Update::Closed,
            Answer::TimedOut => Update::TimedOut,
        })
    }

    /// Waits until the VM is saved.
    fn taken(&mut self, failure: &str) -> Result<Taken> {
        match self.answer(None)? {
            Answer::Is(answer) => match *answer {
                SnapshotAnswer::Taken(taken) => Ok(taken),
                SnapshotAnswer::Failed { reason, hint } => Err(Error {
                    hint,
                    ..Error::failure(format!("{failure}: {reason}"))
                }),
            },
            Answer::Closed | Answer::TimedOut => {
                let error = Error::failure(format!("{failure}: its supervisor ended without an answer"));
                Err(error.hint("lighter status tells more"))
            }
        }
    }

    /// Waits for the next line.
    fn answer<T: DeserializeOwned>(&mut self, deadline: Option<Instant>) -> Result<Answer<T>> {
        let what = || "cannot understand the VM's supervisor".to_owned();
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        if left == Some(Duration::ZERO) {
            return Ok(Answer::TimedOut);
        }
        self.stream.get_ref().set_read_timeout(left).context(what)?;
        let mut line = vec![];
        // A line is written at once and read at once: the time-out falls between two of them.
        match (&mut self.stream)
            .take(MAX_LINE as u64)
            .read_until(b'\n', &mut line)
        {
            Ok(0) => Ok(Answer::Closed),
            Ok(_) if !line.ends_with(b"\n") => Ok(Answer::Closed),
            Ok(_) => serde_json::from_slice(&line)
                .context(what)
                .map(|answer| Answer::Is(Box::new(answer))),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                Ok(Answer::TimedOut)
            }
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(Answer::Closed),
            Err(error) => Err(error).context(what),
        }
    }
}

/// The status of a VM that runs, or stands by; `None` of another.
///
/// # Errors
/// When its supervisor is there and not understood.
pub fn status(vm: &Vm) -> Result<Option<Status>> {
    let status: Option<Status> = ask(vm, &Request::Status)?;
    Ok(status.filter(|status| status.phase != Phase::Ended))
}

/// Whether a VM is suspended and goes on when it is used.
///
/// # Errors
/// When its supervisor is there and not understood.
pub fn stands_by(vm: &Vm) -> Result<bool> {
    Ok(status(vm)?.is_some_and(|status| status.phase == Phase::StandingBy))
}

/// Ends the supervisor of a suspended VM that stands by; `false` when none does.
///
/// # Errors
/// When its supervisor is there and not understood.
pub fn stand_down(vm: &Vm) -> Result<bool> {
    let stands_by = ask(vm, &Request::StandDown)? == Some(true);
    if stands_by {
        wait_until_gone(vm);
    }
    Ok(stands_by)
}

/// Has a VM that stands by go on, and uses it for as long as the connection is kept.
///
/// # Errors
/// [`Code::NotRunning`] when it does not run, nor stand by.
pub fn session(vm: &Vm) -> Result<Client> {
    let mut client = Client::connect(vm).ok_or_else(|| not_running(vm))?;
    let purpose = Use::Session;
    client.send(&Request::Use { purpose })?;
    Ok(client)
}

/// The published ports of a VM that runs, or stands by; `None` of another.
///
/// # Errors
/// When its supervisor is there and not understood.
pub fn ports(vm: &Vm) -> Result<Option<Vec<PublishedPort>>> {
    ask(vm, &Request::Ports)
}

/// Has a running VM saved into `folder`. The VM goes on, and this takes as long as its memory and its disk take to be written.
///
/// # Errors
/// Why it is not saved.
pub fn snapshot(vm: &Vm, folder: &Path) -> Result<Taken> {
    let mut client = Client::connect(vm).ok_or_else(|| not_running(vm))?;
    let folder = folder.into();
    client.send(&Request::Snapshot { folder })?;
    client.taken(&format!("cannot take a snapshot of VM {}", vm.name))
}

/// Has a running VM saved into its own folder, and waits until nothing of it runs.
///
/// # Errors
/// Why it is not saved; it goes on then.
pub fn suspend(vm: &Vm) -> Result<Taken> {
    let mut client = Client::connect(vm).ok_or_else(|| not_running(vm))?;
    client.send(&Request::Suspend)?;
    let taken = client.taken(&format!("cannot suspend VM {}", vm.name))?;
    client.wait_for_end(None)?;
    wait_until_gone(vm);
    Ok(taken)
}

/// Asks for one line.
fn ask<T: DeserializeOwned>(vm: &Vm, request: &Request) -> Result<Option<T>> {
    // One that ends hangs up, and another may begin.
    for _ in 0..2 {
        let Some(mut client) = Client::connect(vm) else {
            return Ok(None);
        };
        if client.send(request).is_err() {
            continue;
        }
        let deadline = Instant::now() + Duration::from_secs(60);
        match client
            .answer(Some(deadline))
            .map_err(|error| of_another_version(vm, error))?
        {
            Answer::Is(answer) => return Ok(Some(*answer)),
            Answer::Closed => {}
            Answer::TimedOut => {
                let message = format!("the supervisor of VM {} does not answer", vm.name);
                let hint = format!("lighter stop --force {}", vm.name);
                return Err(Error::new(Code::Timeout, message).hint(hint));
            }
        }
    }
    match Client::connect(vm) {
        None => Ok(None),
        Some(_) => {
            let message = format!("the supervisor of VM {} does not understand {request:?}", vm.name);
            Err(of_another_version(vm, Error::failure(message)))
        }
    }
}

/// An error of a conversation with a supervisor that goes on, and is not that of this program.
fn of_another_version(vm: &Vm, error: Error) -> Error {
    error.hint(format!(
        "it is of another version of lighter, perhaps; lighter restart {} has the VM run by this one",
        vm.name
    ))
}

/// The status of a VM that has to run.
///
/// # Errors
/// [`Code::NotRunning`] when it does not.
pub fn running(vm: &Vm) -> Result<Status> {
    let running = status(vm)?.filter(|status| status.phase != Phase::StandingBy);
    running.ok_or_else(|| not_running(vm))
}

/// That a VM which stands by did not go on when it was used, as `status` says.
pub fn did_not_go_on(vm: &Vm, status: &Status) -> Error {
    let why = status
        .trouble
        .as_ref()
        .map_or("it is not known why", |trouble| &trouble.reason);
    Error::new(Code::NotRunning, format!("VM {} is suspended: {why}", vm.name)).hint(format!(
        "lighter start --boot {} gives up what runs in it, and boots it from its disk",
        vm.name
    ))
}

/// That a VM does not run, and why it ended.
pub fn not_running(vm: &Vm) -> Error {
    if is_suspended(&vm.paths) {
        let error = Error::new(Code::NotRunning, format!("VM {} is suspended", vm.name));
        return error.hint(format!("lighter resume {}", vm.name));
    }
    let mut message = format!("VM {} is not running", vm.name);
    if let Some(end) = vm.last_end().filter(|end| !end.is_clean()) {
        message = format!("{message}; it ended because {}", end.sentence());
    } else if vm.vanished() {
        message = format!("{message}; {VANISHED}");
    }
    Error::new(Code::NotRunning, message).hint(format!("lighter start {}", vm.name))
}

/// Whether a VM runs, or stands by. The caller holds its edit lock, so that none is just beginning; one that is just ending is waited for.
pub fn is_running(vm: &Vm) -> bool {
    if lock::is_held(&vm.paths.life_lock()) && Client::connect(vm).is_none() {
        wait_until_gone(vm);
    }
    lock::is_held(&vm.paths.life_lock())
}

/// Waits until the supervisor of `vm` has released everything.
pub fn wait_until_gone(vm: &Vm) {
    lock::wait_until_free(&vm.paths.life_lock());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::DiskSource;
    use crate::paths::Paths;
    use crate::vm::testing::settings;
    use std::os::unix::net::UnixListener;

    #[test]
    fn a_supervisor_of_another_version_is_waited_for() {
        let (ours, mut supervisor) = UnixStream::pair().unwrap();
        supervisor
            .write_all(b"{\"phase\":\"on-the-moon\"}\n{\"more\":1}\n")
            .unwrap();
        drop(supervisor);
        let ended = Client::over(ours).wait_for_end(None).unwrap();
        assert!(matches!(ended, Ended::Gone(None)), "{ended:?}");
    }

    #[test]
    fn a_supervisor_that_does_not_understand_is_told_from_one_that_is_gone() {
        let root = tempfile::tempdir().unwrap();
        let paths = Paths::at(root.path());
        let vm = Vm::create(&paths, &"a".parse().unwrap(), settings(1 << 20), DiskSource::New).unwrap();
        assert_eq!(ports(&vm).unwrap(), None);
        paths.create_runtime(&vm.paths).unwrap();
        let listener = UnixListener::bind(vm.paths.control_socket()).unwrap();
        let deaf = std::thread::spawn(move || {
            for _ in 0..2 {
                let mut line = String::new();
                let (client, _) = listener.accept().unwrap();
                BufReader::new(client).read_line(&mut line).unwrap();
            }
            listener
        });
        let error = ports(&vm).unwrap_err();
        assert!(error.message.contains("does not understand Ports"), "{error:?}");
        assert!(error.hint.unwrap().contains("lighter restart a"));
        drop(deaf.join().unwrap());
        assert_eq!(ports(&vm).unwrap(), None);
    }
}
