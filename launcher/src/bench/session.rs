//! A peer whose guest measures what it is told: tasks and samples pass on its serial console ([`lighter_measure::task`]).

use super::peer::{Contender, Running};
use super::tasks::{encoded, samples};
use crate::error::{Code, Context, Error, Result};
use crate::logs::printable;
use command_fds::FdMapping;
use lighter_measure::task::{MEASURED, NOT_MEASURED, READY, Task};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::de::DeserializeOwned;
use std::collections::VecDeque;
use std::io::{PipeReader, Read, Write};
use std::process::{ChildStdin, Stdio};
use std::time::{Duration, Instant};

/// The longest line of the console, bytes: samples are some.
const MAX_LINE: usize = 8 << 20;

/// Lines that are kept for an error message, and how much of each, bytes.
const LAST_LINES: usize = 20;
const KEPT_OF_LINE: usize = 400;

/// How long a measurement may take. In an emulated machine everything does.
const PATIENCE: Duration = Duration::from_secs(1800);

/// A running peer. It is killed when this is dropped, and when this process ends.
#[derive(Debug)]
pub struct Session {
    name: &'static str,
    child: Running,
    input: ChildStdin,
    output: PipeReader,
    /// What came of lines that are not looked at yet.
    bytes: Vec<u8>,
    last_lines: VecDeque<String>,
}

impl Session {
    /// Boots `contender`, with more descriptors than those of its own, and waits for its engine. Call it from the main thread.
    ///
    /// # Errors
    /// When it does not get there by `deadline`, with the last lines it wrote.
    pub fn start(contender: &Contender, inherited: Vec<FdMapping>, deadline: Instant) -> Result<Self> {
        let (_, mut child, output) = contender.start(Stdio::piped(), inherited)?;
        let input = child
            .0
            .stdin
            .take()
            .ok_or_else(|| Error::failure("the peer has no standard input"))?;
        let mut session = Self {
            name: contender.name,
            child,
            input,
            output,
            bytes: vec![],
            last_lines: VecDeque::new(),
        };
        while !session
            .line("did not bring the guest's engine up", deadline)?
            .ends_with(READY)
        {}
        Ok(session)
    }

    /// Has the guest do `task`, and returns its samples.
    ///
    /// # Errors
    /// When it fails, or takes too long.
    pub fn measure<Samples: DeserializeOwned>(&mut self, task: &Task) -> Result<Samples> {
        let line = encoded(task)? + "\n";
        let sent = self.input.write_all(line.as_bytes());
        sent.context(|| format!("cannot write to the console of {}", self.name))?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            let line = self.line("did not measure", deadline)?;
            if let Some(json) = line.strip_prefix(MEASURED) {
                return samples(json.as_bytes());
            }
            if let Some(reason) = line.strip_prefix(NOT_MEASURED) {
                let reason = format!(
                    "the guest of {} did not measure: {}",
                    self.name,
                    printable(reason)
                );
                return Err(Error::failure(reason));
            }
        }
    }

    /// The next line, without its end. `late` is what the peer did not do by `deadline`.
    fn line(&mut self, late: &str, deadline: Instant) -> Result<String> {
        let mut looked_at = 0;
        loop {
            let end = self.bytes[looked_at..].iter().position(|&byte| byte == b'\n');
            if let Some(end) = end {
                let line: Vec<u8> = self.bytes.drain(..=looked_at + end).collect();
                let line = String::from_utf8_lossy(&line).trim_end().to_owned();
                self.keep(&line);
                return Ok(line);
            }
            looked_at = self.bytes.len();
            if looked_at > MAX_LINE {
                let long = format!("{} writes lines of more than {MAX_LINE} bytes", self.name);
                return Err(Error::failure(long));
            }
            self.read(late, deadline)?;
        }
    }

    fn keep(&mut self, line: &str) {
        if self.last_lines.len() == LAST_LINES {
            self.last_lines.pop_front();
        }
        let kept: String = line.chars().take(KEPT_OF_LINE).collect();
        self.last_lines.push_back(printable(&kept));
    }

    fn read(&mut self, late: &str, deadline: Instant) -> Result<()> {
        let name = self.name;
        let failed = || format!("cannot read what {name} writes");
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).ok();
        let ready = match poll(&mut [PollFd::new(&self.output, PollFlags::IN)], timeout.as_ref()) {
            Err(rustix::io::Errno::INTR) => return Ok(()),
            result => result.context(failed)?,
        };
        if ready == 0 {
            let late = format!("{} {late} in time", self.name);
            return Err(Error::new(Code::Timeout, late).lines(self.last_lines.iter().cloned().collect()));
        }
        let mut bytes = [0; 64 << 10];
        let count = self.output.read(&mut bytes).context(failed)?;
        if count > 0 {
            self.bytes.extend_from_slice(&bytes[..count]);
            return Ok(());
        }
        // What it wrote last may have no end of a line.
        let rest = String::from_utf8_lossy(&std::mem::take(&mut self.bytes)).into_owned();
        if !rest.is_empty() {
            self.keep(&rest);
        }
        let _ = self.child.0.kill();
        let status = self.child.0.wait().context(failed)?;
        let ended = format!("{} ended before it was through ({status})", self.name);
        Err(Error::failure(ended).lines(self.last_lines.iter().cloned().collect()))
    }
}
