//! Ports that nobody chose (`docker run -P`, `-p 80`). dockerd reads the kernel's range of them, when it starts or when it first needs one
//! (Docker 28), and does not ask again; each VM has one of its own from the supervisor
//! ([`lighter_protocol::publish::RandomPorts`]), so that engines do not choose the same. It is a file that dockerd alone sees in the
//! place of the kernel's: the rest of the guest needs more ports than that.
//!
//! A fork has a range of its own. A dockerd that has read the one before keeps it; the next one reads the new one.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use lighter_protocol::publish::{RandomPorts, RandomPortsError};

/// The kernel's range.
pub const KERNELS: &str = "/proc/sys/net/ipv4/ip_local_port_range";

/// dockerd's.
const DOCKERDS: &str = "/run/lighter/random-ports";

/// What cannot be done about the range.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The supervisor's word is not there to read.
    #[error("cannot read {0}")]
    Read(&'static str, #[source] io::Error),
    /// The range stays as it is.
    #[error("cannot write {}", .0.display())]
    Write(PathBuf, #[source] io::Error),
    /// The supervisor's word.
    #[error(transparent)]
    Word(#[from] RandomPortsError),
}

/// The range that the supervisor gives.
#[derive(Clone, Debug)]
pub struct Given {
    file: PathBuf,
}

impl Default for Given {
    fn default() -> Self {
        Self {
            file: DOCKERDS.into(),
        }
    }
}

impl Given {
    /// Takes over the range of `words`, if there is one.
    ///
    /// # Errors
    /// When it is not understood, and the one before holds on; or it cannot be kept.
    pub fn take(&self, words: &str) -> Result<(), Error> {
        let Some(RandomPorts(ports)) = RandomPorts::find(words).transpose()? else {
            return Ok(());
        };
        // As the kernel writes it.
        let range = format!("{}\t{}\n", ports.start(), ports.end());
        fs::write(&self.file, range).map_err(|error| Error::Write(self.file.clone(), error))
    }

    /// The file for dockerd, if the supervisor gave a range: to this guest before, or now on the kernel's command line.
    ///
    /// # Errors
    /// When that is not understood, or cannot be kept.
    pub fn file(&self) -> Result<Option<&Path>, Error> {
        const COMMAND_LINE: &str = "/proc/cmdline";
        // A fork was told already, and has another's command line.
        if !self.file.exists() {
            let line = fs::read_to_string(COMMAND_LINE);
            self.take(&line.map_err(|error| Error::Read(COMMAND_LINE, error))?)?;
        }
        Ok(Some(&*self.file).filter(|file| file.exists()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_range_that_is_understood_holds() {
        let folder = tempfile::tempdir().unwrap();
        let given = Given {
            file: folder.path().join("range"),
        };
        // That of the host that runs this has no such word.
        assert_eq!(given.file().unwrap(), None);
        let range = || fs::read_to_string(given.file().unwrap().unwrap()).unwrap();
        given.take("quiet lighter.random-ports=32768-33279").unwrap();
        assert!(given.take("lighter.random-ports=9").is_err());
        assert_eq!(range(), "32768\t33279\n");
        given.take("lighter.random-ports=33280-33791").unwrap();
        assert_eq!(range(), "33280\t33791\n");
    }
}
