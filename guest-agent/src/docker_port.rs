//! The engine API on vsock: each connection is joined to one of dockerd's socket, bytes untouched.
//!
//! A connection may come before the engine is ready, or while it is restarted: it waits for readiness, and the client
//! sees a slow engine instead of a refused connection. When the agent has given up on the engine, it is closed.

use std::{io, path::Path};

use lighter_protocol::agent::EngineState;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::UnixStream,
    sync::watch,
    time::{Duration, sleep},
};

use lighter_relay::relay;

/// Where dockerd listens.
pub const ENGINE_SOCKET: &str = "/run/docker.sock";

/// Before another try when dockerd's backlog is full, for which there is no event.
const BACKLOG_PAUSE: Duration = Duration::from_millis(20);

/// Serves one client until both directions have ended.
///
/// # Errors
/// When the engine cannot be reached, or either side breaks.
pub async fn serve<S: AsyncRead + AsyncWrite + Unpin>(
    client: S,
    state: watch::Receiver<EngineState>,
    socket: &Path,
) -> io::Result<()> {
    let engine = connect(state, socket).await?;
    relay(client, engine).await
}

async fn connect(mut state: watch::Receiver<EngineState>, socket: &Path) -> io::Result<UnixStream> {
    loop {
        let settled = state.wait_for(|state| {
            matches!(
                state,
                EngineState::Ready
                    | EngineState::Stopped
                    | EngineState::Failed {
                        retry_in_ms: None,
                        ..
                    }
            )
        });
        let is_ready = *settled.await.map_err(io::Error::other)? == EngineState::Ready;
        if !is_ready {
            return Err(io::Error::new(
                io::ErrorKind::NotConnected,
                "the engine does not run",
            ));
        }
        match UnixStream::connect(socket).await {
            Ok(stream) => return Ok(stream),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => sleep(BACKLOG_PAUSE).await,
            // It has just died, and its supervision has not noticed yet.
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound
                ) =>
            {
                state.changed().await.map_err(io::Error::other)?;
            }
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::UnixListener,
    };

    use super::*;

    async fn upper_case(listener: &UnixListener) {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut input = String::new();
        stream.read_to_string(&mut input).await.unwrap();
        stream.write_all(input.to_uppercase().as_bytes()).await.unwrap();
    }

    #[tokio::test]
    async fn a_client_that_comes_early_waits_for_the_engine() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("docker.sock");
        let (states, state) = watch::channel(EngineState::Starting);
        let (mut client, server) = UnixStream::pair().unwrap();
        let serving = tokio::spawn({
            let socket = socket.clone();
            async move { serve(server, state, &socket).await }
        });
        client.write_all(b"ping").await.unwrap();
        client.shutdown().await.unwrap();
        tokio::task::yield_now().await;
        let failed = EngineState::Failed {
            reason: String::new(),
            last_lines: vec![],
            retry_in_ms: Some(1),
        };
        states.send(failed).unwrap();
        // Ready, and dead again at once: the client must survive that, too.
        states.send(EngineState::Ready).unwrap();
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        states.send(EngineState::Starting).unwrap();
        let listener = UnixListener::bind(&socket).unwrap();
        states.send(EngineState::Ready).unwrap();
        let mut answer = String::new();
        let (_, read) = tokio::join!(upper_case(&listener), client.read_to_string(&mut answer));
        read.unwrap();
        assert_eq!(answer, "PING");
        serving.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_client_is_closed_when_the_engine_has_given_up() {
        let (states, state) = watch::channel(EngineState::Starting);
        let (mut client, server) = UnixStream::pair().unwrap();
        let serving = tokio::spawn(serve(server, state, Path::new("/nonexistent")));
        let gave_up = EngineState::Failed {
            reason: String::new(),
            last_lines: vec![],
            retry_in_ms: None,
        };
        states.send(gave_up).unwrap();
        assert_eq!(client.read(&mut [0; 8]).await.unwrap(), 0);
        assert!(serving.await.unwrap().is_err());
    }
}
