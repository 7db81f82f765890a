//! The setting how a VM reaches the network.

use lighter_protocol::network::{Address, MOST};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

/// Why a text is no such setting.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NetworkError {
    /// Not one of the kinds.
    #[error("{0:?} is no network: passt, none, and tap:INTERFACE,address=ADDRESS/PREFIX,gateway=ADDRESS are")]
    Kind(String),
    /// No interface can have that name.
    #[error("{0:?} cannot be an interface's name")]
    Interface(String),
    /// Not an address with a prefix.
    #[error(
        "{0:?} is no address of the guest's: one with its prefix is, such as 192.168.50.2/24 or fd00:50::2/64"
    )]
    Address(String),
    /// Nobody would give it one.
    #[error(
        "the guest needs an address on {0}, such as tap:{0},address=192.168.50.2/24,gateway=192.168.50.1: it asks no DHCP server"
    )]
    NoAddress(String),
    /// Not an address, or one that is not there.
    #[error("{0:?} is no gateway of the guest's: an address on one of its networks is, one of each family")]
    Gateway(String),
    /// Too many.
    #[error("a guest has at most {MOST} addresses")]
    TooMany,
}

/// How a VM reaches the network.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Network {
    /// By passt, as a program of its user's does.
    #[default]
    Passt,
    /// Not at all.
    None,
    /// By an interface of the host's.
    Tap(Tap),
}

/// An interface of the host's, and who the guest is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tap {
    /// Its name.
    pub interface: String,
    /// The guest's addresses, one at least.
    pub addresses: Vec<Address>,
    /// Its default routes, at most one of each family.
    pub gateways: Vec<IpAddr>,
}

impl Network {
    /// Whether it is what a VM has of which nothing was said.
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

impl FromStr for Tap {
    type Err = NetworkError;

    fn from_str(text: &str) -> Result<Self, NetworkError> {
        let mut parts = text.split(',');
        let interface = parts.next().unwrap_or_default().to_owned();
        // As the kernel wants it; and a path must not be made of it.
        let possible = |byte: u8| byte.is_ascii_graphic() && !b"/:%".contains(&byte);
        if interface.is_empty()
            || interface.len() > 15
            || [".", ".."].contains(&&*interface)
            || !interface.bytes().all(possible)
        {
            return Err(NetworkError::Interface(interface));
        }
        let mut tap = Self {
            interface,
            addresses: vec![],
            gateways: vec![],
        };
        for part in parts {
            match part.split_once('=') {
                Some(("address", address)) => {
                    let parsed = address.parse();
                    tap.addresses
                        .push(parsed.map_err(|_| NetworkError::Address(address.into()))?);
                }
                Some(("gateway", gateway)) => {
                    let parsed = gateway.parse();
                    tap.gateways
                        .push(parsed.map_err(|_| NetworkError::Gateway(gateway.into()))?);
                }
                _ => return Err(NetworkError::Kind(format!("tap:{text}"))),
            }
        }
        match tap.addresses.len() {
            0 => return Err(NetworkError::NoAddress(tap.interface)),
            1..=MOST => {}
            _ => return Err(NetworkError::TooMany),
        }
        for (number, gateway) in tap.gateways.iter().enumerate() {
            let mut addresses = tap.addresses.iter();
            let before = &tap.gateways[..number];
            let is_local = matches!(gateway, IpAddr::V6(ip) if ip.is_unicast_link_local());
            let reached = addresses.any(|address| address.reaches(*gateway) && address.ip != *gateway);
            if !(reached || is_local) || before.iter().any(|other| other.is_ipv4() == gateway.is_ipv4()) {
                return Err(NetworkError::Gateway(gateway.to_string()));
            }
        }
        Ok(tap)
    }
}

impl FromStr for Network {
    type Err = NetworkError;

    fn from_str(text: &str) -> Result<Self, NetworkError> {
        match text {
            "passt" => Ok(Self::Passt),
            "none" => Ok(Self::None),
            _ => match text.strip_prefix("tap:") {
                Some(tap) => tap.parse().map(Self::Tap),
                None => Err(NetworkError::Kind(text.into())),
            },
        }
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Passt => f.write_str("passt"),
            Self::None => f.write_str("none"),
            Self::Tap(tap) => {
                write!(f, "tap:{}", tap.interface)?;
                for address in &tap.addresses {
                    write!(f, ",address={address}")?;
                }
                for gateway in &tap.gateways {
                    write!(f, ",gateway={gateway}")?;
                }
                Ok(())
            }
        }
    }
}

impl TryFrom<String> for Network {
    type Error = NetworkError;

    fn try_from(text: String) -> Result<Self, NetworkError> {
        text.parse()
    }
}

impl From<Network> for String {
    fn from(network: Network) -> Self {
        network.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_again() {
        for text in [
            "passt",
            "none",
            "tap:tap0,address=192.168.50.2/24",
            "tap:br-x.5,address=192.168.50.2/24,address=fd00:50::2/64,gateway=192.168.50.1,gateway=fe80::1",
        ] {
            let network: Network = text.parse().unwrap();
            assert_eq!(network.to_string(), text);
            assert_eq!(network.is_default(), text == "passt");
        }
    }

    #[test]
    fn each_mistake_is_told() {
        for (text, told) in [
            ("bridge", "\"bridge\" is no network"),
            ("", "is no network"),
            ("tap:", "interface's name"),
            ("tap:a/b,address=10.0.0.2/8", "interface's name"),
            ("tap:longer-than-it-may-be,address=10.0.0.2/8", "interface's name"),
            ("tap:tap0", "needs an address on tap0"),
            ("tap:tap0,gateway=10.0.0.1", "needs an address on tap0"),
            ("tap:tap0,address=10.0.0.2", "\"10.0.0.2\" is no address"),
            ("tap:tap0,address=10.0.0.2/33", "is no address"),
            ("tap:tap0,mtu=9000", "is no network"),
            (
                "tap:tap0,address=10.0.0.2/24,gateway=10.0.1.1",
                "\"10.0.1.1\" is no gateway",
            ),
            ("tap:tap0,address=10.0.0.2/24,gateway=10.0.0.2", "is no gateway"),
            (
                "tap:tap0,address=10.0.0.2/24,gateway=10.0.0.1,gateway=10.0.0.3",
                "\"10.0.0.3\" is no gateway",
            ),
        ] {
            let error = text.parse::<Network>().unwrap_err().to_string();
            assert!(error.contains(told), "{text}: {error}");
        }
    }
}
