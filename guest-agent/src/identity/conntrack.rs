//! Connections that the kernel keeps track of for its address translation (conntrack). Those to the outside went through a network
//! that is not there any more: they are forgotten, so that new ones can have their ports. Those within the guest live on, and need
//! what is known of them.

use std::{
    fs::File,
    io::{self, Read, Write},
    net::IpAddr,
    os::fd::AsRawFd,
};

use nix::sys::{
    socket::{
        AddressFamily, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, setsockopt, socket,
        sockopt::ReceiveTimeout,
    },
    time::TimeVal,
};

/// The kernel's message that deletes connections: subsystem, and message in it.
const DELETE: u16 = ((libc::NFNL_SUBSYS_CTNETLINK as u16) << 8) | 2;

/// How its answer is marked, which tells of success, too.
const ACKNOWLEDGEMENT: u16 = libc::NLMSG_ERROR as u16;

/// In an attribute's type: there are attributes in it.
const NESTED: u16 = libc::NLA_F_NESTED as u16;

/// Attributes of linux/netfilter/nfnetlink_conntrack.h.
const TUPLE_REPLY: u16 = 2;
const TUPLE_IP: u16 = 1;
const IPV4_DESTINATION: u16 = 2;
const IPV6_DESTINATION: u16 = 4;
const FILTER: u16 = 25;
const FILTER_REPLY_FLAGS: u16 = 2;

/// What of the reply's addresses is compared: where it goes.
const BY_DESTINATION: u32 = 2;

/// How long the kernel may take to answer, seconds. It does so at once.
const PATIENCE_S: i64 = 10;

/// The connections are still known.
#[derive(Debug, thiserror::Error)]
#[error("cannot have the kernel forget connections of {0}")]
pub struct Error(IpAddr, #[source] io::Error);

/// Forgets all connections whose answers come to one of `addresses`.
///
/// # Errors
/// When the kernel refuses.
pub fn forget(addresses: &[IpAddr]) -> Result<(), Error> {
    for address in addresses {
        ask(&message(*address)).map_err(|error| Error(*address, error))?;
    }
    Ok(())
}

/// Sends a request and waits for its acknowledgement.
fn ask(message: &[u8]) -> io::Result<()> {
    let socket = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkNetFilter,
    )?;
    bind(socket.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
    setsockopt(&socket, ReceiveTimeout, &TimeVal::new(PATIENCE_S, 0))?;
    // Reading and writing a file is receiving and sending without flags.
    let mut socket = File::from(socket);
    socket.write_all(message)?;
    let mut answer = [0; 4096];
    let length = socket.read(&mut answer)?;
    acknowledged(&answer[..length])
}

/// Reads the acknowledgement: a header of 16 bytes whose second word is the kind, then zero or an error's negative number.
fn acknowledged(answer: &[u8]) -> io::Result<()> {
    let kind = answer.get(4..6) == Some(&ACKNOWLEDGEMENT.to_ne_bytes()[..]);
    let code: Option<[u8; 4]> = answer.get(16..20).and_then(|bytes| bytes.try_into().ok());
    match code.filter(|_| kind).map(i32::from_ne_bytes) {
        Some(0) => Ok(()),
        Some(code) => Err(io::Error::from_raw_os_error(code.wrapping_neg())),
        None => Err(io::Error::other("the kernel's answer is not understood")),
    }
}

/// The request for one address.
fn message(address: IpAddr) -> Vec<u8> {
    let (family, destination) = match address {
        IpAddr::V4(address) => (libc::AF_INET, attribute(IPV4_DESTINATION, &address.octets())),
        IpAddr::V6(address) => (libc::AF_INET6, attribute(IPV6_DESTINATION, &address.octets())),
    };
    let tuple = attribute(TUPLE_REPLY | NESTED, &attribute(TUPLE_IP | NESTED, &destination));
    let flags = attribute(FILTER_REPLY_FLAGS, &BY_DESTINATION.to_ne_bytes());
    let filter = attribute(FILTER | NESTED, &flags);
    // The family, then a version and a number that are zero.
    let family = [family as u8, 0, 0, 0];
    let length = 16 + family.len() + tuple.len() + filter.len();
    let request = (libc::NLM_F_REQUEST | libc::NLM_F_ACK) as u16;
    [
        &(length as u32).to_ne_bytes()[..],
        &DELETE.to_ne_bytes(),
        &request.to_ne_bytes(),
        // Sequence and sender.
        &[0; 8],
        &family,
        &tuple,
        &filter,
    ]
    .concat()
}

/// An attribute, filled up to a multiple of four bytes.
fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = 4 + value.len();
    let mut bytes = [&(length as u16).to_ne_bytes()[..], &kind.to_ne_bytes(), value].concat();
    bytes.resize(length.next_multiple_of(4), 0);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_request_is_as_the_kernel_reads_it() {
        let bytes = message("192.168.127.2".parse().unwrap());
        #[rustfmt::skip]
        let expected = [
            // Length, kind, flags (request, acknowledge), sequence, sender.
            48, 0, 0, 0, 2, 1, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0,
            2, 0, 0, 0,
            16, 0, 2, 0x80, 12, 0, 1, 0x80, 8, 0, 2, 0, 192, 168, 127, 2,
            12, 0, 25, 0x80, 8, 0, 2, 0, 2, 0, 0, 0,
        ];
        assert_eq!(bytes, expected);
        let six = message("fe80::1".parse().unwrap());
        assert_eq!((six.len(), six[0], six[16]), (60, 60, 10));
    }

    #[test]
    fn the_kernels_answer_is_understood() {
        let answer = |kind: u16, code: i32| {
            let mut bytes = vec![0; 36];
            bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
            bytes[16..20].copy_from_slice(&code.to_ne_bytes());
            bytes
        };
        acknowledged(&answer(2, 0)).unwrap();
        let error = acknowledged(&answer(2, -libc::EPERM)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
        assert!(acknowledged(&answer(3, 0)).is_err());
        assert!(acknowledged(&answer(2, 0)[..17]).is_err());
    }
}
