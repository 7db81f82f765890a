//! Names, for the guest: its questions are answered as the host would answer its own programs, at the moment of asking.
//!
//! Addresses come from the system's resolver (getaddrinfo(3)): /etc/hosts, systemd-resolved, a VPN's split DNS and whatever
//! else nsswitch.conf(5) names. Questions for anything else go to the name servers of resolv.conf(5) as they are.
//!
//! - `answer`: what a question is to get, and the messages (pure)
//! - `upstream`: the host's name servers
//!
//! The guest is hostile: a question costs one lookup at most, and lookups at once are bounded.

mod answer;
mod upstream;

use super::agent::Connections;
use crate::error::say;
use answer::{Addresses, Family, Step};
use dns_lookup::{AddrInfoHints, LookupErrorKind, getaddrinfo};
use lighter_protocol::names::{Transport, framed};
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::Semaphore;
use tokio::time::timeout;

/// The guest's connections at once; one too many is closed.
const MAX_CLIENTS: usize = 256;

/// Lookups at once: the system's resolver takes a thread for each.
const MAX_LOOKUPS: usize = 32;

/// How long a connection may be without a question.
const IDLE: Duration = Duration::from_secs(30);

/// The most addresses of a name that are told.
const MAX_ADDRESSES: usize = 64;

/// Who answers.
#[derive(Debug)]
pub struct Resolver {
    /// The host's address as the guest reaches it, if it does.
    host: Option<Ipv4Addr>,
    lookups: Arc<Semaphore>,
}

impl Resolver {
    /// `host` is the answer for the host's own names.
    pub fn new(host: Option<Ipv4Addr>) -> Self {
        Self {
            host,
            lookups: Arc::new(Semaphore::new(MAX_LOOKUPS)),
        }
    }

    /// The answer to `question`; `None` when there is nobody to answer.
    async fn answer(&self, question: &[u8], transport: Transport) -> Option<Vec<u8>> {
        let step = answer::first_step(question, self.host);
        let place = match step {
            Step::Nothing | Step::Answer(_) => None,
            Step::Lookup { .. } | Step::Ask => Some(self.lookups.clone().acquire_owned().await.ok()?),
        };
        let answer = match step {
            Step::Nothing => return None,
            Step::Answer(answer) => answer,
            Step::Lookup { query, name, family } => {
                let lookup = tokio::task::spawn_blocking(move || {
                    let addresses = look_up(&name, family);
                    drop(place);
                    addresses
                });
                answer::of_addresses(&query, lookup.await.unwrap_or(Addresses::Unknown))
            }
            Step::Ask => upstream::ask(question, &upstream::servers())
                .await
                .unwrap_or_else(|| answer::failure(question)),
        };
        match transport {
            Transport::Udp => Some(answer::fitting(question, answer)),
            Transport::Tcp => Some(answer),
        }
    }
}

/// Asks the system's resolver.
fn look_up(name: &str, family: Family) -> Addresses {
    let hints = AddrInfoHints {
        address: family.number(),
        // One entry for each address, not one for each type.
        socktype: dns_lookup::SockType::Stream.into(),
        ..AddrInfoHints::default()
    };
    match getaddrinfo(Some(name), None, Some(hints)) {
        Ok(found) => {
            let addresses: Vec<IpAddr> = found
                .filter_map(|info| Some(info.ok()?.sockaddr.ip()))
                .take(MAX_ADDRESSES)
                .collect();
            Addresses::Found(addresses)
        }
        Err(error) => match error.kind() {
            LookupErrorKind::NoName => Addresses::NoSuchName,
            LookupErrorKind::NoData => Addresses::Found(vec![]),
            _ => Addresses::Unknown,
        },
    }
}

/// Serves the guest's connections until the monitor is gone.
pub async fn serve(connections: Connections, resolver: Resolver) {
    let (resolver, places) = (Arc::new(resolver), Arc::new(Semaphore::new(MAX_CLIENTS)));
    loop {
        let client = match connections.accept().await {
            Ok(Some(client)) => client,
            Ok(None) => return,
            Err(error) => {
                return say(format_args!(
                    "lighter: cannot take the guest's questions about names any more: {error}"
                ));
            }
        };
        if let Ok(place) = places.clone().try_acquire_owned() {
            let resolver = resolver.clone();
            tokio::spawn(async move {
                // Its end is all that the guest needs to be told.
                let _ = serve_one(client, &resolver).await;
                drop(place);
            });
        }
    }
}

async fn serve_one(mut client: UnixStream, resolver: &Resolver) -> io::Result<()> {
    let byte = timeout(IDLE, client.read_u8()).await??;
    let transport = Transport::from_byte(byte).ok_or(io::ErrorKind::InvalidData)?;
    loop {
        let question = timeout(IDLE, async {
            let mut question = vec![0; client.read_u16().await?.into()];
            client.read_exact(&mut question).await?;
            io::Result::Ok(question)
        })
        .await??;
        let Some(answer) = resolver.answer(&question, transport).await else {
            return Ok(());
        };
        let answer = framed(&answer).ok_or(io::ErrorKind::InvalidData)?;
        timeout(IDLE, client.write_all(&answer)).await??;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hickory_proto::op::{Message, ResponseCode};
    use hickory_proto::rr::{RData, RecordType};

    async fn resolve(name: &str, kind: RecordType) -> Message {
        let (ours, guest) = UnixStream::pair().unwrap();
        let resolver = Resolver::new(Some(Ipv4Addr::new(10, 0, 0, 1)));
        let serving = tokio::spawn(async move { serve_one(guest, &resolver).await });
        let mut ours = ours;
        let question = answer::testing::question(name, kind);
        ours.write_all(&[&[b'u'][..], &framed(&question).unwrap()].concat())
            .await
            .unwrap();
        let mut answer = vec![0; ours.read_u16().await.unwrap().into()];
        ours.read_exact(&mut answer).await.unwrap();
        drop(ours);
        serving.await.unwrap().unwrap_err();
        Message::from_vec(&answer).unwrap()
    }

    #[tokio::test]
    async fn names_of_the_hosts_file_are_found() {
        let answer = resolve("localhost.", RecordType::A).await;
        let addresses: Vec<_> = answer.answers.iter().map(|record| &record.data).collect();
        assert!(
            addresses.contains(&&RData::A(Ipv4Addr::LOCALHOST.into())),
            "{addresses:?}"
        );
    }

    #[tokio::test]
    async fn the_host_has_its_names() {
        let answer = resolve("Host.docker.internal.", RecordType::A).await;
        assert_eq!(
            answer.answers[0].data,
            RData::A(Ipv4Addr::new(10, 0, 0, 1).into())
        );
        let answer = resolve("gateway.docker.internal.", RecordType::AAAA).await;
        assert_eq!(answer.metadata.response_code, ResponseCode::NoError);
        assert!(answer.answers.is_empty());
    }

    #[tokio::test]
    async fn a_connection_that_says_nothing_known_is_closed() {
        let (mut ours, guest) = UnixStream::pair().unwrap();
        let resolver = Resolver::new(None);
        ours.write_all(b"x").await.unwrap();
        assert!(serve_one(guest, &resolver).await.is_err());
    }
}
