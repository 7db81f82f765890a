//! Published ports. For each, dockerd runs a proxy in the guest, which connects to [`crate::ports::HOST_PUBLISH`] and
//! sends one [`Publish`]; the supervisor answers with one [`Reply`]. Both are frames ([`crate::frame`]).
//!
//! The port is published for as long as that connection is open. When the proxy ends its direction, the supervisor takes
//! the port back and then ends its own: a proxy that waits for this knows that the port is free.
//!
//! For each client the supervisor connects to [`Publish::guest_port`]: with TCP the bytes follow as they are, with UDP
//! datagrams, each behind its length (16 bits big endian), one connection for each client.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::str::FromStr;

/// The longest [`Publish`] or [`Reply`] either end accepts, bytes with their frame.
pub const MAX_MESSAGE: usize = 2048;

/// What is spoken on a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// Byte streams.
    Tcp,
    /// Datagrams.
    Udp,
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

/// From the proxy: publish a port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Publish {
    /// What is spoken on it.
    pub transport: Transport,
    /// Where on the host, as the user asked for it: the unspecified address means all of its family.
    pub host: SocketAddr,
    /// Where in the guest it leads to, for people to read.
    pub container: SocketAddr,
    /// The vsock port of the guest on which the proxy takes the clients.
    pub guest_port: u32,
    /// It was published before, by another VM or in another life of this one: the VM was started from a snapshot. A container
    /// that runs is not to be failed, so that it gets another port where this one is taken.
    #[serde(default)]
    pub again: bool,
}

/// From the supervisor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "kebab-case")]
pub enum Reply {
    /// Clients can come.
    Published,
    /// It cannot be published.
    Refused {
        /// What failed, on what, and what to do: one line.
        reason: String,
    },
}

/// A published port as `lighter ports` shows it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct PublishedPort {
    /// Where on the host.
    pub host: SocketAddr,
    /// What is spoken on it.
    pub transport: Transport,
    /// Where in the guest it leads to.
    pub container: SocketAddr,
    /// Where on the host it was to be, if that was taken ([`Publish::again`]).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instead_of: Option<SocketAddr>,
}

/// How the word for [`RandomPorts`] begins.
pub const WORD: &str = "lighter.random-ports=";

/// The ports from which the guest's kernel, and with it dockerd, takes those that nobody chose. The supervisor gives
/// each VM others, by a word on the kernel's command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RandomPorts(pub RangeInclusive<u16>);

impl RandomPorts {
    /// Finds the ports on a command line, if they are there.
    ///
    /// # Errors
    /// When they are not understood.
    pub fn find(command_line: &str) -> Option<Result<Self, RandomPortsError>> {
        let mut words = command_line.split_ascii_whitespace();
        words.find_map(|word| word.strip_prefix(WORD)).map(str::parse)
    }
}

impl fmt::Display for RandomPorts {
    /// The word for the command line.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}-{}", WORD, self.0.start(), self.0.end())
    }
}

/// The word's value is not understood.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{WORD}{0} on the kernel's command line is not understood (FIRST-LAST is)")]
pub struct RandomPortsError(String);

impl FromStr for RandomPorts {
    type Err = RandomPortsError;

    fn from_str(text: &str) -> Result<Self, RandomPortsError> {
        let parse = || {
            let (first, last) = text.split_once('-')?;
            let ports: RangeInclusive<u16> = first.parse().ok()?..=last.parse().ok()?;
            (*ports.start() > 0 && !ports.is_empty()).then_some(Self(ports))
        };
        parse().ok_or_else(|| RandomPortsError(text.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_ports_are_found_as_they_were_written() {
        let ports = RandomPorts(32768..=33279);
        assert_eq!(ports.to_string(), "lighter.random-ports=32768-33279");
        let line = format!("quiet {ports} ro");
        assert_eq!(RandomPorts::find(&line), Some(Ok(ports)));
        assert_eq!(RandomPorts::find("quiet"), None);
        for bad in ["", "1", "2-1", "0-5", "1-65536", "1-2-3"] {
            let found = RandomPorts::find(&format!("lighter.random-ports={bad}"));
            assert!(found.unwrap().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn the_longest_messages_fit() {
        let address: SocketAddr = "[ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff]:65535".parse().unwrap();
        let publish = Publish {
            transport: Transport::Tcp,
            host: address,
            container: address,
            guest_port: u32::MAX,
            again: false,
        };
        assert!(crate::frame::encode_message(&publish).unwrap().len() <= MAX_MESSAGE);
        let json = serde_json::to_string(&publish).unwrap();
        assert!(json.contains(r#""transport":"tcp","host":"[ffff:"#), "{json}");
    }
}
