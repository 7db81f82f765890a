//! Ports that nobody chose (`docker run -P`, `-p 80`). dockerd reads the kernel's range of them when it starts, and does
//! not ask again; each VM has one of its own from the supervisor ([`lighter_protocol::publish::RandomPorts`]), so that
//! engines do not choose the same. The rest of the guest needs more ports than that: it has them while dockerd runs.
//!
//! A fork has a range of its own. A dockerd that runs keeps the one it has read; the next one reads the new one.

use std::{
    fs, io,
    sync::{Arc, Mutex, PoisonError},
};

use lighter_protocol::publish::{RandomPorts, RandomPortsError};

const RANGE: &str = "/proc/sys/net/ipv4/ip_local_port_range";

/// What cannot be done about the range.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The supervisor's word is not there to read.
    #[error("cannot read {0}")]
    Read(&'static str, #[source] io::Error),
    /// The range stays as it is.
    #[error("cannot set {RANGE} to {0}")]
    Write(String, #[source] io::Error),
    /// The supervisor's word.
    #[error(transparent)]
    Word(#[from] RandomPortsError),
}

/// The range that the supervisor gave; clones share it.
#[derive(Clone, Debug, Default)]
pub struct Given(Arc<Mutex<Option<RandomPorts>>>);

impl Given {
    /// Takes over the range of `words`, if there is one.
    ///
    /// # Errors
    /// When it is not understood; the one before holds on.
    pub fn take(&self, words: &str) -> Result<(), RandomPortsError> {
        if let Some(ports) = RandomPorts::find(words).transpose()? {
            *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(ports);
        }
        Ok(())
    }

    /// As the kernel writes it.
    fn range(&self) -> Option<String> {
        let given = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let RandomPorts(ports) = given.as_ref()?;
        Some(format!("{} {}", ports.start(), ports.end()))
    }
}

/// The two ranges.
#[derive(Debug)]
pub struct Ranges {
    dockerd: Given,
    others: String,
}

impl Ranges {
    /// Reads what the supervisor gave, if it did, into `given`.
    ///
    /// # Errors
    /// When it is not understood.
    pub fn find(given: &Given) -> Result<Self, Error> {
        let read = |path| fs::read_to_string(path).map_err(|error| Error::Read(path, error));
        // A fork is started once, and was told already.
        if given.range().is_none() {
            given.take(&read("/proc/cmdline")?)?;
        }
        Ok(Self {
            dockerd: given.clone(),
            others: read(RANGE)?.trim().to_owned(),
        })
    }

    /// Shows dockerd's range to a dockerd that starts, and everybody else's otherwise.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn show(&self, dockerd_starts: bool) -> Result<(), Error> {
        let Some(dockerd) = self.dockerd.range() else {
            return Ok(());
        };
        let range = if dockerd_starts { &dockerd } else { &self.others };
        fs::write(RANGE, range).map_err(|error| Error::Write(range.clone(), error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_range_that_is_understood_holds() {
        let given = Given::default();
        assert_eq!(given.range(), None);
        given.take("quiet").unwrap();
        assert_eq!(given.range(), None);
        given.take("quiet lighter.random-ports=32768-33279").unwrap();
        assert!(given.take("lighter.random-ports=9").is_err());
        assert_eq!(given.range().unwrap(), "32768 33279");
        given.take("lighter.random-ports=33280-33791").unwrap();
        assert_eq!(given.clone().range().unwrap(), "33280 33791");
    }
}
