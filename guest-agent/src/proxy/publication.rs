//! The proxy's conversation with the supervisor ([`lighter_protocol::publish`]).

use std::{io, time::Duration};

use lighter_protocol::{
    frame::{FrameError, encode_message},
    ports::HOST_PUBLISH,
    publish::{Publish, Reply},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt},
    time::{sleep, timeout},
};
use tokio_vsock::{VMADDR_CID_HOST, VsockAddr, VsockStream};

use crate::frames::{self, FrameReader};

/// How long publishing may take; dockerd waits for 16 seconds.
const PATIENCE: Duration = Duration::from_secs(14);

/// Before another try to reach the supervisor, which refuses when many ask at once.
const PAUSE: Duration = Duration::from_millis(50);

/// How long the supervisor may take to take the port back.
const FAREWELL: Duration = Duration::from_secs(5);

/// Why a port is not published.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The supervisor says so, in its own words.
    #[error("{0}")]
    Refused(String),
    /// It is busy, or gone.
    #[error("the host did not answer within {} s", PATIENCE.as_secs())]
    Timeout,
    /// The connection broke.
    #[error("cannot ask the host")]
    Io(#[from] io::Error),
    /// It says something else.
    #[error("cannot understand the host")]
    Answer(#[from] frames::Error),
    /// So too.
    #[error("cannot speak with the host")]
    Frame(#[from] FrameError),
}

/// A published port: it lasts until this is dropped.
#[derive(Debug)]
pub struct Publication<S>(FrameReader<S>);

impl Publication<VsockStream> {
    /// Publishes a port.
    ///
    /// # Errors
    /// Why it is not.
    pub async fn begin(publish: &Publish) -> Result<Self, Error> {
        let begin = async { ask(connect().await?, publish).await };
        timeout(PATIENCE, begin).await.unwrap_or(Err(Error::Timeout))
    }
}

/// A refusal cannot be told from nobody listening, so the caller's patience ends this.
async fn connect() -> io::Result<VsockStream> {
    loop {
        match VsockStream::connect(VsockAddr::new(VMADDR_CID_HOST, HOST_PUBLISH)).await {
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => sleep(PAUSE).await,
            result => return result,
        }
    }
}

async fn ask<S>(mut stream: S, publish: &Publish) -> Result<Publication<S>, Error>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    stream.write_all(&encode_message(publish)?).await?;
    let mut reader = FrameReader::new(stream);
    let ended = || io::Error::from(io::ErrorKind::UnexpectedEof);
    let reply = reader.next().await?.ok_or_else(ended)?;
    match reply.message()? {
        Reply::Published => Ok(Publication(reader)),
        Reply::Refused { reason } => Err(Error::Refused(reason)),
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Publication<S> {
    /// Waits until the supervisor has ended it, which it does when it is gone.
    pub async fn ended(&mut self) {
        while let Ok(Some(_)) = self.0.next().await {}
    }

    /// Takes the port back, and waits until it is.
    pub async fn end(mut self) {
        let ending = async {
            // A connection that is broken is over, too.
            let _ = self.0.get_mut().shutdown().await;
            self.ended().await;
        };
        let _ = timeout(FAREWELL, ending).await;
    }
}

#[cfg(test)]
mod tests {
    use lighter_protocol::publish::Transport;
    use tokio::net::UnixStream;

    use super::*;

    fn publish() -> Publish {
        Publish {
            transport: Transport::Tcp,
            host: "0.0.0.0:80".parse().unwrap(),
            container: "172.17.0.2:80".parse().unwrap(),
            guest_port: 7,
            again: false,
        }
    }

    #[tokio::test]
    async fn a_port_is_asked_for_and_given_back() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let asking = tokio::spawn(async move { ask(ours, &publish()).await });
        let mut supervisor = FrameReader::new(theirs);
        let asked: Publish = supervisor.next().await.unwrap().unwrap().message().unwrap();
        assert_eq!(asked, publish());
        let reply = encode_message(&Reply::Published).unwrap();
        supervisor.get_mut().write_all(&reply).await.unwrap();
        let publication = asking.await.unwrap().unwrap();
        let ending = tokio::spawn(publication.end());
        assert!(supervisor.next().await.unwrap().is_none());
        assert!(!ending.is_finished());
        drop(supervisor);
        ending.await.unwrap();
    }

    #[tokio::test]
    async fn a_refusal_has_the_supervisor_s_words() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let reason = "in use".to_owned();
        let reply = encode_message(&Reply::Refused { reason }).unwrap();
        theirs.write_all(&reply).await.unwrap();
        assert_eq!(ask(ours, &publish()).await.unwrap_err().to_string(), "in use");
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(b"HTTP/1.1 200 OK").await.unwrap();
        assert!(matches!(ask(ours, &publish()).await, Err(Error::Answer(_))));
    }
}
