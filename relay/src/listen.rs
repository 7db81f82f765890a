//! Sockets that wait for clients. An IPv6 socket takes no IPv4 clients: those have a socket of their own.

use std::{
    io,
    net::{SocketAddr, TcpListener as StdListener, UdpSocket as StdSocket},
    os::fd::OwnedFd,
};

use socket2::{Domain, Socket, Type};
use tokio::net::{TcpListener, UdpSocket};

/// Clients that wait to be taken; the kernel allows at most `net.core.somaxconn`.
const BACKLOG: i32 = 4096;

/// Listens for TCP clients.
///
/// # Errors
/// From the system: in use, not permitted, not an address of this machine.
pub fn tcp(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = new(address, Type::STREAM)?;
    // Connections that were closed a minute ago do not keep the port; a listener does.
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into())
}

/// Waits for datagrams.
///
/// # Errors
/// As [`tcp`].
pub fn udp(address: SocketAddr) -> io::Result<UdpSocket> {
    let socket = new(address, Type::DGRAM)?;
    socket.bind(&address.into())?;
    UdpSocket::from_std(socket.into())
}

/// A TCP listener that was made elsewhere.
///
/// # Errors
/// When it cannot be watched.
pub fn inherited_tcp(socket: OwnedFd) -> io::Result<TcpListener> {
    let listener = StdListener::from(socket);
    listener.set_nonblocking(true)?;
    TcpListener::from_std(listener)
}

/// A bound UDP socket that was made elsewhere.
///
/// # Errors
/// When it cannot be watched.
pub fn inherited_udp(socket: OwnedFd) -> io::Result<UdpSocket> {
    let socket = StdSocket::from(socket);
    socket.set_nonblocking(true)?;
    UdpSocket::from_std(socket)
}

fn new(address: SocketAddr, kind: Type) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), kind.nonblocking().cloexec(), None)?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_port_is_had_once_for_each_family_and_transport() {
        let four = tcp(([0, 0, 0, 0], 0).into()).unwrap();
        let address = four.local_addr().unwrap();
        let in_use = tcp(address).unwrap_err();
        assert_eq!(in_use.kind(), io::ErrorKind::AddrInUse);
        let _six = tcp(([0u16; 8], address.port()).into()).unwrap();
        let _datagrams = udp(address).unwrap();
        assert_eq!(udp(address).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        drop(four);
        tcp(address).unwrap();
    }

    #[tokio::test]
    async fn a_listener_that_was_made_elsewhere_serves() {
        let made = StdListener::bind("127.0.0.1:0").unwrap();
        let address = made.local_addr().unwrap();
        let listener = inherited_tcp(made.into()).unwrap();
        let client = tokio::net::TcpStream::connect(address).await.unwrap();
        let (_, from) = listener.accept().await.unwrap();
        assert_eq!(client.local_addr().unwrap(), from);
        let made = StdSocket::bind("127.0.0.1:0").unwrap();
        let address = made.local_addr().unwrap();
        assert_eq!(inherited_udp(made.into()).unwrap().local_addr().unwrap(), address);
    }
}
