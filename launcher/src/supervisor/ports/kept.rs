//! Sockets of published ports that nobody serves while the VM is suspended: clients wait in them, the first of whom wakes it, and the
//! proxies get them back when they ask for their ports anew. So no connection and no datagram is lost.

use super::{Bound, Transport};
use lighter_protocol::publish::PublishedPort;
use rustix::event::{PollFd, PollFlags, Timespec, epoll, poll};
use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Instant;
use tokio::io::unix::AsyncFd;

/// What a port was asked for by.
pub type Key = (SocketAddr, Transport);

/// The sockets.
#[derive(Debug, Default)]
pub struct Kept(BTreeMap<Key, One>);

#[derive(Debug)]
struct One {
    bound: Bound<OwnedFd>,
    container: SocketAddr,
    since: Instant,
}

impl Kept {
    /// Keeps the socket of a port.
    pub fn keep(&mut self, bound: Bound<OwnedFd>, container: SocketAddr) {
        let one = One {
            since: Instant::now(),
            container,
            bound,
        };
        self.0.insert(one.bound.key(), one);
    }

    /// Gives a socket back.
    pub fn take(&mut self, key: Key) -> Option<Bound<OwnedFd>> {
        self.0.remove(&key).map(|one| one.bound)
    }

    /// Closes those that were kept before `time`.
    pub fn close_older(&mut self, time: Instant) {
        self.0.retain(|_, one| one.since >= time);
    }

    /// As `lighter ports` shows them.
    pub fn list(&self) -> impl Iterator<Item = PublishedPort> {
        self.0.values().map(|one| one.bound.shown(one.container))
    }

    /// Whether a client waits.
    pub fn is_wanted(&self) -> bool {
        self.0.values().any(|one| is_readable(&one.bound.socket))
    }

    /// Closes the connections that wait, and forgets datagrams.
    pub fn turn_away(&self) {
        for One { bound, .. } in self.0.values() {
            // As many as there can be, so that those who come again and again do not hold this up.
            for _ in 0..super::MAX_WAITING {
                if !is_readable(&bound.socket) || discard(bound).is_err() {
                    break;
                }
            }
        }
    }

    /// Becomes readable when a client waits at one of the sockets that are kept now.
    ///
    /// # Errors
    /// When they cannot be watched.
    pub fn watch(&self) -> io::Result<AsyncFd<OwnedFd>> {
        let all = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        for One { bound, .. } in self.0.values() {
            epoll::add(
                &all,
                &bound.socket,
                epoll::EventData::new_u64(0),
                epoll::EventFlags::IN,
            )?;
        }
        // SAFETY: the descriptor is owned, and stays open and the same until the registration is dropped.
        Ok(unsafe { AsyncFd::register_with_interest(all, tokio::io::Interest::READABLE) }?)
    }
}

fn is_readable(socket: impl AsFd) -> bool {
    let at_once = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    poll(&mut [PollFd::new(&socket, PollFlags::IN)], Some(&at_once)).is_ok_and(|ready| ready > 0)
}

fn discard(bound: &Bound<OwnedFd>) -> io::Result<()> {
    match bound.transport {
        Transport::Tcp => drop(rustix::net::accept(&bound.socket)?),
        Transport::Udp => {
            rustix::net::recv(&bound.socket, &mut [0u8; 1][..], rustix::net::RecvFlags::DONTWAIT)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream, UdpSocket};
    use std::time::Duration;

    fn bound(transport: Transport, socket: OwnedFd, host: SocketAddr) -> Bound<OwnedFd> {
        Bound {
            transport,
            socket,
            host,
            instead_of: None,
        }
    }

    fn kept() -> (Kept, Key, Key) {
        let (tcp, udp) = (
            TcpListener::bind("127.0.0.1:0").unwrap(),
            UdpSocket::bind("127.0.0.1:0").unwrap(),
        );
        let keys = (
            (tcp.local_addr().unwrap(), Transport::Tcp),
            (udp.local_addr().unwrap(), Transport::Udp),
        );
        let mut kept = Kept::default();
        let container = "172.17.0.2:80".parse().unwrap();
        kept.keep(bound(Transport::Tcp, tcp.into(), keys.0.0), container);
        kept.keep(bound(Transport::Udp, udp.into(), keys.1.0), container);
        (kept, keys.0, keys.1)
    }

    #[tokio::test]
    async fn the_first_client_is_noticed_and_nothing_of_it_is_lost() {
        let (mut kept, (address, _), udp) = kept();
        assert!(!kept.is_wanted());
        assert_eq!(kept.list().count(), 2);
        let watch = kept.watch().unwrap();
        let readable = watch.readable();
        tokio::pin!(readable);
        let nobody = tokio::time::timeout(Duration::from_millis(20), readable.as_mut()).await;
        assert!(nobody.is_err());
        let mut client = TcpStream::connect(address).unwrap();
        client.write_all(b"early").unwrap();
        readable.await.unwrap().retain_ready();
        assert!(kept.is_wanted());
        let socket = kept.take((address, Transport::Tcp)).unwrap().socket;
        let (mut server, _) = TcpListener::from(socket).accept().unwrap();
        let mut bytes = [0; 5];
        server.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"early");
        assert!(!kept.is_wanted());
        // A datagram does it, too.
        let watch = kept.watch().unwrap();
        let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
        sender.send_to(b"datagram", udp.0).unwrap();
        watch.readable().await.unwrap().retain_ready();
        let socket = UdpSocket::from(kept.take(udp).unwrap().socket);
        let mut buffer = [0; 16];
        assert_eq!(socket.recv(&mut buffer).unwrap(), 8);
        assert_eq!(kept.take(udp).map(|bound| bound.host), None);
    }

    #[test]
    fn those_who_wait_are_turned_away_and_what_nobody_wants_is_closed() {
        let (mut kept, (address, _), (udp, _)) = kept();
        let mut clients: Vec<TcpStream> = (0..3).map(|_| TcpStream::connect(address).unwrap()).collect();
        let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
        sender.send_to(&[7; 100], udp).unwrap();
        assert!(kept.is_wanted());
        kept.turn_away();
        assert!(!kept.is_wanted());
        for client in &mut clients {
            // An end, or a reset.
            assert!(!matches!(client.read(&mut [0; 1]), Ok(1..)));
        }
        let later = Instant::now() + Duration::from_secs(1);
        kept.close_older(later);
        assert_eq!(kept.list().count(), 0);
        assert!(TcpStream::connect(address).is_err());
    }
}
