//! The network interfaces: the loopback, and the one that the supervisor describes
//! ([`lighter_protocol::network::GuestNetwork`]).

use std::{
    fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket},
    os::fd::AsRawFd,
    path::Path,
};

use lighter_protocol::{
    names::NAMESERVER,
    network::{GuestNetwork, NetworkError},
};

/// The only network device of the guest.
const INTERFACE: &str = "eth0";

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
        interface: &'static str,
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
    let alias = Interface::new("lo:0")?;
    alias.set_address(libc::SIOCSIFADDR, "address", NAMESERVER)?;
    alias.set_address(libc::SIOCSIFNETMASK, "network mask", Ipv4Addr::BROADCAST)?;
    write("/etc/resolv.conf", &format!("nameserver {NAMESERVER}\n"))
}

/// Sets up the network that the kernel's command line tells of, if any.
///
/// # Errors
/// When the kernel refuses, or the command line is not understood.
pub fn prepare() -> Result<(), Error> {
    let command_line = fs::read_to_string("/proc/cmdline").map_err(Error::CommandLine)?;
    let Some(network) = GuestNetwork::find(&command_line) else {
        return Ok(());
    };
    let network = network?;
    // The host's prefix is advertised; a router would not listen to that.
    write(&format!("/proc/sys/net/ipv6/conf/{INTERFACE}/accept_ra"), "2")?;
    let interface = Interface::new(INTERFACE)?;
    interface.set_address(libc::SIOCSIFADDR, "address", network.address)?;
    interface.set_address(libc::SIOCSIFNETMASK, "network mask", network.mask())?;
    interface.bring_up()?;
    interface.add_default_route(network.gateway)
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
    let command_line = fs::read_to_string("/proc/cmdline").map_err(Error::CommandLine)?;
    let four = GuestNetwork::find(&command_line).transpose()?;
    // There is no such file in a kernel without IPv6.
    let six = fs::read_to_string("/proc/net/if_inet6").unwrap_or_default();
    let four = four.map(|network| network.address.into());
    Ok(four.into_iter().chain(addresses6(&six)).collect())
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

/// An interface, by the ioctls of netdevice(7).
struct Interface {
    name: &'static str,
    /// Any socket will do; binding to the wildcard address works with every interface down.
    socket: UdpSocket,
}

impl Interface {
    fn new(name: &'static str) -> Result<Self, Error> {
        let socket = UdpSocket::bind(("0.0.0.0", 0)).map_err(Error::Socket)?;
        Ok(Self { name, socket })
    }

    fn request(&self) -> libc::ifreq {
        // SAFETY: an ifreq is plain data, for which zeros are valid.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().zip(self.name.bytes()) {
            *to = libc::c_char::from_ne_bytes([from]);
        }
        request
    }

    fn failed(&self, what: &'static str) -> Error {
        Error::Interface {
            interface: self.name,
            what,
            source: io::Error::last_os_error(),
        }
    }

    fn bring_up(&self) -> Result<(), Error> {
        let mut request = self.request();
        // The flag is 1.
        request.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short;
        // SAFETY: SIOCSIFFLAGS reads an ifreq, which `request` is.
        match unsafe { libc::ioctl(self.socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) } {
            0 => Ok(()),
            _ => Err(self.failed("state")),
        }
    }

    /// `request_code` is one of the ioctls that set an address of the interface; `what` names it.
    fn set_address(
        &self,
        request_code: libc::c_ulong,
        what: &'static str,
        address: Ipv4Addr,
    ) -> Result<(), Error> {
        let mut request = self.request();
        request.ifr_ifru.ifru_addr = socket_address(address);
        // SAFETY: these ioctls read an ifreq, which `request` is.
        match unsafe { libc::ioctl(self.socket.as_raw_fd(), request_code, &raw const request) } {
            0 => Ok(()),
            _ => Err(self.failed(what)),
        }
    }

    fn mac(&self) -> Result<[u8; 6], Error> {
        let mut request = self.request();
        // SAFETY: SIOCGIFHWADDR reads and writes an ifreq, which `request` is.
        match unsafe { libc::ioctl(self.socket.as_raw_fd(), libc::SIOCGIFHWADDR, &raw mut request) } {
            0 => {}
            _ => return Err(self.failed("Ethernet address")),
        }
        // SAFETY: this is the field that SIOCGIFHWADDR sets.
        let data = unsafe { request.ifr_ifru.ifru_hwaddr }.sa_data;
        let mut mac = [0; 6];
        for (to, from) in mac.iter_mut().zip(data) {
            [*to] = from.to_ne_bytes();
        }
        Ok(mac)
    }

    fn set_mac(&self, mac: [u8; 6]) -> Result<(), Error> {
        let mut data = [0; 14];
        for (to, from) in data.iter_mut().zip(mac) {
            *to = libc::c_char::from_ne_bytes([from]);
        }
        let mut request = self.request();
        request.ifr_ifru.ifru_hwaddr = libc::sockaddr {
            sa_family: libc::ARPHRD_ETHER,
            sa_data: data,
        };
        // SAFETY: SIOCSIFHWADDR reads an ifreq, which `request` is.
        match unsafe { libc::ioctl(self.socket.as_raw_fd(), libc::SIOCSIFHWADDR, &raw const request) } {
            0 => Ok(()),
            _ => Err(self.failed("Ethernet address")),
        }
    }

    fn add_default_route(&self, gateway: Ipv4Addr) -> Result<(), Error> {
        // SAFETY: an rtentry is plain data, for which zeros are valid.
        let mut route: libc::rtentry = unsafe { std::mem::zeroed() };
        route.rt_dst = socket_address(Ipv4Addr::UNSPECIFIED);
        route.rt_genmask = socket_address(Ipv4Addr::UNSPECIFIED);
        route.rt_gateway = socket_address(gateway);
        route.rt_flags = libc::RTF_UP | libc::RTF_GATEWAY;
        // SAFETY: SIOCADDRT reads an rtentry, which `route` is.
        match unsafe { libc::ioctl(self.socket.as_raw_fd(), libc::SIOCADDRT, &raw const route) } {
            0 => Ok(()),
            _ => Err(self.failed("default route")),
        }
    }
}

/// A `sockaddr_in` in a `sockaddr`'s clothes.
fn socket_address(address: Ipv4Addr) -> libc::sockaddr {
    let mut data = [0; 14];
    // Port, then address.
    for (to, from) in data[2..6].iter_mut().zip(address.octets()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    libc::sockaddr {
        // The constant is 2.
        sa_family: libc::AF_INET as libc::sa_family_t,
        sa_data: data,
    }
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
