//! A tap: an interface of the host's whose other end is a descriptor, which the monitor gets. Whoever administers the host made it
//! for this user; nothing of it is changed here but who holds that end.

use crate::error::{Context, Error, Result};
use rustix::ioctl::{Opcode, Setter, Updater, ioctl, opcode};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
use std::ffi::c_int;
use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};

/// Where every tap is opened.
const DEVICE: &str = "/dev/net/tun";

/// TUNSETIFF and TUNSETVNETHDRSZ of linux/if_tun.h; SIOCGIFFLAGS and SIOCGIFMTU.
const SET_INTERFACE: Opcode = opcode::write::<c_int>(b'T', 202);
const SET_HEADER_LENGTH: Opcode = opcode::write::<c_int>(b'T', 216);
const GET_FLAGS: Opcode = 0x8913;
const GET_MTU: Opcode = 0x8921;

/// IFF_TAP, IFF_NO_PI, IFF_VNET_HDR: Ethernet frames behind virtio's header, and nothing else.
const TAP_FLAGS: u32 = 0x0002 | 0x1000 | 0x4000;

/// IFF_UP.
const UP: u32 = 1;

/// Length of that header, as drivers of today have it.
const HEADER: c_int = 12;

/// A tap that was opened.
#[derive(Debug)]
pub struct Tap {
    /// For the monitor.
    pub descriptor: OwnedFd,
    /// The largest packet, bytes.
    pub mtu: u16,
    /// Whether somebody has brought it up.
    pub is_up: bool,
}

/// `struct ifreq`: a name and a union, of which the first 32 bits at most are used here.
#[repr(C)]
struct Request {
    name: [u8; 16],
    value: [u8; 4],
    rest: [u8; 20],
}

impl Request {
    fn new(interface: &str, value: u32) -> Self {
        let mut name = [0; 16];
        // One byte less than there is room for, at most.
        for (to, from) in name.iter_mut().zip(interface.bytes()) {
            *to = from;
        }
        Self {
            name,
            value: value.to_ne_bytes(),
            rest: [0; 20],
        }
    }

    /// What the kernel has answered.
    fn ask<const OPCODE: Opcode>(mut self, of: impl AsFd) -> rustix::io::Result<u32> {
        // SAFETY: the requests that are made here read and write an ifreq.
        unsafe { ioctl(of, Updater::<OPCODE, Self>::new(&mut self)) }?;
        Ok(u32::from_ne_bytes(self.value))
    }
}

/// Takes the other end of `interface`.
///
/// # Errors
/// When it is not there, no tap, not this user's, or another's at the moment; with what to do.
pub fn open(interface: &str) -> Result<Tap> {
    let socket = socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)
        .context(|| "cannot make a socket to ask about interfaces".into())?;
    let make = format!(
        "make it once (as long as the host is not restarted): sudo ip tuntap add dev {interface} mode tap user $USER; sudo \
         ip link set {interface} up; then give it an address, or a bridge: sudo ip link set {interface} master BRIDGE"
    );
    let flags = Request::new(interface, 0).ask::<GET_FLAGS>(&socket);
    // For root, the kernel would make one.
    let flags = flags.map_err(|error| match io::Error::from(error) {
        error if error.raw_os_error() == Some(rustix::io::Errno::NODEV.raw_os_error()) => {
            Error::failure(format!("this host has no interface {interface}")).hint(make.clone())
        }
        error => Error::failure(format!("cannot look at the interface {interface}: {error}")),
    })?;
    let mtu = Request::new(interface, 0)
        .ask::<GET_MTU>(&socket)
        .context(|| format!("cannot look at the interface {interface}"))?;
    let file = open_device()?;
    if let Err(error) = Request::new(interface, TAP_FLAGS).ask::<SET_INTERFACE>(&file) {
        return Err(refused(interface, error, &make));
    }
    // SAFETY: it takes a number by its address.
    unsafe { ioctl(&file, Setter::<SET_HEADER_LENGTH, c_int>::new(HEADER)) }
        .context(|| format!("cannot use the interface {interface} with virtio's header"))?;
    Ok(Tap {
        descriptor: file.into(),
        // The monitor says so if that is none.
        mtu: u16::try_from(mtu).unwrap_or(u16::MAX),
        is_up: flags & UP != 0,
    })
}

fn open_device() -> Result<File> {
    let opened = OpenOptions::new().read(true).write(true).open(DEVICE);
    opened.map_err(|error| {
        let hint = match error.kind() {
            ErrorKind::PermissionDenied => format!(
                "every user may open it on most hosts (sudo chmod 666 {DEVICE}), since each interface belongs to one"
            ),
            _ => "load the kernel's driver: sudo modprobe tun".into(),
        };
        Error::failure(format!("cannot open {DEVICE}: {error}")).hint(hint)
    })
}

fn refused(interface: &str, error: rustix::io::Errno, make: &str) -> Error {
    use rustix::io::Errno;
    match error {
        Errno::BUSY => Error::failure(format!(
            "the interface {interface} is in use by another VM or program"
        ))
        .hint("stop that one, or give this VM another with --network tap:…"),
        Errno::PERM => Error::failure(format!("the interface {interface} is another user's")).hint(format!(
            "only root and its owner may use it: sudo ip tuntap del dev {interface} mode tap, and {make}"
        )),
        Errno::INVAL => Error::failure(format!("the interface {interface} is no tap of one queue"))
            .hint(format!("for another name, {}", make.replace(interface, "NAME"))),
        error => Error::failure(format!("cannot use the interface {interface}: {error}")),
    }
}

/// The host's address on the network of `addresses`, if it has one there: whom it would ask as to reach the guest.
pub fn host_address(addresses: &[lighter_protocol::network::Address]) -> Option<Ipv4Addr> {
    addresses.iter().find_map(|address| {
        let IpAddr::V4(guest) = address.ip else {
            return None;
        };
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).ok()?;
        // Nothing is sent; this chooses the route.
        socket.connect((guest, 9)).ok()?;
        match socket.local_addr().ok()?.ip() {
            IpAddr::V4(host) if host != guest && address.reaches(host.into()) => Some(host),
            _ => None,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interface_that_is_not_there_or_no_tap_is_told_apart() {
        let error = open("lighter-none").unwrap_err();
        assert_eq!(error.message, "this host has no interface lighter-none");
        assert!(error.hint.unwrap().contains("mode tap user $USER"));
        let refusal = |errno| refused("lo", errno, "make").message;
        assert!(refusal(rustix::io::Errno::INVAL).contains("lo is no tap"));
        assert!(refusal(rustix::io::Errno::BUSY).contains("in use"));
        assert!(refusal(rustix::io::Errno::PERM).contains("another user's"));
    }

    #[test]
    fn the_host_is_found_on_the_networks_that_it_is_on() {
        let address = |text: &str| [text.parse().unwrap()];
        assert_eq!(host_address(&address("127.0.0.2/8")), Some(Ipv4Addr::LOCALHOST));
        assert_eq!(host_address(&address("fd00::2/64")), None);
        assert_eq!(host_address(&address("192.0.2.200/32")), None);
    }
}
