//! The host's default routes, and when they change.

use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, bind, recv, socket_with};
use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;
use tokio::io::unix::AsyncFd;
use tokio::time::sleep;

/// RTMGRP_IPV4_ROUTE and RTMGRP_IPV6_ROUTE of linux/rtnetlink.h.
const GROUPS: u32 = 0x40 | 0x400;

/// Changes come in swarms; this long after the first, most of one is over.
const SETTLES: Duration = Duration::from_secs(1);

/// Which families have a way out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DefaultRoutes {
    /// IPv4.
    pub four: bool,
    /// IPv6.
    pub six: bool,
}

impl DefaultRoutes {
    /// Those of now.
    pub fn of_host() -> Self {
        let read = |path| std::fs::read_to_string(path).unwrap_or_default();
        Self::read(&read("/proc/net/route"), &read("/proc/net/ipv6_route"))
    }

    /// Whether there is any.
    pub fn any(self) -> bool {
        self.four || self.six
    }

    /// Whether a family has one that had none in `before`.
    pub fn exceed(self, before: Self) -> bool {
        self.four && !before.four || self.six && !before.six
    }

    /// From /proc/net/route and /proc/net/ipv6_route, given as they are.
    fn read(ipv4: &str, ipv6: &str) -> Self {
        // Interface, destination, gateway, flags, …, mask as the eighth.
        let four = ipv4.lines().skip(1).any(|line| {
            let fields: Vec<&str> = line.split_ascii_whitespace().collect();
            fields.get(1) == Some(&"00000000") && fields.get(7) == Some(&"00000000")
        });
        // Destination, its prefix, …, interface as the tenth. The kernel keeps one that refuses on the loopback interface.
        let six = ipv6.lines().any(|line| {
            let fields: Vec<&str> = line.split_ascii_whitespace().collect();
            let default = |text: &&str| text.bytes().all(|byte| byte == b'0');
            fields.first().is_some_and(default)
                && fields.get(1) == Some(&"00")
                && fields.get(9) != Some(&"lo")
        });
        Self { four, six }
    }
}

/// Hears of changes from when it was made on.
#[derive(Debug)]
pub struct Changes(Option<AsyncFd<OwnedFd>>);

impl Changes {
    /// Where the kernel does not tell, there are none.
    pub fn new() -> Self {
        Self(subscribe().ok())
    }

    /// Waits for the next.
    pub async fn next(&self) {
        let Some(socket) = &self.0 else {
            return std::future::pending().await;
        };
        match socket.readable().await {
            Ok(mut guard) => guard.clear_ready(),
            // It would be there the next time, too.
            Err(_) => return std::future::pending().await,
        }
        sleep(SETTLES).await;
        drain(socket);
    }
}

fn subscribe() -> io::Result<AsyncFd<OwnedFd>> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    // Without a protocol it is that of routes.
    let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, None)?;
    bind(&socket, &SocketAddrNetlink::new(0, GROUPS))?;
    // SAFETY: an owned descriptor stays open and the same until the registration is dropped.
    unsafe { AsyncFd::register(socket) }.map_err(Into::into)
}

/// What the messages say does not matter; that some were lost neither.
fn drain(socket: &AsyncFd<OwnedFd>) {
    let mut message = [0; 8 << 10];
    while !matches!(
        recv(socket.get_ref(), &mut message[..], RecvFlags::DONTWAIT),
        Err(rustix::io::Errno::WOULDBLOCK)
    ) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn default_routes_are_found() {
        let title = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n";
        let net = "eth0\t0002000A\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n";
        let default = "eth0\t00000000\t0202000A\t0003\t0\t0\t0\t00000000\t0\t0\t0\n";
        let read = DefaultRoutes::read;
        assert!(read(&[title, net, default].concat(), "").four);
        assert!(!read(&[title, net].concat(), "").any());
        assert!(!read("", "").any());
        let zero = "0".repeat(32);
        let lo = format!("{zero} 00 {zero} 00 {zero} ffffffff 00000001 00000000 00200200       lo\n");
        assert!(!read("", &lo).any());
        let eth0 = lo.replace("lo", "eth0");
        let six = read("", &[lo, eth0].concat());
        assert!(six.six && !six.four);
        assert!(six.exceed(DefaultRoutes::default()) && !six.exceed(six));
        assert!(!DefaultRoutes::default().exceed(six));
    }

    #[tokio::test]
    async fn the_kernel_tells_of_changes() {
        subscribe().unwrap();
    }
}
