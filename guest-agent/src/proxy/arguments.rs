//! What dockerd calls its proxy with: Go's flags, each as two words.

use std::net::{IpAddr, SocketAddr};

use lighter_protocol::publish::Transport;

/// Why the arguments cannot be used.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A newer dockerd says something that may matter.
    #[error("the argument {0:?} is not known")]
    Unknown(String),
    /// Its value is missing.
    #[error("the argument {0:?} is missing or has no value")]
    Missing(&'static str),
    /// Its value is something else.
    #[error("{value:?} is not understood as {name}")]
    Value {
        /// Whose.
        name: &'static str,
        /// It.
        value: String,
    },
    /// Docker knows SCTP.
    #[error("{0} ports cannot be published, only tcp and udp ones can")]
    Transport(String),
}

/// A port to publish.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Arguments {
    /// What is spoken on it.
    pub transport: Transport,
    /// Where on the host.
    pub host: SocketAddr,
    /// Where it leads to.
    pub container: SocketAddr,
    /// The socket in the guest was made by dockerd (Docker 28 and later).
    pub use_listen_fd: bool,
}

impl Arguments {
    /// Reads the words behind the program's name.
    ///
    /// # Errors
    /// When they are not understood.
    pub fn parse(words: impl IntoIterator<Item = String>) -> Result<Self, Error> {
        let (mut proto, mut use_listen_fd) = (None, false);
        let [mut host_ip, mut host_port, mut container_ip, mut container_port] = [const { None }; 4];
        let mut words = words.into_iter();
        while let Some(word) = words.next() {
            let (name, slot) = match word.trim_start_matches('-') {
                "use-listen-fd" => {
                    use_listen_fd = true;
                    continue;
                }
                "proto" => ("-proto", &mut proto),
                "host-ip" => ("-host-ip", &mut host_ip),
                "host-port" => ("-host-port", &mut host_port),
                "container-ip" => ("-container-ip", &mut container_ip),
                "container-port" => ("-container-port", &mut container_port),
                _ => return Err(Error::Unknown(word)),
            };
            *slot = Some(words.next().ok_or(Error::Missing(name))?);
        }
        let transport = match proto.ok_or(Error::Missing("-proto"))?.as_str() {
            "tcp" => Transport::Tcp,
            "udp" => Transport::Udp,
            other => return Err(Error::Transport(other.into())),
        };
        Ok(Self {
            transport,
            host: address(("-host-ip", host_ip), ("-host-port", host_port))?,
            container: address(
                ("-container-ip", container_ip),
                ("-container-port", container_port),
            )?,
            use_listen_fd,
        })
    }
}

type Given = (&'static str, Option<String>);

fn address((ip_name, ip): Given, (port_name, port): Given) -> Result<SocketAddr, Error> {
    let ip = ip.ok_or(Error::Missing(ip_name))?;
    let port = port.ok_or(Error::Missing(port_name))?;
    let bad = |name, value| Error::Value { name, value };
    let ip: IpAddr = ip.parse().map_err(|_| bad(ip_name, ip))?;
    match port.parse() {
        Ok(number @ 1u16..) => Ok((ip, number).into()),
        _ => Err(bad(port_name, port)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Arguments, Error> {
        Arguments::parse(line.split_ascii_whitespace().map(str::to_owned))
    }

    #[test]
    fn both_contracts_of_dockerd_are_understood() {
        let old = "-proto tcp -host-ip 0.0.0.0 -host-port 8080 -container-ip 172.17.0.2 -container-port 80";
        let arguments = Arguments {
            transport: Transport::Tcp,
            host: "0.0.0.0:8080".parse().unwrap(),
            container: "172.17.0.2:80".parse().unwrap(),
            use_listen_fd: false,
        };
        assert_eq!(parse(old), Ok(arguments.clone()));
        let new = Arguments {
            use_listen_fd: true,
            ..arguments
        };
        assert_eq!(parse(&format!("{old} -use-listen-fd")), Ok(new));
        let six = "-proto udp -host-ip :: -host-port 53 -container-ip fd00::2 -container-port 53";
        assert_eq!(parse(six).unwrap().host, "[::]:53".parse().unwrap());
    }

    #[test]
    fn what_is_wrong_is_named() {
        let rest = "-host-ip 0.0.0.0 -host-port 1 -container-ip 1.1.1.1 -container-port 1";
        let cases = [
            (
                "-proto sctp ",
                "sctp ports cannot be published, only tcp and udp ones can",
            ),
            ("-proto tcp -new x ", r#"the argument "-new" is not known"#),
            ("", r#"the argument "-proto" is missing or has no value"#),
        ];
        for (first, message) in cases {
            assert_eq!(parse(&format!("{first}{rest}")).unwrap_err().to_string(), message);
        }
        for (from, to) in [
            ("host-port 1", "host-port 0"),
            ("1.1.1.1", "1.1.1"),
            ("-port 1", "-port 65536"),
        ] {
            let line = format!("-proto tcp {}", rest.replace(from, to));
            assert!(matches!(parse(&line), Err(Error::Value { .. })), "{line}");
        }
        assert_eq!(parse("-proto"), Err(Error::Missing("-proto")));
    }
}
