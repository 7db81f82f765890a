//! A TCP listener whose clients are each joined to a stream.

use std::{io, os::fd::AsFd, sync::Arc, time::Duration};

use socket2::{SockRef, TcpKeepalive};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    task::JoinSet,
    time::sleep,
};

use crate::{Limits, relay};

/// A pause after a failed accept, which is for want of memory or descriptors.
const PAUSE: Duration = Duration::from_millis(50);

/// A client that says nothing for so long is asked whether it is there: one that was unplugged keeps no place for ever.
const KEEPALIVE: Duration = Duration::from_secs(30);

/// Serves the clients of `listener` until dropped, and their connections end with it; `connect` makes the stream that a
/// client is joined to, and is called before anything is waited for once a client is taken. Clients more than `limits` allow wait
/// until others have gone.
pub async fn serve<C, F, S>(listener: &TcpListener, limits: Limits, connect: C)
where
    C: Fn() -> F,
    F: Future<Output = io::Result<S>> + Send + 'static,
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let own_places = Arc::new(Semaphore::new(limits.clients));
    let mut clients = JoinSet::new();
    loop {
        let own_place = own_places.clone().acquire_owned().await;
        // A client is taken when there is a descriptor for its stream, too: until then it waits, and is not closed.
        let accept = async {
            let spare = listener.as_fd().try_clone_to_owned()?;
            Ok::<_, io::Error>((listener.accept().await?, spare))
        };
        let Ok(((client, _), spare)) = accept.await else {
            sleep(PAUSE).await;
            continue;
        };
        while clients.try_join_next().is_some() {}
        prepare(&client);
        let connecting = connect();
        // Taken last: a listener without clients keeps no place from the others.
        let place = limits.places.clone().acquire_owned().await;
        clients.spawn(async move {
            drop(spare);
            // The end of the connection is all that the two ends can be told of an error.
            if let Ok(stream) = connecting.await {
                let _ = relay(client, stream).await;
            }
            drop((own_place, place));
        });
    }
}

/// Sets what a relayed connection wants. Neither is worth losing the connection for.
pub fn prepare(stream: &TcpStream) {
    let _ = stream.set_nodelay(true);
    let keepalive = TcpKeepalive::new().with_time(KEEPALIVE);
    let _ = SockRef::from(stream).set_tcp_keepalive(&keepalive);
}

#[cfg(test)]
mod tests {
    use std::{net::SocketAddr, time::Instant};

    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        task::JoinHandle,
    };

    use super::*;
    use crate::listen;

    fn limits(clients: usize, places: usize) -> Limits {
        Limits {
            clients,
            places: Arc::new(Semaphore::new(places)),
        }
    }

    /// A server that answers when its client has ended its input, and a listener in front of it.
    async fn published(limits: Limits) -> (SocketAddr, JoinHandle<()>) {
        let server = listen::tcp(([127, 0, 0, 1], 0).into()).unwrap();
        let behind = server.local_addr().unwrap();
        tokio::spawn(async move {
            loop {
                let (mut client, _) = server.accept().await.unwrap();
                tokio::spawn(async move {
                    let mut input = vec![];
                    client.read_to_end(&mut input).await?;
                    client.write_all(&input).await
                });
            }
        });
        let front = listen::tcp(([127, 0, 0, 1], 0).into()).unwrap();
        let address = front.local_addr().unwrap();
        let serving =
            tokio::spawn(async move { serve(&front, limits, move || TcpStream::connect(behind)).await });
        (address, serving)
    }

    async fn ask(mut client: TcpStream) {
        client.write_all(b"ahoy").await.unwrap();
        client.shutdown().await.unwrap();
        let mut answer = vec![];
        client.read_to_end(&mut answer).await.unwrap();
        assert_eq!(answer, b"ahoy");
    }

    #[tokio::test]
    async fn many_clients_at_once_are_all_answered() {
        let limits = limits(1000, 1000);
        let (address, _serving) = published(limits.clone()).await;
        let mut clients = vec![];
        for _ in 0..300 {
            clients.push(TcpStream::connect(address).await.unwrap());
        }
        // Held open together, and answered in the other order.
        for client in clients.into_iter().rev() {
            ask(client).await;
        }
        while limits.places.available_permits() != 1000 {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn clients_beyond_the_limits_wait_and_are_served() {
        for limits in [limits(1, 100), limits(100, 1)] {
            let (address, _serving) = published(limits).await;
            let holder = TcpStream::connect(address).await.unwrap();
            let waiting = tokio::spawn(ask(TcpStream::connect(address).await.unwrap()));
            sleep(Duration::from_millis(50)).await;
            assert!(!waiting.is_finished());
            drop(holder);
            waiting.await.unwrap();
        }
    }

    #[tokio::test]
    async fn everything_ends_when_the_service_is_dropped() {
        let (address, serving) = published(limits(10, 10)).await;
        let mut client = TcpStream::connect(address).await.unwrap();
        client.write_all(b"x").await.unwrap();
        serving.abort();
        let _ = serving.await;
        let began = Instant::now();
        // An end or a reset.
        assert!(!matches!(client.read(&mut [0; 8]).await, Ok(1..)));
        assert!(began.elapsed() < Duration::from_secs(30));
        assert!(TcpStream::connect(address).await.is_err());
    }
}
