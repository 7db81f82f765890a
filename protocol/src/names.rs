//! Questions about names: the agent takes them from the guest, the supervisor has the host answer.
//!
//! The agent connects to [`crate::ports::HOST_NAMES`], once for each datagram and each TCP connection of a client. The first
//! byte is the [`Transport`]; after it every message of DNS follows its length, as over TCP (RFC 1035, section 4.2.2).

use std::net::Ipv4Addr;

/// Where the agent takes questions, port 53: an address of the guest's loopback interface, which containers reach by the
/// guest's routes. It is in the network that passt makes, so that no other of the user's is hidden.
pub const NAMESERVER: Ipv4Addr = Ipv4Addr::new(192, 168, 127, 3);

/// What containers call the host by.
pub const HOST: [&str; 2] = ["host.docker.internal", "gateway.docker.internal"];

/// How a question came. An answer to a datagram has to fit into one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// One question, one answer.
    Udp,
    /// Any number of them.
    Tcp,
}

impl Transport {
    /// The first byte of a connection.
    pub const fn byte(self) -> u8 {
        match self {
            Self::Udp => b'u',
            Self::Tcp => b't',
        }
    }

    /// The transport that `byte` stands for.
    pub const fn from_byte(byte: u8) -> Option<Self> {
        match byte {
            b'u' => Some(Self::Udp),
            b't' => Some(Self::Tcp),
            _ => None,
        }
    }
}

/// The length of a message's header, bytes (RFC 1035, section 4.1.1).
pub const HEADER: usize = 12;

/// `message` behind its length; `None` when it is longer than DNS allows.
pub fn framed(message: &[u8]) -> Option<Vec<u8>> {
    let length = u16::try_from(message.len()).ok()?;
    Some([&length.to_be_bytes()[..], message].concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_transport_is_what_it_was() {
        for transport in [Transport::Udp, Transport::Tcp] {
            assert_eq!(Transport::from_byte(transport.byte()), Some(transport));
        }
        assert_eq!(Transport::from_byte(0), None);
    }

    #[test]
    fn a_message_follows_its_length() {
        assert_eq!(framed(b"ab").unwrap(), b"\0\x02ab");
        assert_eq!(framed(&[0; 65_536]), None);
    }
}
