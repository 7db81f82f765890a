//! The supervisor's control socket: [`lighter_protocol::supervisor`].

use super::demand::{Demand, StopRequest};
use super::lines::Lines;
use super::state::State;
use super::usage::Purpose;
use super::{Lasting, standby};
use lighter_protocol::activity::Use;
use lighter_protocol::supervisor::{MAX_LINE, Phase, Request, SnapshotAnswer};
use serde::Serialize;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc, oneshot};

/// Clients at once; more wait in the listen queue.
const MAX_CLIENTS: usize = 1024;

/// Serves clients until the VM is over and each of them was told.
pub async fn serve(listener: UnixListener, lasting: Lasting, demands: mpsc::Sender<Demand>) {
    let places = Arc::new(Semaphore::new(MAX_CLIENTS));
    let mut clients = tokio::task::JoinSet::new();
    let mut watch = lasting.state.watch();
    loop {
        let accept = async {
            let place = places.clone().acquire_owned().await;
            (listener.accept().await, place)
        };
        let (accepted, place) = tokio::select! {
            accepted = accept => accepted,
            _ = watch.wait_for(|status| status.phase == Phase::Ended) => break,
        };
        while clients.try_join_next().is_some() {}
        match accepted {
            Ok((client, _)) => {
                let (lasting, demands) = (lasting.clone(), demands.clone());
                clients.spawn(async move {
                    let _ = client_loop(client, &lasting, &demands).await;
                    drop(place);
                });
            }
            // Out of descriptors: others will close theirs.
            Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
        }
    }
    while clients.join_next().await.is_some() {}
}

async fn client_loop(
    client: UnixStream,
    lasting: &Lasting,
    demands: &mpsc::Sender<Demand>,
) -> io::Result<()> {
    let Lasting {
        state,
        ports,
        snapshots,
        usage,
        suspends_after,
    } = lasting;
    let (reader, mut writer) = client.into_split();
    let mut lines = Lines::new(reader, MAX_LINE);
    let mut watch = state.watch();
    loop {
        let line = tokio::select! {
            line = lines.next() => line?,
            _ = watch.wait_for(|status| status.phase == Phase::Ended) => return Ok(()),
        };
        let Some(line) = line else { return Ok(()) };
        match serde_json::from_str(&line)? {
            Request::Status => {
                let mut status = state.watch().borrow().clone();
                status.activity = Some(usage.activity(status.phase == Phase::Ready, *suspends_after));
                send(&mut writer, &status).await?;
            }
            Request::Ports => send(&mut writer, &ports.list()).await?,
            Request::Snapshot { folder } => {
                let saving = usage.visit(Purpose::Saving);
                let answer = snapshots.take(folder, state).await;
                drop(saving);
                send(&mut writer, &answer).await?;
            }
            Request::Suspend => {
                let _saving = usage.visit(Purpose::Saving);
                let answer = snapshots.suspend(state).await;
                let suspended = matches!(answer, SnapshotAnswer::Taken(_));
                if suspended {
                    // Also when the client is gone: the VM stands still.
                    let _ = demands.send(Demand::Stop(StopRequest::PULL_THE_PLUG)).await;
                }
                send(&mut writer, &answer).await?;
                if suspended {
                    return watch_loop(lines.into_reader(), &mut writer, state).await;
                }
            }
            Request::Watch => return watch_loop(lines.into_reader(), &mut writer, state).await,
            Request::Use { purpose } => {
                let _visit = usage.visit(match purpose {
                    Use::Session => Purpose::Session,
                    Use::Logs => Purpose::Logs,
                });
                if purpose == Use::Session {
                    standby::runs(state, usage).await;
                }
                return watch_loop(lines.into_reader(), &mut writer, state).await;
            }
            Request::StandDown => {
                let (answer, answered) = oneshot::channel();
                let _ = demands.send(Demand::StandDown(answer)).await;
                // A supervisor that ends for another reason answers nobody.
                send(&mut writer, &answered.await.unwrap_or(false)).await?;
            }
            Request::Stop { force, timeout_s } => {
                let request = StopRequest {
                    force,
                    timeout: Duration::from_secs(timeout_s),
                };
                // The supervisor's loop ends only with the VM, which is what was asked for.
                let _ = demands.send(Demand::Stop(request)).await;
                return watch_loop(lines.into_reader(), &mut writer, state).await;
            }
        }
    }
}

/// Sends the status at every change until the VM is over or the client is gone.
///
/// # Errors
/// When the client cannot be written to.
pub async fn watch_loop(
    mut reader: impl AsyncReadExt + Unpin,
    mut writer: impl AsyncWrite + Unpin,
    state: &State,
) -> io::Result<()> {
    let mut watch = state.watch();
    let mut byte = [0];
    loop {
        let status = watch.borrow_and_update().clone();
        send(&mut writer, &status).await?;
        if status.phase == Phase::Ended {
            return Ok(());
        }
        tokio::select! {
            changed = watch.changed() => if changed.is_err() { return Ok(()) },
            read = reader.read(&mut byte) => if read? == 0 { return Ok(()) },
        }
    }
}

async fn send(writer: &mut (impl AsyncWrite + Unpin), answer: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(answer)?;
    line.push(b'\n');
    writer.write_all(&line).await
}
