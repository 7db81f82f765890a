//! The pipe on which dockerd waits for its proxy's word, and the socket that it may hand over.

use std::{
    fs::File,
    io::{self, Write},
    os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd},
};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};

/// Where dockerd hands the pipe over.
const STATUS: RawFd = 3;

/// Where dockerd hands the bound socket over.
const SOCKET: RawFd = 4;

/// The pipe. dockerd takes its end without a word for a failure.
#[derive(Debug)]
pub struct Status(File);

impl Status {
    /// Takes over the inherited pipe. Call it once, before anything is opened.
    ///
    /// # Errors
    /// When there is none: the program was not started by dockerd.
    pub fn inherited() -> io::Result<Self> {
        inherited(STATUS).map(|fd| Self(fd.into()))
    }

    /// Tells that the port is published.
    ///
    /// # Errors
    /// When dockerd is gone.
    pub fn published(mut self) -> io::Result<()> {
        self.0.write_all(b"0\n")
    }

    /// Tells why it is not. dockerd shows the text to the user.
    ///
    /// # Errors
    /// When dockerd is gone.
    pub fn failed(mut self, reason: &str) -> io::Result<()> {
        // In one write: dockerd reads the two bytes, then the rest.
        self.0.write_all(format!("1\n{reason}").as_bytes())
    }
}

/// Takes over the socket that dockerd has bound. Call it once, before anything is opened.
///
/// # Errors
/// When there is none.
pub fn inherited_socket() -> io::Result<OwnedFd> {
    inherited(SOCKET)
}

fn inherited(number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: only looked at, and a number that is no descriptor is an error.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    fcntl(borrowed, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
    // SAFETY: it is open, it was inherited for this purpose, and nothing else in this program knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    fn said(say: impl FnOnce(Status)) -> String {
        let (mut reader, writer) = io::pipe().unwrap();
        say(Status(OwnedFd::from(writer).into()));
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        text
    }

    #[test]
    fn dockerd_reads_what_it_expects() {
        assert_eq!(said(|status| status.published().unwrap()), "0\n");
        assert_eq!(said(|status| status.failed("in use").unwrap()), "1\nin use");
    }
}
