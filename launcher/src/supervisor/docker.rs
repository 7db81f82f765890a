//! The engine's socket on the host: each client gets a connection of its own into the guest, bytes untouched.
//!
//! The socket listens for as long as the supervisor lives: clients that come before the engine is ready wait until it is, and have a
//! suspended VM go on.

use super::standby;
use super::state::{State, engine_settled};
use super::usage::{Purpose, Usage};
use lighter_protocol::ports::GUEST_DOCKER;
use lighter_protocol::supervisor::Phase;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional_with_sizes};
use tokio::net::{UnixListener, UnixSocket, UnixStream};
use tokio::sync::Semaphore;
use tokio::time::timeout;

/// Clients at once; more wait in the listen queue.
const MAX_CLIENTS: usize = 1024;

/// Bytes in flight for each client and direction.
const BUFFER: usize = 64 << 10;

/// The longest answer to `CONNECT`, bytes.
const MAX_ANSWER: usize = 32;

/// Serves clients for as long as the supervisor runs.
pub async fn serve(listener: UnixListener, muxer: PathBuf, state: State, usage: Usage) {
    let places = Arc::new(Semaphore::new(MAX_CLIENTS));
    loop {
        let Ok(place) = places.clone().acquire_owned().await else {
            return;
        };
        match accept(&listener).await {
            Ok((client, way)) => {
                let (muxer, state, usage) = (muxer.clone(), state.clone(), usage.clone());
                let visit = usage.visit(Purpose::Client);
                tokio::spawn(async move {
                    // Errors are the connection's end, which is all that the two ends can be told.
                    let _ = forward(client, way, &muxer, &state, &usage).await;
                    drop((visit, place));
                });
            }
            // Out of descriptors: others will close theirs.
            Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
        }
    }
}

/// Takes a client when there is a socket for its way into the guest as well: until then it waits, and is not closed.
async fn accept(listener: &UnixListener) -> io::Result<(UnixStream, UnixSocket)> {
    let way = UnixSocket::new_stream()?;
    let (client, _) = listener.accept().await?;
    Ok((client, way))
}

async fn forward(
    mut client: UnixStream,
    way: UnixSocket,
    muxer: &Path,
    state: &State,
    usage: &Usage,
) -> io::Result<()> {
    if !engine_answers(state, usage).await {
        return Ok(());
    }
    let (mut guest, early) = connect_by(way, muxer, GUEST_DOCKER).await?;
    client.write_all(&early).await?;
    copy_bidirectional_with_sizes(&mut client, &mut guest, BUFFER, BUFFER).await?;
    Ok(())
}

/// How long a client waits for the guest to know how late it is.
const CLOCK: Duration = Duration::from_secs(5);

/// Waits until the engine is ready, or known not to become so: it has failed for good, or a suspended VM does not go on.
async fn engine_answers(state: &State, usage: &Usage) -> bool {
    let mut watch = state.watch();
    let failures = watch.borrow().wake_failures;
    standby::runs(state, usage).await;
    let settled = watch.wait_for(|status| engine_settled(status) || status.wake_failures != failures);
    let ready = settled
        .await
        .is_ok_and(|status| status.phase == Phase::Ready && status.wake_failures == failures);
    // An engine whose clock is wrong is better than none, and the next client need not wait for it again.
    if timeout(CLOCK, watch.wait_for(|status| !status.clock_awaited))
        .await
        .is_err()
    {
        state.clock_awaited(false);
    }
    ready
}

/// Connects to a guest's port through the monitor. Returns what the guest has said already, too.
///
/// # Errors
/// When nobody listens on it, or the monitor is gone.
pub async fn connect(muxer: &Path, port: u32) -> io::Result<(UnixStream, Vec<u8>)> {
    connect_by(UnixSocket::new_stream()?, muxer, port).await
}

async fn connect_by(way: UnixSocket, muxer: &Path, port: u32) -> io::Result<(UnixStream, Vec<u8>)> {
    let mut stream = way.connect(muxer).await?;
    stream.write_all(format!("CONNECT {port}\n").as_bytes()).await?;
    let mut answer = vec![];
    let end = loop {
        if let Some(end) = answer.iter().position(|&byte| byte == b'\n') {
            break end;
        }
        if answer.len() >= MAX_ANSWER || stream.read_buf(&mut answer).await? == 0 {
            let message = format!("nobody listens on port {port} in the guest");
            return Err(io::Error::new(io::ErrorKind::ConnectionRefused, message));
        }
    };
    if !answer.starts_with(b"OK ") {
        return Err(io::Error::other("the monitor's answer is not understood"));
    }
    let early = answer.split_off(end + 1);
    Ok((stream, early))
}

#[cfg(test)]
mod tests {
    use super::super::state::testing::vm_and_state;
    use super::*;
    use crate::vm::Vm;
    use lighter_protocol::agent::EngineState;

    /// A muxer that answers with `answer` and then echoes.
    async fn muxer(answer: &'static [u8]) -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vsock.sock");
        let listener = UnixListener::bind(&path).unwrap();
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut line = [0; 13];
            stream.read_exact(&mut line).await.unwrap();
            assert_eq!(&line, b"CONNECT 2375\n");
            stream.write_all(answer).await.unwrap();
        });
        (folder, path)
    }

    #[tokio::test]
    async fn bytes_behind_the_answer_are_kept() {
        let (_folder, path) = muxer(b"OK 7\nearly").await;
        let (mut stream, mut early) = connect(&path, GUEST_DOCKER).await.unwrap();
        stream.read_to_end(&mut early).await.unwrap();
        assert_eq!(early, b"early");
    }

    /// A client of a VM that is suspended, by `serve`.
    async fn waiting() -> (tempfile::TempDir, State, Usage, Vm, UnixStream) {
        let (vm, state) = vm_and_state();
        let usage = Usage::new();
        usage.closed();
        state.stands_by(&vm, None);
        let (folder, muxer) = muxer(b"OK 7\nearly").await;
        let path = folder.path().join("docker.sock");
        let listener = UnixListener::bind(&path).unwrap();
        tokio::spawn(serve(listener, muxer, state.clone(), usage.clone()));
        let client = UnixStream::connect(&path).await.unwrap();
        usage.wanted().await;
        (folder, state, usage, vm, client)
    }

    #[tokio::test]
    async fn a_client_wakes_a_suspended_vm_and_is_served_when_its_engine_is_ready() {
        let (_folder, state, usage, vm, mut client) = waiting().await;
        state.wakes(&vm);
        usage.open();
        state.identity_awaited();
        state.agent_running("1");
        state.engine(EngineState::Ready);
        let mut said = String::new();
        let early = tokio::time::timeout(Duration::from_millis(50), client.read_to_string(&mut said)).await;
        assert!(early.is_err() && said.is_empty(), "{said:?}");
        state.identity_taken(true, "");
        client.read_to_string(&mut said).await.unwrap();
        assert_eq!(said, "early");
    }

    #[tokio::test]
    async fn a_client_that_comes_after_the_host_has_slept_waits_until_the_guest_knows() {
        let (_folder, state, usage, vm, mut client) = waiting().await;
        state.wakes(&vm);
        state.agent_running("1");
        state.engine(EngineState::Ready);
        state.clock_awaited(true);
        usage.open();
        let mut said = String::new();
        let early = tokio::time::timeout(Duration::from_millis(50), client.read_to_string(&mut said)).await;
        assert!(early.is_err() && said.is_empty(), "{said:?}");
        state.clock(0, None);
        client.read_to_string(&mut said).await.unwrap();
        assert_eq!(said, "early");
    }

    #[tokio::test]
    async fn a_client_is_closed_when_a_suspended_vm_does_not_go_on() {
        let (_folder, state, usage, vm, mut client) = waiting().await;
        state.wakes(&vm);
        usage.open();
        usage.closed();
        state.stands_by(&vm, Some("no memory"));
        assert_eq!(client.read(&mut [0; 8]).await.unwrap(), 0);
        let status = state.watch().borrow().clone();
        assert_eq!((status.phase, status.wake_failures), (Phase::StandingBy, 1));
        assert_eq!(status.trouble.unwrap().reason, "no memory");
    }

    #[tokio::test]
    async fn a_refused_port_and_a_nonsense_answer_are_errors() {
        let (_folder, path) = muxer(b"").await;
        let error = connect(&path, GUEST_DOCKER).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
        let (_folder, path) = muxer(b"what is this thing that has no end").await;
        assert!(connect(&path, GUEST_DOCKER).await.is_err());
        let (_folder, path) = muxer(b"NO\n").await;
        assert!(connect(&path, GUEST_DOCKER).await.is_err());
    }
}
