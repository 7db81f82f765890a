//! Which address of the host a published port gets, and what is said when it cannot be had.

use lighter_protocol::publish::Transport;
use rustix::io::Errno;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// Where the kernel keeps the first port that every user may bind.
const UNPRIVILEGED: &str = "/proc/sys/net/ipv4/ip_unprivileged_port_start";

/// Which addresses published ports get.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    /// What stands for the unspecified address, with which Docker publishes on all addresses.
    pub default_address: Option<IpAddr>,
}

impl Policy {
    /// The address for a port that is to be published on `asked`; `None` when that is to be nowhere.
    ///
    /// Docker publishes on the unspecified addresses of both families. A default address narrows that of its family. The
    /// other family's becomes its loopback address if the default is one, and is left out otherwise.
    pub fn address(self, asked: SocketAddr) -> Option<SocketAddr> {
        let Some(default) = self.default_address.filter(|_| asked.ip().is_unspecified()) else {
            return Some(asked);
        };
        let ip = match asked {
            _ if default.is_ipv4() == asked.is_ipv4() => default,
            _ if !default.is_loopback() => return None,
            SocketAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
            SocketAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
        };
        Some((ip, asked.port()).into())
    }
}

/// Whether a port goes without this address: Docker asks for IPv6 without being told to, and hosts may have none.
pub fn is_optional(asked: SocketAddr, error: &io::Error) -> bool {
    let none = [Errno::AFNOSUPPORT, Errno::ADDRNOTAVAIL];
    asked.is_ipv6() && asked.ip().is_unspecified() && is_one_of(error, &none)
}

/// Why a port cannot be published, and what to do, on one line.
pub fn refusal(transport: Transport, address: SocketAddr, error: &io::Error) -> String {
    let hint = if is_one_of(error, &[Errno::ADDRINUSE]) {
        let sockets = match transport {
            Transport::Tcp => "-tlnp",
            Transport::Udp => "-ulnp",
        };
        format!(
            "a program or another VM has it; ss {sockets} 'sport = :{}' shows which; stop that or publish another port",
            address.port()
        )
    } else if is_one_of(error, &[Errno::ACCESS, Errno::PERM]) {
        let first = std::fs::read_to_string(UNPRIVILEGED).unwrap_or_else(|_| "1024".into());
        format!(
            "ports below {} are root's; allow it with sudo sysctl net.ipv4.ip_unprivileged_port_start={}, or publish \
             another port",
            first.trim(),
            address.port()
        )
    } else if is_one_of(error, &[Errno::ADDRNOTAVAIL, Errno::AFNOSUPPORT]) {
        format!(
            "{} is no address of this host; ip address shows those there are",
            address.ip()
        )
    } else if is_one_of(error, &[Errno::MFILE, Errno::NFILE]) {
        "raise the limit of open files (ulimit -n) and start the VM anew".into()
    } else {
        "publish it on another address or port".into()
    };
    format!("cannot publish {address}/{transport} on the host: {error}; {hint}")
}

fn is_one_of(error: &io::Error, list: &[Errno]) -> bool {
    Errno::from_io_error(error).is_some_and(|errno| list.contains(&errno))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(default: Option<&str>, asked: &str) -> Option<String> {
        let policy = Policy {
            default_address: default.map(|text| text.parse().unwrap()),
        };
        policy
            .address(asked.parse().unwrap())
            .map(|address| address.to_string())
    }

    #[test]
    fn a_default_address_stands_for_all_addresses_and_for_nothing_else() {
        let cases = [
            (None, "0.0.0.0:80", Some("0.0.0.0:80")),
            (Some("127.0.0.1"), "0.0.0.0:80", Some("127.0.0.1:80")),
            (Some("127.0.0.1"), "[::]:80", Some("[::1]:80")),
            (Some("::1"), "0.0.0.0:80", Some("127.0.0.1:80")),
            (Some("192.0.2.1"), "0.0.0.0:80", Some("192.0.2.1:80")),
            (Some("192.0.2.1"), "[::]:80", None),
            (Some("127.0.0.1"), "192.0.2.9:80", Some("192.0.2.9:80")),
        ];
        for (default, asked, got) in cases {
            assert_eq!(address(default, asked).as_deref(), got, "{default:?} {asked}");
        }
    }

    #[test]
    fn a_refusal_says_what_where_why_and_what_to_do() {
        let said = |errno: Errno| {
            refusal(
                Transport::Tcp,
                "10.0.0.9:80".parse().unwrap(),
                &io::Error::from(errno),
            )
        };
        let taken = said(Errno::ADDRINUSE);
        assert!(
            taken.starts_with("cannot publish 10.0.0.9:80/tcp on the host: Address already in use"),
            "{taken}"
        );
        assert!(taken.contains("ss -tlnp 'sport = :80'"), "{taken}");
        let privileged = said(Errno::ACCESS);
        assert!(
            privileged.contains("sudo sysctl net.ipv4.ip_unprivileged_port_start=80"),
            "{privileged}"
        );
        assert!(said(Errno::ADDRNOTAVAIL).contains("10.0.0.9 is no address of this host"));
    }

    #[test]
    fn only_docker_s_own_ipv6_is_optional() {
        let none = io::Error::from(Errno::ADDRNOTAVAIL);
        assert!(is_optional("[::]:80".parse().unwrap(), &none));
        assert!(!is_optional("[2001:db8::1]:80".parse().unwrap(), &none));
        assert!(!is_optional("0.0.0.0:80".parse().unwrap(), &none));
        let taken = io::Error::from(Errno::ADDRINUSE);
        assert!(!is_optional("[::]:80".parse().unwrap(), &taken));
    }
}
