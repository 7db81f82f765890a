//! A UDP socket whose clients each get a stream of datagrams of their own, as a NAT has its table of flows: a flow begins
//! with the first datagram of a client and ends when nothing has come either way for a while.
//!
//! Datagrams get lost where TCP would wait: a flow whose stream takes nothing holds a few and drops the others, and holds
//! up no other flow.

use std::{
    collections::HashMap,
    io,
    net::SocketAddr,
    sync::{
        Arc, Weak,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::UdpSocket,
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    task::{AbortHandle, JoinSet},
    time::{Instant, sleep},
};

use crate::{Limits, datagram};

/// How long a flow may be silent, as with Docker's own proxy.
const IDLE: Duration = Duration::from_secs(90);

/// Datagrams of one client that wait for its stream.
const QUEUE: usize = 32;

/// Bytes of all datagrams of one socket that wait.
const WAITING_BYTES: usize = 8 << 20;

/// A pause after an error of the socket, which is for want of memory.
const PAUSE: Duration = Duration::from_millis(50);

/// A datagram with its part of [`WAITING_BYTES`].
type Waiting = (Vec<u8>, OwnedSemaphorePermit);

/// One client's flow.
struct Flow {
    id: u64,
    queue: mpsc::Sender<Waiting>,
    activity: Arc<Activity>,
    task: AbortHandle,
}

/// When something last came or went.
struct Activity {
    began: Instant,
    last_ms: AtomicU64,
}

impl Activity {
    fn new() -> Self {
        Self {
            began: Instant::now(),
            last_ms: AtomicU64::new(0),
        }
    }

    fn note(&self) {
        let ms = u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.last_ms.store(ms, Ordering::Relaxed);
    }

    fn silent_for(&self) -> Duration {
        let last = Duration::from_millis(self.last_ms.load(Ordering::Relaxed));
        self.began.elapsed().saturating_sub(last)
    }

    /// Returns when nothing has happened for [`IDLE`].
    async fn until_idle(&self) {
        while let Some(left) = IDLE.checked_sub(self.silent_for()).filter(|left| !left.is_zero()) {
            sleep(left).await;
        }
    }
}

/// Serves the clients of `socket` until dropped, and their flows end with it; `connect` makes a stream of [`datagram`]s for each. A client more than
/// `limits` allow ends the flow that was silent for longest.
pub async fn serve<C, F, S>(socket: &Arc<UdpSocket>, limits: Limits, connect: C)
where
    C: Fn() -> F,
    F: Future<Output = io::Result<S>> + Send + 'static,
    S: AsyncRead + AsyncWrite + Send + 'static,
{
    let room = Arc::new(Semaphore::new(WAITING_BYTES));
    let mut table: HashMap<SocketAddr, Flow> = HashMap::new();
    let mut tasks: JoinSet<(SocketAddr, u64)> = JoinSet::new();
    let mut buffer = vec![0; datagram::MAX];
    let mut next_id = 0;
    loop {
        let (length, client) = tokio::select! {
            Some(ended) = tasks.join_next() => {
                // One that was aborted is out of the table already.
                if let Ok((client, id)) = ended
                    && table.get(&client).is_some_and(|flow| flow.id == id)
                {
                    table.remove(&client);
                }
                continue;
            }
            received = socket.recv_from(&mut buffer) => match received {
                Ok(received) => received,
                Err(_) => {
                    sleep(PAUSE).await;
                    continue;
                }
            },
        };
        let Ok(part) = room
            .clone()
            .try_acquire_many_owned(u32::try_from(length).unwrap_or(u32::MAX))
        else {
            continue;
        };
        let mut waiting = (buffer[..length].to_vec(), part);
        if let Some(flow) = table.get(&client) {
            match flow.queue.try_send(waiting) {
                // A flow that is just ending takes nothing more, and the client gets another.
                Err(mpsc::error::TrySendError::Closed(back)) => waiting = back,
                Ok(()) | Err(mpsc::error::TrySendError::Full(_)) => continue,
            }
            table.remove(&client);
        }
        if table.len() >= limits.clients {
            end_the_most_silent(&mut table);
        }
        let Ok(place) = limits.places.clone().try_acquire_owned() else {
            continue;
        };
        let (queue, queued) = mpsc::channel(QUEUE);
        // The queue is new and has room.
        let _ = queue.try_send(waiting);
        let activity = Arc::new(Activity::new());
        let (id, connecting) = (next_id, connect());
        next_id += 1;
        let task = tasks.spawn({
            // The socket is gone with the service, and not when the last of its flows has noticed.
            let (socket, activity) = (Arc::downgrade(socket), activity.clone());
            async move {
                if let Ok(stream) = connecting.await {
                    flow(stream, queued, socket, client, &activity).await;
                }
                drop(place);
                (client, id)
            }
        });
        let flow = Flow {
            id,
            queue,
            activity,
            task,
        };
        table.insert(client, flow);
    }
}

fn end_the_most_silent(table: &mut HashMap<SocketAddr, Flow>) {
    let silent = table.iter().max_by_key(|(_, flow)| flow.activity.silent_for());
    if let Some(client) = silent.map(|(&client, _)| client)
        && let Some(flow) = table.remove(&client)
    {
        flow.task.abort();
    }
}

/// Until the stream ends, or nothing has happened for [`IDLE`].
async fn flow<S: AsyncRead + AsyncWrite>(
    stream: S,
    mut queued: mpsc::Receiver<Waiting>,
    socket: Weak<UdpSocket>,
    client: SocketAddr,
    activity: &Activity,
) {
    let (mut reader, mut writer) = tokio::io::split(stream);
    let there = async {
        while let Some((payload, part)) = queued.recv().await {
            activity.note();
            datagram::write(&mut writer, &payload).await?;
            drop(part);
        }
        io::Result::Ok(())
    };
    let back = async {
        while let Some(payload) = datagram::read(&mut reader).await? {
            activity.note();
            let Some(socket) = socket.upgrade() else {
                break;
            };
            // The client may be gone, or its network take no datagram of that length.
            let _ = socket.send_to(&payload, client).await;
        }
        io::Result::Ok(())
    };
    tokio::select! {
        _ = there => {}
        _ = back => {}
        () = activity.until_idle() => {}
    }
}

#[cfg(test)]
mod tests;
