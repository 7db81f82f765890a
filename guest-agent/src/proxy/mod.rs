//! dockerd's proxy for one published port (`--userland-proxy-path`): the agent's program under another name.
//!
//! It serves the port in the guest, as Docker's own proxy does, for containers that call their own published port and for
//! programs of the guest; and it has the supervisor publish the port on the host, whose clients come over vsock. Only when
//! both are done does it tell dockerd, so that `docker run` fails with the reason when a port is taken. The port is
//! published for as long as this process lives.

mod arguments;
mod publication;
mod status;

use std::{
    io,
    net::SocketAddr,
    os::fd::OwnedFd,
    process::ExitCode,
    sync::Arc,
    time::{Duration, Instant},
};

use lighter_protocol::{
    causes::chain,
    publish::{Publish, Transport},
};
use lighter_relay::{Limits, datagram, flows, listen, relay, streams};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream, UdpSocket, UnixStream},
    signal::unix::{Signal, SignalKind, signal},
    sync::Semaphore,
    time::sleep,
};
use tokio_vsock::{VsockListener, VsockStream};

use crate::agent;

use arguments::Arguments;
use publication::Publication;
use status::Status;

/// The program's name.
pub const NAME: &str = "docker-proxy";

/// Clients of the port in the guest, at once.
const MAX_CLIENTS: usize = 1024;

/// Before another try to publish the port anew, and after a failed accept.
const PAUSE: Duration = Duration::from_millis(500);

/// Why the proxy cannot serve.
#[derive(Debug, thiserror::Error)]
enum Error {
    /// dockerd says something else.
    #[error("cannot understand dockerd")]
    Arguments(#[from] arguments::Error),
    /// No event loop.
    #[error("cannot start the proxy")]
    Runtime(#[source] io::Error),
    /// The port is taken in the guest, most likely by a container on the host's network.
    #[error("cannot listen on {address}/{transport} in the VM")]
    Listen {
        /// What is spoken.
        transport: Transport,
        /// Where.
        address: SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// No vsock port.
    #[error("cannot listen on a vsock port")]
    Vsock(#[source] io::Error),
    /// The host did not publish it.
    #[error(transparent)]
    Publish(#[from] publication::Error),
}

/// Runs the proxy with the words behind the program's name.
pub fn main(words: impl IntoIterator<Item = String>) -> ExitCode {
    // First, while the numbers of dockerd's descriptors cannot be those of others.
    let status = match Status::inherited() {
        Ok(status) => status,
        Err(error) => {
            return fail(&format!(
                "{NAME} is started by dockerd, and finds no pipe to it: {error}"
            ));
        }
    };
    let mut status = Some(status);
    match start(words, &mut status) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let reason = chain(&error);
            match status {
                // A dockerd that is gone wants no reason.
                Some(status) => drop(status.failed(&reason)),
                None => return fail(&reason),
            }
            ExitCode::FAILURE
        }
    }
}

fn fail(reason: &str) -> ExitCode {
    use std::io::Write;
    let _ = writeln!(io::stderr(), "{reason}");
    ExitCode::FAILURE
}

fn start(words: impl IntoIterator<Item = String>, status: &mut Option<Status>) -> Result<(), Error> {
    let arguments = Arguments::parse(words)?;
    let socket = match arguments.use_listen_fd {
        true => Some(status::inherited_socket().map_err(|source| listen_error(&arguments, source))?),
        false => None,
    };
    // Every client takes two descriptors.
    if let Ok((_, most)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, most, most);
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(Error::Runtime)?;
    runtime.block_on(run(&arguments, socket, status))
}

fn listen_error(arguments: &Arguments, source: io::Error) -> Error {
    Error::Listen {
        transport: arguments.transport,
        address: arguments.host,
        source,
    }
}

/// The port in the guest.
enum Front {
    Tcp(TcpListener),
    Udp(UdpSocket),
}

impl Front {
    fn open(arguments: &Arguments, inherited: Option<OwnedFd>) -> Result<Self, Error> {
        match (arguments.transport, inherited) {
            (Transport::Tcp, None) => listen::tcp(arguments.host).map(Self::Tcp),
            (Transport::Tcp, Some(socket)) => listen::inherited_tcp(socket).map(Self::Tcp),
            (Transport::Udp, None) => listen::udp(arguments.host).map(Self::Udp),
            (Transport::Udp, Some(socket)) => listen::inherited_udp(socket).map(Self::Udp),
        }
        .map_err(|source| listen_error(arguments, source))
    }

    async fn serve(self, container: SocketAddr) {
        let limits = Limits {
            clients: MAX_CLIENTS,
            places: Arc::new(Semaphore::new(MAX_CLIENTS)),
        };
        match self {
            Self::Tcp(listener) => streams::serve(&listener, limits, || TcpStream::connect(container)).await,
            Self::Udp(socket) => {
                let connect = || async move {
                    let (ours, theirs) = UnixStream::pair()?;
                    tokio::spawn(serve_client(theirs, Transport::Udp, container));
                    Ok(ours)
                };
                flows::serve(&Arc::new(socket), limits, connect).await;
            }
        }
    }
}

async fn run(
    arguments: &Arguments,
    socket: Option<OwnedFd>,
    status: &mut Option<Status>,
) -> Result<(), Error> {
    let mut signals = Signals::new().map_err(Error::Runtime)?;
    let front = Front::open(arguments, socket)?;
    let (clients, guest_port) = listen_on_vsock().map_err(Error::Vsock)?;
    let publish = Publish {
        transport: arguments.transport,
        host: arguments.host,
        container: arguments.container,
        guest_port,
        again: false,
    };
    let mut publication = Some(Publication::begin(&publish).await?);
    if status.take().is_some_and(|status| status.published().is_err()) {
        // dockerd is gone.
        return Ok(());
    }
    tokio::select! {
        () = front.serve(arguments.container) => {}
        () = accept(clients, arguments.transport, arguments.container) => {}
        () = keep(&mut publication, &publish) => {}
        () = signals.received() => {}
    }
    if let Some(publication) = publication {
        publication.end().await;
    }
    Ok(())
}

/// Keeps the port published: a VM that was started from a snapshot has the connections of another life, and clients that wait.
async fn keep(publication: &mut Option<Publication<VsockStream>>, publish: &Publish) {
    let again = Publish {
        again: true,
        ..publish.clone()
    };
    loop {
        let since = Instant::now();
        if let Some(current) = publication {
            current.ended().await;
        }
        *publication = None;
        // One that does not last is not begun again and again without a pause.
        if since.elapsed() < PAUSE {
            sleep(PAUSE).await;
        }
        *publication = Publication::begin(&again).await.ok();
    }
}

fn listen_on_vsock() -> io::Result<(VsockListener, u32)> {
    let listener = agent::listen(libc::VMADDR_PORT_ANY)?;
    let port = listener.local_addr()?.port();
    Ok((listener, port))
}

/// Serves the host's clients.
async fn accept(listener: VsockListener, transport: Transport, container: SocketAddr) {
    loop {
        match listener.accept().await {
            Ok((client, _)) => drop(tokio::spawn(serve_client(client, transport, container))),
            Err(_) => sleep(PAUSE).await,
        }
    }
}

/// Joins one client to the container. The end of the connection is all that it can be told of an error.
async fn serve_client<S>(client: S, transport: Transport, container: SocketAddr)
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let served = async {
        match transport {
            Transport::Tcp => {
                let server = TcpStream::connect(container).await?;
                streams::prepare(&server);
                relay(client, server).await
            }
            Transport::Udp => datagram::join(client, &udp_to(container).await?).await,
        }
    };
    let _ = served.await;
}

async fn udp_to(container: SocketAddr) -> io::Result<UdpSocket> {
    let any: SocketAddr = match container {
        SocketAddr::V4(_) => ([0; 4], 0).into(),
        SocketAddr::V6(_) => ([0u16; 8], 0).into(),
    };
    let socket = UdpSocket::bind(any).await?;
    socket.connect(container).await?;
    Ok(socket)
}

/// How dockerd ends its proxies, and how the kernel does when dockerd is gone.
struct Signals([Signal; 2]);

impl Signals {
    fn new() -> io::Result<Self> {
        Ok(Self([
            signal(SignalKind::interrupt())?,
            signal(SignalKind::terminate())?,
        ]))
    }

    async fn received(&mut self) {
        let [interrupt, terminate] = &mut self.0;
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    fn arguments(transport: Transport) -> Arguments {
        Arguments {
            transport,
            host: "127.0.0.1:0".parse().unwrap(),
            container: "127.0.0.1:1".parse().unwrap(),
            use_listen_fd: false,
        }
    }

    #[tokio::test]
    async fn the_port_in_the_guest_leads_to_the_container() {
        let container = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let behind = container.local_addr().unwrap();
        let front = Front::open(&arguments(Transport::Tcp), None).unwrap();
        let Front::Tcp(listener) = &front else {
            panic!("TCP was asked for");
        };
        let address = listener.local_addr().unwrap();
        tokio::spawn(front.serve(behind));
        let mut client = TcpStream::connect(address).await.unwrap();
        client.write_all(b"ahoy").await.unwrap();
        client.shutdown().await.unwrap();
        let (mut server, _) = container.accept().await.unwrap();
        let mut got = String::new();
        server.read_to_string(&mut got).await.unwrap();
        assert_eq!(got, "ahoy");
    }

    #[tokio::test]
    async fn datagrams_in_the_guest_reach_the_container_by_a_socket_of_dockerd() {
        let container = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let behind = container.local_addr().unwrap();
        let made = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let address = made.local_addr().unwrap();
        let front = Front::open(&arguments(Transport::Udp), Some(made.into())).unwrap();
        tokio::spawn(front.serve(behind));
        let client = udp_to(address).await.unwrap();
        client.send(b"ahoy").await.unwrap();
        let mut buffer = [0; 16];
        let (length, from) = container.recv_from(&mut buffer).await.unwrap();
        container.send_to(&buffer[..length], from).await.unwrap();
        assert_eq!(client.recv(&mut buffer).await.unwrap(), 4);
        assert_eq!(&buffer[..4], b"ahoy");
    }

    #[test]
    fn a_port_that_is_taken_in_the_guest_is_named() {
        let error = listen_error(&arguments(Transport::Udp), io::ErrorKind::AddrInUse.into());
        assert_eq!(
            chain(&error),
            "cannot listen on 127.0.0.1:0/udp in the VM: address in use"
        );
    }
}
