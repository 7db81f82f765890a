//! The network interfaces: the loopback, and the one that the supervisor describes
//! ([`lighter_protocol::network::GuestNetwork`]).

mod interface;

use std::{
    fs, io,
    net::{IpAddr, Ipv6Addr},
    path::Path,
};

use lighter_protocol::{
    names::NAMESERVER,
    network::{Address, GuestNetwork, NetworkError},
};

use interface::Interface;

/// The only network device of the guest.
const INTERFACE: &str = "eth0";

/// Room for what a new TCP connection receives, bytes: Linux's own.
const FIRST_ROOM: u32 = 128 << 10;

/// What cannot be done about the network.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No socket to set interfaces up with.
    #[error("cannot open a socket to set up the network")]
    Socket(#[source] io::Error),
    /// A setting of an interface.
    #[error("cannot set the {what} of interface {interface}")]
    Interface {
        /// Which interface.
        interface: String,
        /// Which setting.
        what: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file.
    #[error("cannot write {0}")]
    Write(String, #[source] io::Error),
    /// What to set up is not known.
    #[error("cannot read the kernel's command line")]
    CommandLine(#[source] io::Error),
    /// The supervisor's words.
    #[error(transparent)]
    Network(#[from] NetworkError),
}

/// Brings up the loopback interface, with the name server's address besides its own.
///
/// # Errors
/// When the kernel refuses.
pub fn bring_up_loopback() -> Result<(), Error> {
    Interface::new("lo")?.bring_up()?;
    Interface::new("lo:0")?.add_address(Address {
        ip: NAMESERVER.into(),
        prefix: 32,
    })?;
    write("/etc/resolv.conf", &format!("nameserver {NAMESERVER}\n"))
}

/// What the kernel's command line tells of the network, if there is any.
///
/// # Errors
/// When it is not understood.
pub fn described() -> Result<Option<GuestNetwork>, Error> {
    let command_line = fs::read_to_string("/proc/cmdline").map_err(Error::CommandLine)?;
    Ok(GuestNetwork::find(&command_line).transpose()?)
}

/// Sets up the network that the kernel's command line tells of, if any.
///
/// # Errors
/// When the kernel refuses, or the command line is not understood.
pub fn prepare() -> Result<(), Error> {
    let Some(network) = described()? else {
        return Ok(());
    };
    if let Some(ahead) = network.ahead {
        // Least, first and most room for what was received; containers' networks begin with the same.
        write(
            "/proc/sys/net/ipv4/tcp_rmem",
            &format!("4096 {} {ahead}", ahead.min(FIRST_ROOM)),
        )?;
    }
    // The host's prefix is advertised; a router would not listen to that.
    write(&format!("/proc/sys/net/ipv6/conf/{INTERFACE}/accept_ra"), "2")?;
    let interface = Interface::new(INTERFACE)?;
    // The kernel knows the second and later addresses of the old family by names of their own.
    let (four, six): (Vec<_>, Vec<_>) = network
        .addresses
        .into_iter()
        .partition(|address| address.ip.is_ipv4());
    for (number, address) in four.into_iter().enumerate() {
        match number {
            0 => interface.add_address(address)?,
            number => Interface::new(&format!("{INTERFACE}:{number}"))?.add_address(address)?,
        }
    }
    interface.bring_up()?;
    // Before it is up, the kernel takes none of these.
    for address in six {
        interface.add_address(address)?;
    }
    let mut gateways = network.gateways.into_iter();
    gateways.try_for_each(|gateway| interface.add_default_route(gateway))
}

/// Begins anew on a network that is another, though it looks the same: the neighbours are forgotten, and with `mac` the Ethernet
/// address is another, too. Addresses and routes stay. A guest without a network stays without.
///
/// # Errors
/// When the kernel refuses.
pub fn renew(mac: Option<[u8; 6]>) -> Result<(), Error> {
    if !Path::new("/sys/class/net").join(INTERFACE).exists() {
        return Ok(());
    }
    let interface = Interface::new(INTERFACE)?;
    let mac = match mac {
        Some(mac) => mac,
        None => interface.mac()?,
    };
    // The kernel forgets the neighbours of an interface when its address is set, whether it changes or not.
    interface.set_mac(mac)
}

/// The guest's addresses on its network.
///
/// # Errors
/// When they cannot be read.
pub fn addresses() -> Result<Vec<IpAddr>, Error> {
    let described = described()?.map(|network| network.addresses).unwrap_or_default();
    let four = described
        .into_iter()
        .map(|address| address.ip)
        .filter(IpAddr::is_ipv4);
    // There is no such file in a kernel without IPv6.
    let six = fs::read_to_string("/proc/net/if_inet6").unwrap_or_default();
    Ok(four.chain(addresses6(&six)).collect())
}

/// Reads those of the interface in /proc/net/if_inet6: an address in each line, as 32 digits, the name last.
fn addresses6(text: &str) -> impl Iterator<Item = IpAddr> {
    text.lines().filter_map(|line| {
        let digits = line.strip_suffix(INTERFACE)?.split_ascii_whitespace().next()?;
        let bits = u128::from_str_radix(digits, 16).ok()?;
        Some(Ipv6Addr::from_bits(bits).into())
    })
}

fn write(path: &str, text: &str) -> Result<(), Error> {
    fs::write(path, text).map_err(|error| Error::Write(path.into(), error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interface_s_own_addresses_are_found() {
        let text = "\
00000000000000000000000000000001 01 80 10 80       lo
fe8000000000000000000000000000a2 02 40 20 80     eth0
fd000000000000000000000000000007 03 40 00 80 docker0
20010db8000000000000000000000009 02 40 00 00     eth0
";
        let found: Vec<String> = addresses6(text).map(|address| address.to_string()).collect();
        assert_eq!(found, ["fe80::a2", "2001:db8::9"]);
    }
}
