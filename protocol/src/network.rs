//! The guest's network, as the supervisor tells it on the kernel's command line: the agent sets the interface up before
//! anything in the guest could ask for it.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr};
use std::str::FromStr;

/// How the word on the command line begins.
pub const WORD: &str = "lighter.network=";

/// How the host's address begins in it.
const HOST: &str = "host:";

/// And how many bytes may be on the way.
const AHEAD: &str = "ahead:";

/// Of addresses and gateways, there are no more than this of each.
pub const MOST: usize = 8;

/// An address with the length of its network's prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address {
    /// The address.
    pub ip: IpAddr,
    /// Bits, as many as there are at most.
    pub prefix: u8,
}

impl Address {
    /// Whether `other` is on the same network.
    pub fn reaches(&self, other: IpAddr) -> bool {
        let network = |ip, prefix: u8, bits: u32| match ip {
            IpAddr::V4(ip) => u128::from(ip.to_bits()).checked_shr(bits - u32::from(prefix)),
            IpAddr::V6(ip) => ip.to_bits().checked_shr(bits - u32::from(prefix)),
        };
        let bits = if self.ip.is_ipv4() { 32 } else { 128 };
        self.ip.is_ipv4() == other.is_ipv4()
            && network(self.ip, self.prefix, bits) == network(other, self.prefix, bits)
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.ip, self.prefix)
    }
}

impl FromStr for Address {
    type Err = NetworkError;

    fn from_str(text: &str) -> Result<Self, NetworkError> {
        let parse = || {
            let (ip, prefix) = text.split_once('/')?;
            let ip: IpAddr = ip.parse().ok()?;
            let most = if ip.is_ipv4() { 32 } else { 128 };
            let prefix = prefix.parse().ok().filter(|prefix| *prefix <= most)?;
            Some(Self { ip, prefix })
        };
        parse().ok_or_else(|| NetworkError(text.into()))
    }
}

/// Settings of the guest's interface; IPv6 comes by router advertisements as well.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestNetwork {
    /// The guest's addresses.
    pub addresses: Vec<Address>,
    /// The default route of each family.
    pub gateways: Vec<IpAddr>,
    /// The host as the guest reaches it, if it does.
    pub host: Option<Ipv4Addr>,
    /// What a TCP connection's other end may send ahead of the guest, bytes, where that is less than usual.
    pub ahead: Option<u32>,
}

/// The address behind passt that stands for the host, where the guest may reach it, and for the way out.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(192, 168, 127, 1);

/// Less than what fits into passt's socket with the usual limit of the host's (net.core.wmem_max; 416 KiB). What does not fit is lost, and
/// passt sends it again after seconds. The round trip to passt is a fraction of a millisecond, so that more is of no use.
const PASST_AHEAD: u32 = 256 << 10;

impl GuestNetwork {
    /// The network that passt makes: each guest is alone on its own.
    pub fn of_passt() -> Self {
        let ip = Ipv4Addr::new(192, 168, 127, 2).into();
        Self {
            addresses: vec![Address { ip, prefix: 24 }],
            gateways: vec![GATEWAY.into()],
            host: Some(GATEWAY),
            ahead: Some(PASST_AHEAD),
        }
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
        let addresses = self.addresses.iter().map(ToString::to_string);
        let gateways = self.gateways.iter().map(ToString::to_string);
        let host = self.host.iter().map(|host| format!("{HOST}{host}"));
        let ahead = self.ahead.iter().map(|ahead| format!("{AHEAD}{ahead}"));
        let parts: Vec<String> = addresses.chain(gateways).chain(host).chain(ahead).collect();
        write!(f, "{WORD}{}", parts.join(","))
    }
}

/// The word's value is not understood.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no network that could be set up (ADDRESS/PREFIX,…,GATEWAY,… is)")]
pub struct NetworkError(String);

impl FromStr for GuestNetwork {
    type Err = NetworkError;

    fn from_str(text: &str) -> Result<Self, NetworkError> {
        let failed = || NetworkError(text.into());
        let mut network = Self {
            addresses: vec![],
            gateways: vec![],
            host: None,
            ahead: None,
        };
        for part in text.split(',') {
            match (part.strip_prefix(HOST), part.strip_prefix(AHEAD)) {
                (Some(host), _) => network.host = Some(host.parse().map_err(|_| failed())?),
                (_, Some(ahead)) => network.ahead = Some(ahead.parse().map_err(|_| failed())?),
                _ if part.contains('/') => network.addresses.push(part.parse()?),
                _ => network.gateways.push(part.parse().map_err(|_| failed())?),
            }
        }
        let possible = 1..=MOST;
        match possible.contains(&network.addresses.len()) && network.gateways.len() <= MOST {
            true => Ok(network),
            false => Err(failed()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_found_again() {
        let network = GuestNetwork::of_passt();
        let word = "lighter.network=192.168.127.2/24,192.168.127.1,host:192.168.127.1,ahead:262144";
        assert_eq!(network.to_string(), word);
        let line = format!("quiet {network} ro");
        assert_eq!(GuestNetwork::find(&line), Some(Ok(network)));
        assert_eq!(GuestNetwork::find("quiet ro"), None);
        let word = "lighter.network=10.0.0.2/8,fd00::2/64,10.0.0.1,fd00::1";
        let network = GuestNetwork::find(word).unwrap().unwrap();
        assert_eq!((network.addresses.len(), network.gateways.len()), (2, 2));
        assert_eq!((network.host, network.to_string()), (None, word.into()));
    }

    #[test]
    fn an_address_knows_who_is_on_its_network() {
        for (address, other, reached) in [
            ("192.168.50.2/24", "192.168.50.1", true),
            ("192.168.50.2/24", "192.168.51.1", false),
            ("192.168.50.2/32", "192.168.50.1", false),
            ("192.168.50.2/0", "10.0.0.1", true),
            ("192.168.50.2/0", "::1", false),
            ("fd00::2/64", "fd00::1", true),
            ("fd00::2/64", "fd00:0:0:1::1", false),
            ("fd00::2/0", "2001:db8::", true),
        ] {
            let address: Address = address.parse().unwrap();
            assert_eq!(
                address.reaches(other.parse().unwrap()),
                reached,
                "{address} {other}"
            );
        }
    }

    #[test]
    fn nonsense_is_refused() {
        for bad in [
            "",
            "1.2.3.4",
            "1.2.3.4/33,1.1.1.1",
            "::/129",
            "1.2.3.4/8,1.1.1.1,x",
            "1.2.3.4/8,host:::1",
            "1.2.3.4/8,ahead:-1",
            &["1.2.3.4/8"; MOST + 1].join(","),
        ] {
            assert!(
                GuestNetwork::find(&format!("{WORD}{bad}")).unwrap().is_err(),
                "{bad:?}"
            );
        }
    }
}
