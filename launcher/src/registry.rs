//! Registries, as dockerd's options name them.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// Why a registry cannot be used. dockerd would not start with it.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum RegistryError {
    /// Not the URL of a server.
    #[error("{0:?} is no mirror: a URL such as https://mirror.example.com is")]
    Mirror(String),
    /// Not a host or a network.
    #[error(
        "{0:?} is no registry: HOST[:PORT], such as localhost:5000, or a network, such as 10.0.0.0/8, is, without a scheme"
    )]
    Registry(String),
}

/// A mirror of Docker's registry: a URL without a path.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Mirror(String);

/// A registry, as `HOST[:PORT]` or a network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Registry(String);

/// Whether `text` can be a host, with a port, in a URL.
fn is_host(text: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.:[]".contains(&byte);
    !text.is_empty() && text.bytes().all(plain)
}

impl FromStr for Mirror {
    type Err = RegistryError;

    fn from_str(text: &str) -> Result<Self, RegistryError> {
        let server = text
            .strip_prefix("https://")
            .or_else(|| text.strip_prefix("http://"));
        server
            .filter(|server| is_host(server.strip_suffix('/').unwrap_or(server)))
            .map(|_| Self(text.into()))
            .ok_or_else(|| RegistryError::Mirror(text.into()))
    }
}

impl FromStr for Registry {
    type Err = RegistryError;

    fn from_str(text: &str) -> Result<Self, RegistryError> {
        let good = match text.split_once('/') {
            None => is_host(text),
            Some((address, prefix)) => {
                let longest = address.parse::<std::net::IpAddr>();
                let longest = longest.map(|address| if address.is_ipv4() { 32 } else { 128 });
                longest.is_ok_and(|longest| prefix.parse::<u8>().is_ok_and(|prefix| prefix <= longest))
            }
        };
        good.then(|| Self(text.into()))
            .ok_or_else(|| RegistryError::Registry(text.into()))
    }
}

macro_rules! text {
    ($($type:ident)*) => {$(
        impl TryFrom<String> for $type {
            type Error = RegistryError;

            fn try_from(text: String) -> Result<Self, RegistryError> {
                text.parse()
            }
        }

        impl From<$type> for String {
            fn from(text: $type) -> Self {
                text.0
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    )*};
}

text!(Mirror Registry);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mirrors_are_urls_of_servers() {
        for good in [
            "https://mirror.example.com",
            "http://10.0.0.1:5000",
            "http://[::1]:5000/",
        ] {
            assert_eq!(good.parse::<Mirror>().unwrap().to_string(), good);
        }
        for bad in ["", "mirror.example.com", "https://", "https://a/b", "https://a b"] {
            assert!(bad.parse::<Mirror>().is_err(), "{bad}");
        }
    }

    #[test]
    fn registries_are_hosts_or_networks() {
        for good in [
            "localhost:5000",
            "host.docker.internal:5000",
            "10.0.0.0/8",
            "fd00::/8",
        ] {
            assert_eq!(good.parse::<Registry>().unwrap().to_string(), good);
        }
        for bad in ["", "http://localhost:5000", "10.0.0.0/33", "example.com/8", "a,b"] {
            assert!(bad.parse::<Registry>().is_err(), "{bad}");
        }
    }
}
