//! The guest's name server: it carries questions to the host's resolver ([`lighter_protocol::names`]) and knows nothing
//! itself.

use std::{io, sync::Arc, time::Duration};

use lighter_protocol::{
    names::{NAMESERVER, Transport, framed},
    ports::HOST_NAMES,
};
use lighter_relay::{Limits, streams};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, UdpSocket},
    sync::Semaphore,
    time::timeout,
};
use tokio_vsock::{VMADDR_CID_HOST, VsockAddr, VsockStream};

use crate::log::Log;

const PORT: u16 = 53;

/// Datagrams and connections in flight. A datagram too many is lost, as datagrams are.
const MAX_CLIENTS: usize = 128;

/// The longest question in a datagram, bytes.
const MAX_QUESTION: usize = 4096;

/// When a client has long stopped waiting for the answer to a datagram.
const LATEST: Duration = Duration::from_secs(60);

/// What the name server cannot listen on.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {NAMESERVER}:{PORT}; names are not resolved")]
pub struct Error(#[source] io::Error);

/// Listens, and serves from then on in tasks of its own. The loopback interface has its addresses.
///
/// # Errors
/// When it cannot listen.
pub async fn start(log: &Log) -> Result<(), Error> {
    let datagrams = UdpSocket::bind((NAMESERVER, PORT)).await.map_err(Error)?;
    let connections = TcpListener::bind((NAMESERVER, PORT)).await.map_err(Error)?;
    let places = Arc::new(Semaphore::new(MAX_CLIENTS));
    tokio::spawn(serve_datagrams(datagrams, places.clone(), log.clone()));
    let limits = Limits {
        clients: MAX_CLIENTS,
        places,
    };
    tokio::spawn(async move { streams::serve(&connections, limits, || connect(Transport::Tcp)).await });
    Ok(())
}

async fn serve_datagrams(socket: UdpSocket, places: Arc<Semaphore>, log: Log) {
    let socket = Arc::new(socket);
    let mut buffer = vec![0; MAX_QUESTION];
    loop {
        // An error is that of an earlier answer, which found nobody.
        let Ok((length, client)) = socket.recv_from(&mut buffer).await else {
            continue;
        };
        let Ok(place) = places.clone().try_acquire_owned() else {
            continue;
        };
        let (socket, log, question) = (socket.clone(), log.clone(), buffer[..length].to_vec());
        tokio::spawn(async move {
            match timeout(LATEST, ask(&question)).await {
                // The client may be gone.
                Ok(Ok(answer)) => drop(socket.send_to(&answer, client).await),
                Ok(Err(error)) => log.warn(format!("cannot have a name resolved by the host: {error}")),
                Err(_) => {}
            }
            drop(place);
        });
    }
}

/// One question of a datagram, and the answer.
async fn ask(question: &[u8]) -> io::Result<Vec<u8>> {
    let mut host = connect(Transport::Udp).await?;
    let question = framed(question).ok_or(io::ErrorKind::InvalidInput)?;
    host.write_all(&question).await?;
    let mut answer = vec![0; host.read_u16().await?.into()];
    host.read_exact(&mut answer).await?;
    Ok(answer)
}

async fn connect(transport: Transport) -> io::Result<VsockStream> {
    let mut host = VsockStream::connect(VsockAddr::new(VMADDR_CID_HOST, HOST_NAMES)).await?;
    host.write_u8(transport.byte()).await?;
    Ok(host)
}
