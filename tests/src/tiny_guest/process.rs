//! The process that a monitor goes on in, which is not the one that was started.

use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};
use std::io::{BufRead, BufReader};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, ExitStatus};

/// A child of this process; killed when dropped.
pub struct Process {
    pid: Pid,
    end: Option<ExitStatus>,
}

impl Process {
    /// The one that `started` has made of itself: it says so on its standard output. If it does not get that far, it is itself.
    pub fn of(mut started: Child) -> Self {
        let mut line = String::new();
        let output = started.stdout.take().unwrap();
        BufReader::new(output).read_line(&mut line).unwrap();
        let pid = match line.trim_end().parse() {
            Ok(pid) if pid != started.id().cast_signed() => {
                assert!(started.wait().unwrap().success());
                pid
            }
            _ => started.id().cast_signed(),
        };
        Self {
            pid: Pid::from_raw(pid).unwrap(),
            end: None,
        }
    }

    /// Its number.
    pub fn id(&self) -> u32 {
        self.pid.as_raw_nonzero().get().cast_unsigned()
    }

    /// Kills it, if it has not been waited for.
    pub fn kill(&mut self) {
        if self.end.is_none() {
            kill_process(self.pid, Signal::KILL).unwrap();
        }
    }

    /// Waits for its end.
    pub fn wait(&mut self) -> ExitStatus {
        *self.end.get_or_insert_with(|| {
            let (_, status) = waitpid(Some(self.pid), WaitOptions::empty()).unwrap().unwrap();
            ExitStatus::from_raw(status.as_raw())
        })
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Already gone in most tests.
        self.kill();
        self.wait();
    }
}
