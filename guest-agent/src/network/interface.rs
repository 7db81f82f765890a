//! An interface of the guest's, set up by ioctls.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket},
    os::fd::AsRawFd,
};

use lighter_protocol::network::Address;

use super::Error;

/// An interface, by the ioctls of netdevice(7).
pub(super) struct Interface {
    name: String,
    /// Any socket will do; binding to the wildcard address works with every interface down.
    socket: UdpSocket,
}

impl Interface {
    pub(super) fn new(name: &str) -> Result<Self, Error> {
        let socket = UdpSocket::bind(("0.0.0.0", 0)).map_err(Error::Socket)?;
        Ok(Self {
            name: name.into(),
            socket,
        })
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
            interface: self.name.clone(),
            what,
            source: io::Error::last_os_error(),
        }
    }

    pub(super) fn bring_up(&self) -> Result<(), Error> {
        let mut request = self.request();
        // The flag is 1.
        request.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short;
        // SAFETY: SIOCSIFFLAGS reads an ifreq, which `request` is.
        match unsafe { libc::ioctl(self.socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) } {
            0 => Ok(()),
            _ => Err(self.failed("state")),
        }
    }

    /// Gives it an address of either family.
    pub(super) fn add_address(&self, address: Address) -> Result<(), Error> {
        match address.ip {
            IpAddr::V4(ip) => {
                let mask = u32::MAX.checked_shl(32 - u32::from(address.prefix)).unwrap_or(0);
                self.set_address4(libc::SIOCSIFADDR, "address", ip)?;
                self.set_address4(libc::SIOCSIFNETMASK, "network mask", Ipv4Addr::from_bits(mask))
            }
            IpAddr::V6(ip) => self.add_address6(ip, address.prefix),
        }
    }

    /// `request_code` is one of the ioctls that set an address of the interface; `what` names it.
    fn set_address4(
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

    fn add_address6(&self, address: Ipv6Addr, prefix: u8) -> Result<(), Error> {
        const WHAT: &str = "IPv6 address";
        let request = In6Request {
            address: address.octets(),
            prefix: prefix.into(),
            index: self.index(WHAT)?,
        };
        let socket = self.socket6()?;
        // SAFETY: on a socket of this family, SIOCSIFADDR reads an in6_ifreq, which `request` is.
        match unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFADDR, &raw const request) } {
            0 => Ok(()),
            _ => Err(self.failed(WHAT)),
        }
    }

    /// A socket of the new family, for its requests.
    fn socket6(&self) -> Result<UdpSocket, Error> {
        UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0)).map_err(Error::Socket)
    }

    /// Its number, which requests of the new family want; `what` is to be set.
    fn index(&self, what: &'static str) -> Result<libc::c_int, Error> {
        let mut request = self.request();
        // SAFETY: SIOCGIFINDEX reads and writes an ifreq, which `request` is, and sets this field.
        unsafe {
            match libc::ioctl(self.socket.as_raw_fd(), libc::SIOCGIFINDEX, &raw mut request) {
                0 => Ok(request.ifr_ifru.ifru_ifindex),
                _ => Err(self.failed(what)),
            }
        }
    }

    pub(super) fn mac(&self) -> Result<[u8; 6], Error> {
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

    pub(super) fn set_mac(&self, mac: [u8; 6]) -> Result<(), Error> {
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

    /// Has it lead everywhere, by `gateway`.
    pub(super) fn add_default_route(&self, gateway: IpAddr) -> Result<(), Error> {
        match gateway {
            IpAddr::V4(gateway) => self.add_default_route4(gateway),
            IpAddr::V6(gateway) => self.add_default_route6(gateway),
        }
    }

    fn add_default_route4(&self, gateway: Ipv4Addr) -> Result<(), Error> {
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

    fn add_default_route6(&self, gateway: Ipv6Addr) -> Result<(), Error> {
        const WHAT: &str = "IPv6 default route";
        let route = In6Route {
            destination: [0; 16],
            source: [0; 16],
            gateway: gateway.octets(),
            type_: 0,
            destination_bits: 0,
            source_bits: 0,
            metric: 1,
            info: 0,
            flags: u32::from(libc::RTF_UP | libc::RTF_GATEWAY),
            index: self.index(WHAT)?,
        };
        let socket = self.socket6()?;
        // SAFETY: on a socket of this family, SIOCADDRT reads an in6_rtmsg, which `route` is.
        match unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCADDRT, &raw const route) } {
            0 => Ok(()),
            _ => Err(self.failed(WHAT)),
        }
    }
}

/// `struct in6_ifreq` of linux/ipv6.h.
#[repr(C)]
struct In6Request {
    address: [u8; 16],
    prefix: u32,
    index: libc::c_int,
}

/// `struct in6_rtmsg` of linux/ipv6_route.h.
#[repr(C)]
struct In6Route {
    destination: [u8; 16],
    source: [u8; 16],
    gateway: [u8; 16],
    type_: u32,
    destination_bits: u16,
    source_bits: u16,
    metric: u32,
    info: libc::c_ulong,
    flags: u32,
    index: libc::c_int,
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
