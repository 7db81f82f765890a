//! The guest's network, as the supervisor tells it on the kernel's command line: the agent sets the interface up before
//! anything in the guest could ask for it.

use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

/// How the word on the command line begins.
pub const WORD: &str = "lighter.network=";

/// The only network there is: each guest is alone on its own. The gateway stands for the host where the guest may reach it.
pub const NETWORK: GuestNetwork = GuestNetwork {
    address: Ipv4Addr::new(192, 168, 127, 2),
    prefix: 24,
    gateway: Ipv4Addr::new(192, 168, 127, 1),
};

/// IPv4 settings; IPv6 comes by router advertisements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestNetwork {
    /// The guest's address.
    pub address: Ipv4Addr,
    /// Length of its network's prefix, bits.
    pub prefix: u8,
    /// The default route.
    pub gateway: Ipv4Addr,
}

impl GuestNetwork {
    /// The network mask of [`Self::prefix`].
    pub fn mask(&self) -> Ipv4Addr {
        let host_bits = 32 - u32::from(self.prefix.min(32));
        Ipv4Addr::from_bits(u32::MAX.checked_shl(host_bits).unwrap_or(0))
    }

    /// Finds the settings on a command line; `None` when there is no network.
    ///
    /// # Errors
    /// When they are not understood.
    pub fn find(command_line: &str) -> Option<Result<Self, NetworkError>> {
        let mut words = command_line.split_ascii_whitespace();
        words.find_map(|word| word.strip_prefix(WORD)).map(str::parse)
    }
}

impl fmt::Display for GuestNetwork {
    /// The word for the command line.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            address,
            prefix,
            gateway,
        } = self;
        write!(f, "{WORD}{address}/{prefix},{gateway}")
    }
}

/// The word's value is not understood.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{WORD}{0} on the kernel's command line is not understood (ADDRESS/PREFIX,GATEWAY is)")]
pub struct NetworkError(String);

impl FromStr for GuestNetwork {
    type Err = NetworkError;

    fn from_str(text: &str) -> Result<Self, NetworkError> {
        let parse = || {
            let (network, gateway) = text.split_once(',')?;
            let (address, prefix) = network.split_once('/')?;
            Some(Self {
                address: address.parse().ok()?,
                prefix: prefix.parse().ok().filter(|prefix| *prefix <= 32)?,
                gateway: gateway.parse().ok()?,
            })
        };
        parse().ok_or_else(|| NetworkError(text.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_found_again() {
        let network = NETWORK;
        assert_eq!(
            network.to_string(),
            "lighter.network=192.168.127.2/24,192.168.127.1"
        );
        let line = format!("quiet {network} ro");
        assert_eq!(GuestNetwork::find(&line), Some(Ok(network)));
        assert_eq!(GuestNetwork::find("quiet ro"), None);
        assert_eq!(network.mask(), Ipv4Addr::new(255, 255, 255, 0));
        assert_eq!(
            GuestNetwork { prefix: 0, ..network }.mask(),
            Ipv4Addr::UNSPECIFIED
        );
        assert_eq!(
            GuestNetwork {
                prefix: 32,
                ..network
            }
            .mask(),
            Ipv4Addr::BROADCAST
        );
    }

    #[test]
    fn nonsense_is_refused() {
        for bad in [
            "",
            "1.2.3.4",
            "1.2.3.4/33,1.1.1.1",
            "1.2.3.4/8",
            "1.2.3.4/8,1.1.1.1,x",
        ] {
            assert!(
                GuestNetwork::find(&format!("{WORD}{bad}")).unwrap().is_err(),
                "{bad:?}"
            );
        }
    }
}
