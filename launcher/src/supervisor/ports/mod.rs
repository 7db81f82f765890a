//! Published ports ([`lighter_protocol::publish`]): the host's sockets, each for as long as its proxy in the guest keeps its
//! connection. The guest is hostile: how many ports and clients there are is bounded, and where they lie is [`policy`]'s.
//!
//! - [`policy`]: which address a port gets, and what is said when it cannot be had
//! - [`elsewhere`]: which port one gets that goes on with a snapshot and is taken
//! - [`random`]: the random ports of each VM
//! - [`kept`]: sockets that stay open while the VM is suspended

pub mod elsewhere;
mod kept;
pub mod policy;
pub mod random;

use super::agent::Connections;
use super::docker;
use super::usage::{Purpose, Usage, Visit};
use elsewhere::Elsewhere;
use kept::{Kept, Key};
use lighter_protocol::frame::{Decoder, FrameError, encode_message};
use lighter_protocol::publish::{MAX_MESSAGE, Publish, PublishedPort, Reply, Transport};
use lighter_relay::{Limits, flows, listen, streams};
use policy::Policy;
use std::collections::BTreeMap;
use std::io::{self, Cursor};
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task;
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::{TcpListener, UdpSocket, UnixStream};
use tokio::sync::{Notify, Semaphore};
use tokio::time::timeout;

/// Published ports of a VM, at most. Each keeps a connection of the monitor's, which has 4,096 in all.
const MAX_PORTS: usize = 1024;

/// Clients of all of them, for the same reason.
const MAX_CLIENTS: usize = 1536;

/// Clients of one port: others have places whatever happens to it.
const MAX_CLIENTS_OF_ONE: usize = 1024;

/// Clients that wait at one socket, at most: as many as `lighter-relay` has the kernel keep.
const MAX_WAITING: usize = 4096;

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
    /// While the VM is suspended.
    kept: Mutex<Kept>,
    /// One was given up.
    given_up: Notify,
}

impl Ports {
    /// All of them, sorted by address.
    pub fn list(&self) -> Vec<PublishedPort> {
        let key = |port: PublishedPort| ((port.host, port.transport), port);
        let mut all: BTreeMap<_, _> = self.kept().list().map(key).collect();
        all.extend(self.lock().values().cloned().map(key));
        all.into_values().collect()
    }

    /// Whether a client waits at a port that nobody serves.
    pub fn is_wanted(&self) -> bool {
        self.kept().is_wanted()
    }

    /// Waits until one does.
    ///
    /// # Errors
    /// When they cannot be watched.
    pub async fn wanted(&self) -> io::Result<()> {
        let watch = self.kept().watch()?;
        watch.readable().await?.retain_ready();
        Ok(())
    }

    /// Closes the connections of those who wait at ports that nobody serves.
    pub fn turn_away(&self) {
        self.kept().turn_away();
    }

    /// Closes the sockets that were kept before `time`, and that no proxy has asked for.
    pub fn close_kept(&self, time: Instant) {
        self.kept().close_older(time);
    }

    /// Waits until every proxy of a guest that is no more is taken note of.
    pub async fn until_given_up(&self) {
        loop {
            let given_up = self.0.given_up.notified();
            tokio::pin!(given_up);
            given_up.as_mut().enable();
            if self.lock().is_empty() {
                return;
            }
            given_up.await;
        }
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.0.kept.lock().unwrap_or_else(PoisonError::into_inner)
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
    /// Who uses the VM.
    pub usage: Usage,
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
    Udp(Arc<UdpSocket>),
}

/// Where a port is published.
#[derive(Debug)]
struct Bound<S> {
    socket: S,
    transport: Transport,
    host: SocketAddr,
    instead_of: Option<SocketAddr>,
}

impl<S> Bound<S> {
    /// What it was asked for by.
    fn key(&self) -> Key {
        (self.instead_of.unwrap_or(self.host), self.transport)
    }

    /// As `lighter ports` shows it.
    fn shown(&self, container: SocketAddr) -> PublishedPort {
        PublishedPort {
            host: self.host,
            transport: self.transport,
            container,
            instead_of: self.instead_of,
        }
    }

    /// The same with another kind of socket.
    fn with<T>(self, change: impl FnOnce(S) -> io::Result<T>) -> io::Result<Bound<T>> {
        Ok(Bound {
            socket: change(self.socket)?,
            transport: self.transport,
            host: self.host,
            instead_of: self.instead_of,
        })
    }
}

impl Socket {
    /// One that was kept.
    fn again(transport: Transport, socket: OwnedFd) -> io::Result<Self> {
        match transport {
            Transport::Tcp => listen::inherited_tcp(socket).map(Self::Tcp),
            Transport::Udp => listen::inherited_udp(socket).map(|socket| Self::Udp(Arc::new(socket))),
        }
    }

    /// To be kept.
    fn into_fd(self) -> io::Result<OwnedFd> {
        match self {
            Self::Tcp(socket) => socket.into_std().map(Into::into),
            // The last of its flows may not have noticed that it has ended.
            Self::Udp(socket) => match Arc::try_unwrap(socket) {
                Ok(socket) => socket.into_std().map(Into::into),
                Err(shared) => shared.as_fd().try_clone_to_owned(),
            },
        }
    }
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
            let entry = self.ports.add(bound.shown(publish.container));
            (bound, entry)
        });
        proxy.write_all(&encode_message(&Reply::Published)?).await?;
        let mut byte = [0];
        let serving = async {
            match published {
                // The socket goes before its entry, and both before the proxy is told.
                Some((bound, _entry)) => self.serve_port(bound, &publish, limits).await,
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
    async fn bind(&self, publish: &Publish) -> Result<Option<Bound<Socket>>, String> {
        let Some(address) = self.policy.address(publish.host) else {
            return Ok(None);
        };
        let transport = publish.transport;
        let kept = self.ports.kept().take((address, transport));
        let again = kept.map(|kept| kept.with(|socket| Socket::again(transport, socket)));
        if let Some(Ok(kept)) = again {
            return Ok(Some(kept));
        }
        let error = match self.bind_when_given_up(transport, address).await {
            Ok(socket) => {
                return Ok(Some(Bound {
                    socket,
                    transport,
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
                transport,
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

    /// Serves a port's clients. While the VM is suspended, its socket is one of those kept; it is so for good when the proxy's
    /// connection ends by that.
    async fn serve_port(&self, mut bound: Bound<Socket>, publish: &Publish, limits: Limits) {
        loop {
            let serving = self.usage.serving();
            tokio::select! {
                biased;
                () = self.usage.left() => {}
                () = self.serve_clients(&bound.socket, publish.guest_port, limits.clone()) => {}
            }
            let key = bound.key();
            match bound.with(Socket::into_fd) {
                Ok(bound) => self.ports.kept().keep(bound, publish.container),
                // There are no descriptors: the port is given up, as if it had not been had.
                Err(_) => return,
            }
            let keeping = Keeping(self, key);
            drop(serving);
            self.usage.opened().await;
            std::mem::forget(keeping);
            let kept = self.ports.kept().take(key);
            let again = kept.map(|kept| kept.with(|socket| Socket::again(publish.transport, socket)));
            let Some(Ok(again)) = again else { return };
            bound = again;
        }
    }

    async fn serve_clients(&self, socket: &Socket, guest_port: u32, limits: Limits) {
        let connect = || {
            let muxer = self.muxer.clone();
            let visit = self.usage.visit(Purpose::Port);
            async move {
                let (stream, early) = docker::connect(&muxer, guest_port).await?;
                Ok(join_early(stream, early, visit))
            }
        };
        match socket {
            Socket::Tcp(listener) => streams::serve(listener, limits, connect).await,
            Socket::Udp(socket) => flows::serve(socket, limits, connect).await,
        }
    }
}

/// A port whose socket is kept, until its proxy ends. If that is not because the VM is suspended, the port is given up.
struct Keeping<'a>(&'a Publisher, Key);

impl Drop for Keeping<'_> {
    fn drop(&mut self) {
        let Self(publisher, key) = self;
        if !publisher.usage.is_closed() {
            publisher.ports.kept().take(*key);
        }
    }
}

/// The stream with what was read of it already in front, for as long as the visit lasts.
fn join_early(
    stream: UnixStream,
    early: Vec<u8>,
    visit: Visit,
) -> impl AsyncRead + AsyncWrite + Unpin + Send + 'static {
    let (reader, writer) = stream.into_split();
    let reader = Visiting {
        reader: Cursor::new(early).chain(reader),
        _visit: visit,
    };
    tokio::io::join(reader, writer)
}

/// What a visitor reads from.
struct Visiting<R> {
    reader: R,
    _visit: Visit,
}

impl<R: AsyncRead + Unpin> AsyncRead for Visiting<R> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut task::Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> task::Poll<io::Result<()>> {
        Pin::new(&mut self.reader).poll_read(context, buffer)
    }
}

fn open(transport: Transport, address: SocketAddr) -> io::Result<Socket> {
    match transport {
        Transport::Tcp => listen::tcp(address).map(Socket::Tcp),
        Transport::Udp => listen::udp(address).map(|socket| Socket::Udp(Arc::new(socket))),
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
