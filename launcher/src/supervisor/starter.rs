//! The process that started this one, and hears what happens from it.

use super::control;
use super::demand::{Demand, StopRequest};
use super::state::State;
use lighter_protocol::supervisor::Phase;
use std::os::fd::{AsFd, OwnedFd};
use tokio::net::UnixStream;
use tokio::sync::mpsc;

/// The socket to the process that started this one, if it gave one as standard input.
pub fn find() -> Option<std::os::unix::net::UnixStream> {
    let stdin: OwnedFd = std::io::stdin().as_fd().try_clone_to_owned().ok()?;
    rustix::net::sockopt::socket_type(&stdin).ok()?;
    Some(stdin.into())
}

/// The same, for a task to speak over.
pub fn watched(stream: std::os::unix::net::UnixStream) -> Option<UnixStream> {
    stream.set_nonblocking(true).ok()?;
    UnixStream::from_std(stream).ok()
}

/// Tells the starter what happens. A throw-away VM ends with it, or when the template is written that is being made of it: the
/// next one is to have it.
pub async fn watch(starter: UnixStream, state: State, throw_away: bool, demands: mpsc::Sender<Demand>) {
    let (reader, writer) = starter.into_split();
    let _ = control::watch_loop(reader, writer, &state).await;
    if throw_away {
        state.template_written().await;
    }
    if throw_away && state.phase() != Phase::Ended {
        let _ = demands.send(Demand::Stop(StopRequest::PULL_THE_PLUG)).await;
    }
}
