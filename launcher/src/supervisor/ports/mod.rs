//! Published ports ([`lighter_protocol::publish`]): the host's sockets, each for as long as its proxy in the guest keeps its
//! connection. The guest is hostile: how many ports and clients there are is bounded, and where they lie is [`policy`]'s.
//!
//! - [`policy`]: which address a port gets, and what is said when it cannot be had
//! - [`elsewhere`]: which port one gets that goes on with a snapshot and is taken
//! - [`random`]: the random ports of each VM

pub mod elsewhere;
pub mod policy;
pub mod random;

use super::agent::Connections;
use super::docker;
use elsewhere::Elsewhere;
use lighter_protocol::frame::{Decoder, FrameError, encode_message};
use lighter_protocol::publish::{MAX_MESSAGE, Publish, PublishedPort, Reply, Transport};
use lighter_relay::{Limits, flows, listen, streams};
use policy::Policy;
use std::collections::BTreeMap;
use std::io::{self, Cursor};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, UdpSocket, UnixStream};
use tokio::sync::{Notify, Semaphore};
use tokio::time::timeout;

/// Published ports of a VM, at most. Each keeps a connection of the monitor's, which has 4,096 in all.
const MAX_PORTS: usize = 1024;

/// Clients of all of them, for the same reason.
const MAX_CLIENTS: usize = 1536;

/// Clients of one port: others have places whatever happens to it.
const MAX_CLIENTS_OF_ONE: usize = 1024;

/// How long a proxy may take to say what it wants.
const PATIENCE: Duration = Duration::from_secs(30);

/// How long another proxy of this VM may take to give a port up, that is, to be taken note of: it has ended in the guest.
const HANDOVER: Duration = Duration::from_secs(2);

/// The published ports of a VM; clones share them.
#[derive(Clone, Debug, Default)]
pub struct Ports(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    ports: Mutex<BTreeMap<(SocketAddr, Transport), PublishedPort>>,
    /// One was given up.
    given_up: Notify,
}

impl Ports {
    /// All of them, sorted by address.
    pub fn list(&self) -> Vec<PublishedPort> {
        self.lock().values().cloned().collect()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<(SocketAddr, Transport), PublishedPort>> {
        self.0.ports.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, port: PublishedPort) -> Entry {
        let key = (port.host, port.transport);
        self.lock().insert(key, port);
        Entry {
            ports: self.clone(),
            key,
        }
    }
}

/// A port in the list, until dropped.
struct Entry {
    ports: Ports,
    key: (SocketAddr, Transport),
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.ports.lock().remove(&self.key);
        self.ports.0.given_up.notify_waiters();
    }
}

/// Why a proxy's connection ended early. Only its proxy would want to know.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("the proxy's connection broke")]
    Io(#[from] io::Error),
    #[error("the proxy sent what is not understood")]
    Frame(#[from] FrameError),
    #[error("the proxy did not say what it wants")]
    Silent,
}

/// What publishing needs.
#[derive(Clone, Debug)]
pub struct Publisher {
    /// The list to keep.
    pub ports: Ports,
    /// Which addresses.
    pub policy: Policy,
    /// Which ports, in place of taken ones.
    pub elsewhere: Elsewhere,
    /// Where the monitor takes connections to the guest.
    pub muxer: PathBuf,
}

/// Serves the guest's proxies until the monitor is gone.
pub async fn serve(proxies: Connections, publisher: Publisher) {
    let places = Arc::new(Semaphore::new(MAX_PORTS));
    let clients = Arc::new(Semaphore::new(MAX_CLIENTS));
    loop {
        match proxies.accept().await {
            Ok(Some(proxy)) => {
                let (publisher, clients) = (publisher.clone(), clients.clone());
                let place = places.clone().try_acquire_owned();
                tokio::spawn(async move {
                    let limits = Limits {
                        clients: MAX_CLIENTS_OF_ONE,
                        places: clients,
                    };
                    // A proxy that breaks the rules loses its port, whatever it did.
                    let _ = publisher.serve(proxy, limits, place.is_ok()).await;
                    drop(place);
                });
            }
            Ok(None) => return,
            // For want of descriptors: others will be closed.
            Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
        }
    }
}

/// A bound socket.
enum Socket {
    Tcp(TcpListener),
    Udp(UdpSocket),
}

/// Where a port is published.
struct Bound {
    socket: Socket,
    host: SocketAddr,
    instead_of: Option<SocketAddr>,
}

impl Publisher {
    /// Serves one proxy.
    async fn serve(&self, mut proxy: UnixStream, limits: Limits, has_place: bool) -> Result<(), Error> {
        let asked = timeout(PATIENCE, read_message(&mut proxy));
        let publish = asked.await.map_err(|_| Error::Silent)??;
        let bound = match (has_place, publish.host.port()) {
            (true, 1..) => self.bind(&publish).await,
            (true, 0) => Err("the proxy asks for port 0, which is none".into()),
            (false, _) => Err(format!(
                "this VM has {MAX_PORTS} published ports, which is the most there can be"
            )),
        };
        let bound = match bound {
            Ok(bound) => bound,
            Err(reason) => {
                proxy
                    .write_all(&encode_message(&Reply::Refused { reason })?)
                    .await?;
                return Ok(());
            }
        };
        let published = bound.map(|bound| {
            let entry = self.ports.add(PublishedPort {
                host: bound.host,
                transport: publish.transport,
                container: publish.container,
                instead_of: bound.instead_of,
            });
            (bound.socket, entry)
        });
        proxy.write_all(&encode_message(&Reply::Published)?).await?;
        let mut byte = [0];
        let serving = async {
            match published {
                // The socket goes before its entry, and both before the proxy is told.
                Some((socket, _entry)) => self.serve_clients(socket, publish.guest_port, limits).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = serving => {}
            // There is nothing more to say on it but its end.
            _ = proxy.read(&mut byte) => {}
        }
        Ok(())
    }

    /// Binds where [`Policy`] says, or says why not; `None` when it says nowhere.
    async fn bind(&self, publish: &Publish) -> Result<Option<Bound>, String> {
        let Some(address) = self.policy.address(publish.host) else {
            return Ok(None);
        };
        let transport = publish.transport;
        let error = match self.bind_when_given_up(transport, address).await {
            Ok(socket) => {
                return Ok(Some(Bound {
                    socket,
                    host: address,
                    instead_of: None,
                }));
            }
            Err(error) => error,
        };
        if policy::is_optional(publish.host, &error) {
            return Ok(None);
        }
        if publish.again
            && let Some((socket, port)) = self.elsewhere.find(address.port(), |port| {
                open(transport, (address.ip(), port).into())
            })
        {
            return Ok(Some(Bound {
                socket,
                host: (address.ip(), port).into(),
                instead_of: Some(address),
            }));
        }
        Err(policy::refusal(transport, address, &error))
    }

    /// A proxy that has ended may not have been taken note of when the next one for its port asks.
    async fn bind_when_given_up(&self, transport: Transport, address: SocketAddr) -> io::Result<Socket> {
        let patience = tokio::time::sleep(HANDOVER);
        tokio::pin!(patience);
        loop {
            let given_up = self.ports.0.given_up.notified();
            tokio::pin!(given_up);
            given_up.as_mut().enable();
            let is_ours = self.ports.lock().contains_key(&(address, transport));
            match open(transport, address) {
                Err(error) if error.kind() == io::ErrorKind::AddrInUse && is_ours => {
                    tokio::select! {
                        () = given_up => {}
                        () = &mut patience => return Err(error),
                    }
                }
                result => return result,
            }
        }
    }

    async fn serve_clients(&self, socket: Socket, guest_port: u32, limits: Limits) {
        let connect = || {
            let muxer = self.muxer.clone();
            async move {
                let (stream, early) = docker::connect(&muxer, guest_port).await?;
                Ok(join_early(stream, early))
            }
        };
        match socket {
            Socket::Tcp(listener) => streams::serve(listener, limits, connect).await,
            Socket::Udp(socket) => flows::serve(socket, limits, connect).await,
        }
    }
}

/// The stream with what was read of it already in front.
fn join_early(stream: UnixStream, early: Vec<u8>) -> impl AsyncRead + AsyncWrite + Unpin + Send + 'static {
    let (reader, writer) = stream.into_split();
    tokio::io::join(Cursor::new(early).chain(reader), writer)
}

fn open(transport: Transport, address: SocketAddr) -> io::Result<Socket> {
    match transport {
        Transport::Tcp => listen::tcp(address).map(Socket::Tcp),
        Transport::Udp => listen::udp(address).map(Socket::Udp),
    }
}

/// Reads one message, and no more than there may be.
async fn read_message(proxy: &mut UnixStream) -> Result<Publish, Error> {
    let mut decoder = Decoder::new();
    let mut stream = proxy.take(MAX_MESSAGE as u64);
    let mut buffer = [0; MAX_MESSAGE];
    loop {
        if let Some(frame) = decoder.next_frame()? {
            return Ok(frame.message()?);
        }
        match stream.read(&mut buffer).await? {
            0 => return Err(Error::Silent),
            length => decoder.push(&buffer[..length]),
        }
    }
}

#[cfg(test)]
mod tests;
