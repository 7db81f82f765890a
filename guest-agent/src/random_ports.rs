//! Ports that nobody chose (`docker run -P`, `-p 80`). dockerd reads the kernel's range of them when it starts, and does
//! not ask again; each VM has one of its own from the supervisor ([`lighter_protocol::publish::RandomPorts`]), so that
//! engines do not choose the same. The rest of the guest needs more ports than that: it has them while dockerd runs.

use std::{fs, io};

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

/// The two ranges.
#[derive(Debug)]
pub struct Ranges {
    dockerd: String,
    others: String,
}

impl Ranges {
    /// Reads what the supervisor gave, if it did.
    ///
    /// # Errors
    /// When it is not understood.
    pub fn find() -> Result<Option<Self>, Error> {
        let read = |path| fs::read_to_string(path).map_err(|error| Error::Read(path, error));
        let Some(ports) = RandomPorts::find(&read("/proc/cmdline")?) else {
            return Ok(None);
        };
        let RandomPorts(ports) = ports?;
        Ok(Some(Self {
            dockerd: format!("{} {}", ports.start(), ports.end()),
            others: read(RANGE)?.trim().to_owned(),
        }))
    }

    /// Shows dockerd's range to a dockerd that starts, and everybody else's otherwise.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn show(&self, dockerd_starts: bool) -> Result<(), Error> {
        let range = if dockerd_starts {
            &self.dockerd
        } else {
            &self.others
        };
        fs::write(RANGE, range).map_err(|error| Error::Write(range.clone(), error))
    }
}
