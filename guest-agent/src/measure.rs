//! The guest's side of `lighter bench api`, `fs` and `net` ([`lighter_measure`]): run as a command, this program does what it is
//! told in an argument. In a monitor that has no other way, the agent takes the same tasks on the console ([`start`]), when the
//! kernel's command line asks for that.

use std::{
    fs::{self, OpenOptions},
    io::{self, BufRead, BufReader, Read, Write},
    net::Ipv4Addr,
    path::Path,
    process::ExitCode,
};

use lighter_measure::{
    files, net, requests,
    task::{MEASURED, NOT_MEASURED, READY, SERVING, Task, WORD},
};
use lighter_protocol::{agent::EngineState, causes::chain};
use tokio::sync::watch;

use crate::{docker_port::ENGINE_SOCKET, log::Log};

/// Where tasks come from when there is no other way.
const CONSOLE: &str = "/dev/console";

/// The longest line with a task, bytes: what a terminal takes.
const MAX_LINE: u64 = 4096;

/// Why there are no samples.
#[derive(Debug, thiserror::Error)]
enum Error {
    /// The launcher is of another version.
    #[error("what is to be measured is not understood")]
    Task(#[source] serde_json::Error),
    /// A request failed.
    #[error("cannot measure the engine on {ENGINE_SOCKET}")]
    Api(#[source] requests::Error),
    /// A file.
    #[error("cannot measure files")]
    Files(#[source] files::Error),
    /// A connection.
    #[error("cannot measure the network")]
    Net(#[source] net::Error),
    /// They cannot be told.
    #[error("cannot write the samples")]
    Write(#[source] io::Error),
}

/// Does `task` (JSON) and prints the samples.
pub fn main(task: &str) -> ExitCode {
    let written = parse(task).and_then(|task| match task {
        Task::Serve(port) => {
            let listener = listen(port)?;
            let said = io::stdout().lock().write_all(SERVING.as_bytes());
            net::serve(&listener);
            said.map_err(Error::Write)
        }
        task => io::stdout()
            .lock()
            .write_all(&samples(&task)?)
            .map_err(Error::Write),
    });
    match written {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(io::stderr(), "{}", chain(&error));
            ExitCode::FAILURE
        }
    }
}

fn parse(task: &str) -> Result<Task, Error> {
    serde_json::from_str(task).map_err(Error::Task)
}

fn listen(port: u16) -> Result<std::net::TcpListener, Error> {
    net::listen((Ipv4Addr::UNSPECIFIED, port).into()).map_err(Error::Net)
}

/// Does `task` and returns the samples as JSON; serving goes on in a thread of its own.
fn samples(task: &Task) -> Result<Vec<u8>, Error> {
    let json = match task {
        Task::Api(plan) => {
            let samples = requests::measure(Path::new(ENGINE_SOCKET), plan).map_err(Error::Api)?;
            serde_json::to_vec(&samples)
        }
        Task::Files(plan) => serde_json::to_vec(&files::measure(plan).map_err(Error::Files)?),
        Task::Net(plan) => serde_json::to_vec(&net::measure(plan).map_err(Error::Net)?),
        Task::Serve(port) => {
            let listener = listen(*port)?;
            std::thread::spawn(move || net::serve(&listener));
            serde_json::to_vec(&())
        }
    };
    json.map_err(|error| Error::Write(error.into()))
}

/// Takes tasks on the console once the engine is ready, when the kernel's command line has the word for it.
pub fn start(log: &Log, mut engine: watch::Receiver<EngineState>) {
    let command_line = fs::read_to_string("/proc/cmdline").unwrap_or_default();
    if !command_line.split_ascii_whitespace().any(|word| word == WORD) {
        return;
    }
    let log = log.clone();
    let work = move || {
        let console = OpenOptions::new().read(true).write(true).open(CONSOLE);
        let ended = console.and_then(|console| take_tasks(BufReader::new(&console), &console));
        if let Err(error) = ended {
            log.error(format!("cannot take tasks on {CONSOLE}: {error}"));
        }
    };
    tokio::spawn(async move {
        if engine
            .wait_for(|state| *state == EngineState::Ready)
            .await
            .is_ok()
        {
            // A thread that may never end must not keep the agent from doing so.
            std::thread::spawn(work);
        }
    });
}

/// Answers each line of `from` with one to `to`, until there are no more.
fn take_tasks(mut from: impl BufRead, mut to: impl Write) -> io::Result<()> {
    // The console's other messages may have left a line unfinished.
    writeln!(to, "\n{READY}")?;
    let mut line = String::new();
    loop {
        line.clear();
        if from.by_ref().take(MAX_LINE).read_line(&mut line)? == 0 {
            return Ok(());
        }
        let task = line.trim();
        let answer = match parse(task).and_then(|task| samples(&task)) {
            Ok(json) => [b"\n", MEASURED.as_bytes(), &json, b"\n"].concat(),
            Err(error) => format!("\n{NOT_MEASURED}{}\n", chain(&error)).into_bytes(),
        };
        to.write_all(&answer)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_task_of_another_version_is_refused() {
        let error = parse(r#"{"api":{"requests":1}}"#).unwrap_err();
        assert!(matches!(error, Error::Task(_)), "{error}");
    }

    #[test]
    fn each_line_is_answered() {
        let folder = tempfile::tempdir().unwrap();
        let plan = files::Plan {
            folder: folder.path().join("x"),
            files: 3,
            file_bytes: 1,
            large_mib: 1,
            reads: 1,
            drop_caches: false,
        };
        let task = serde_json::to_string(&Task::Files(plan)).unwrap();
        let mut said = vec![];
        take_tasks(format!("{task}\nnonsense\n").as_bytes(), &mut said).unwrap();
        let said = String::from_utf8(said).unwrap();
        let lines: Vec<&str> = said.lines().filter(|line| !line.is_empty()).collect();
        assert_eq!(lines[0], READY);
        let samples = lines[1].strip_prefix(MEASURED).unwrap();
        let samples: files::Samples = serde_json::from_str(samples).unwrap();
        assert_eq!(samples.create.amount, 3);
        assert!(lines[2].starts_with(NOT_MEASURED), "{said}");
    }
}
