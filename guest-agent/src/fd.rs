//! A pipe's end or a terminal's master as something to await.

use std::{
    fs::File,
    io::{self, Read, Write},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use tokio::io::unix::AsyncFd;

/// A descriptor that does not block.
#[derive(Debug)]
pub struct AsyncFile(AsyncFd<File>);

impl AsyncFile {
    /// Makes `fd` non-blocking. Its open file description must not be shared with anyone who would mind.
    ///
    /// # Errors
    /// From the system, or when the descriptor cannot be polled.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        let flags = OFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFL)?);
        fcntl(&fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        // SAFETY: the file owns its descriptor, which stays open and the same until the registration is dropped.
        Ok(Self(unsafe { AsyncFd::register(File::from(fd)) }?))
    }

    /// Reads some bytes; 0 is the end.
    ///
    /// # Errors
    /// From the system.
    pub async fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let mut guard = self.0.readable().await?;
            match guard.try_io(|file| file.get_ref().read(buffer)) {
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(result) => return result,
                Err(_would_block) => {}
            }
        }
    }

    /// Reads what is there now; `None` when nothing is.
    ///
    /// # Errors
    /// From the system.
    pub fn read_now(&self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        loop {
            match self.0.get_ref().read(buffer) {
                Ok(length) => return Ok(Some(length)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Writes all of `bytes`.
    ///
    /// # Errors
    /// From the system.
    pub async fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let mut guard = self.0.writable().await?;
            match guard.try_io(|file| file.get_ref().write(bytes)) {
                Ok(Ok(length)) => bytes = &bytes[length..],
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(Err(error)) => return Err(error),
                Err(_would_block) => {}
            }
        }
        Ok(())
    }
}

impl AsFd for AsyncFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.get_ref().as_fd()
    }
}
