//! A child that another child has left in its place.

use rustix::process::{Pid, PidfdFlags, Signal, WaitOptions, pidfd_open, pidfd_send_signal, waitpid};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// A process whose parent is this one, though it did not start it; killed when dropped.
#[derive(Debug)]
pub struct Process {
    pid: Pid,
    /// Readable when it has ended.
    descriptor: AsyncFd<OwnedFd>,
    end: Option<ExitStatus>,
}

impl Process {
    /// The one with the number `pid`, which nobody has waited for.
    ///
    /// # Errors
    /// When there is none.
    pub fn new(pid: Pid) -> io::Result<Self> {
        let descriptor = pidfd_open(pid, PidfdFlags::empty())?;
        // SAFETY: the descriptor is owned, and stays open and the same until the registration is dropped.
        let descriptor = unsafe { AsyncFd::register_with_interest(descriptor, Interest::READABLE) };
        Ok(Self {
            pid,
            descriptor: descriptor?,
            end: None,
        })
    }

    /// Its number.
    pub fn id(&self) -> u32 {
        self.pid.as_raw_nonzero().get().cast_unsigned()
    }

    /// Waits for its end. May be cancelled.
    ///
    /// # Errors
    /// When it is no child of this process.
    pub async fn wait(&mut self) -> io::Result<ExitStatus> {
        if let Some(end) = self.end {
            return Ok(end);
        }
        let _ended = self.descriptor.readable().await?;
        let waited = waitpid(Some(self.pid), WaitOptions::empty())?;
        let (_, status) = waited.ok_or(rustix::io::Errno::CHILD)?;
        let end = ExitStatus::from_raw(status.as_raw());
        self.end = Some(end);
        Ok(end)
    }

    /// Kills it.
    pub fn kill(&self) {
        // It may have ended.
        let _ = pidfd_send_signal(self.descriptor.get_ref(), Signal::KILL);
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Child, Command};

    fn child(script: &str) -> (Child, Process) {
        let child = Command::new("sh").args(["-c", script]).spawn().unwrap();
        let pid = Pid::from_child(&child);
        (child, Process::new(pid).unwrap())
    }

    #[tokio::test]
    async fn an_end_is_told_as_often_as_one_asks() {
        let (_child, mut process) = child("exit 7");
        for _ in 0..2 {
            assert_eq!(process.wait().await.unwrap().code(), Some(7));
        }
    }

    #[tokio::test]
    async fn it_is_killed_at_once_and_with_what_watches_it() {
        let (_child, mut process) = child("sleep 1000");
        process.kill();
        assert_eq!(process.wait().await.unwrap().signal(), Some(9));
        let (mut child, process) = child("sleep 1000");
        drop(process);
        assert_eq!(child.wait().unwrap().signal(), Some(9));
    }

    #[tokio::test]
    async fn who_is_not_there_is_not_watched() {
        let (mut child, mut process) = child("exit 0");
        process.wait().await.unwrap();
        let error = Process::new(Pid::from_child(&child)).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(rustix::io::Errno::SRCH.raw_os_error()));
        // It was waited for.
        assert!(child.wait().is_err());
    }
}
