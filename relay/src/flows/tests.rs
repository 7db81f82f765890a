use std::net::Ipv4Addr;

use tokio::{net::UnixStream, task::JoinHandle, time::timeout};

use super::*;

async fn socket() -> UdpSocket {
    UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap()
}

fn limits(flows: usize) -> Limits {
    Limits {
        clients: flows,
        places: Arc::new(Semaphore::new(64)),
    }
}

/// A published socket in front of `server`, and a counter of the flows that were made.
async fn published(server: SocketAddr, limits: Limits) -> (SocketAddr, Arc<AtomicU64>, JoinHandle<()>) {
    let front = socket().await;
    let address = front.local_addr().unwrap();
    let made = Arc::new(AtomicU64::new(0));
    let connect = {
        let made = made.clone();
        move || {
            made.fetch_add(1, Ordering::Relaxed);
            async move {
                let (ours, theirs) = UnixStream::pair()?;
                let back = socket().await;
                back.connect(server).await?;
                tokio::spawn(async move { datagram::join(theirs, &back).await });
                Ok(ours)
            }
        }
    };
    (
        address,
        made,
        tokio::spawn(async move { serve(&Arc::new(front), limits, connect).await }),
    )
}

/// Answers each datagram with itself and the length of its sender's port, so that flows can be told apart.
async fn echo() -> SocketAddr {
    let server = socket().await;
    let address = server.local_addr().unwrap();
    tokio::spawn(async move {
        let mut buffer = vec![0; datagram::MAX];
        loop {
            let (length, client) = server.recv_from(&mut buffer).await.unwrap();
            let mut answer = client.port().to_be_bytes().to_vec();
            answer.extend_from_slice(&buffer[..length]);
            server.send_to(&answer, client).await.unwrap();
        }
    });
    address
}

async fn ask(client: &UdpSocket, payload: &[u8]) -> (u16, Vec<u8>) {
    client.send(payload).await.unwrap();
    let mut buffer = vec![0; datagram::MAX];
    let length = client.recv(&mut buffer).await.unwrap();
    let (port, rest) = buffer[..length].split_at(2);
    (u16::from_be_bytes([port[0], port[1]]), rest.to_vec())
}

async fn client(of: SocketAddr) -> UdpSocket {
    let client = socket().await;
    client.connect(of).await.unwrap();
    client
}

#[tokio::test]
async fn clients_keep_a_flow_of_their_own_and_datagrams_their_bounds() {
    let (address, made, _serving) = published(echo().await, limits(8)).await;
    let (one, two) = (client(address).await, client(address).await);
    let (first, answer) = ask(&one, b"one").await;
    assert_eq!(answer, b"one");
    let (second, answer) = ask(&two, b"").await;
    assert_eq!(answer, b"");
    assert_ne!(first, second);
    let long = vec![5; 60_000];
    assert_eq!(ask(&one, &long).await, (first, long));
    assert_eq!(made.load(Ordering::Relaxed), 2);
}

#[tokio::test]
async fn one_client_more_ends_the_flow_that_was_silent_for_longest() {
    let limits = limits(2);
    let (address, made, _serving) = published(echo().await, limits.clone()).await;
    let clients = [
        client(address).await,
        client(address).await,
        client(address).await,
    ];
    ask(&clients[0], b"x").await;
    sleep(Duration::from_millis(20)).await;
    let (kept, _) = ask(&clients[1], b"x").await;
    ask(&clients[2], b"x").await;
    assert_eq!(ask(&clients[1], b"x").await.0, kept);
    assert_eq!(made.load(Ordering::Relaxed), 3);
    // The first gets another, and the places of flows that ended are free again.
    ask(&clients[0], b"x").await;
    assert_eq!(made.load(Ordering::Relaxed), 4);
    while limits.places.available_permits() != 62 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn a_flow_that_takes_nothing_holds_up_no_other() {
    let front = socket().await;
    let address = front.local_addr().unwrap();
    let server = echo().await;
    let made = AtomicU64::new(0);
    let stuck = Arc::new(std::sync::Mutex::new(vec![]));
    let connect = move || {
        let is_first = made.fetch_add(1, Ordering::Relaxed) == 0;
        let stuck = stuck.clone();
        async move {
            let (ours, theirs) = UnixStream::pair()?;
            if is_first {
                stuck.lock().unwrap().push(theirs);
            } else {
                let back = socket().await;
                back.connect(server).await?;
                tokio::spawn(async move { datagram::join(theirs, &back).await });
            }
            Ok(ours)
        }
    };
    let _serving = tokio::spawn(async move { serve(&Arc::new(front), limits(8), connect).await });
    let (slow, fast) = (client(address).await, client(address).await);
    for _ in 0..1000 {
        slow.send(&[1; 8000]).await.unwrap();
        tokio::task::yield_now().await;
    }
    // The kernel's own queue may be full of the slow one's still.
    let answered = async {
        loop {
            fast.send(b"fast").await.unwrap();
            let mut buffer = [0; 64];
            if timeout(Duration::from_millis(100), fast.recv(&mut buffer))
                .await
                .is_ok()
            {
                return;
            }
        }
    };
    timeout(Duration::from_secs(60), answered).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_silent_flow_ends() {
    let activity = Activity::new();
    let began = Instant::now();
    let (ours, _theirs) = UnixStream::pair().unwrap();
    let (queue, queued) = mpsc::channel(1);
    let socket = Arc::new(socket().await);
    let client = ([127, 0, 0, 1], 9).into();
    flow(ours, queued, Arc::downgrade(&socket), client, &activity).await;
    assert_eq!(began.elapsed().as_secs(), IDLE.as_secs());
    drop(queue);
}

#[tokio::test]
async fn everything_ends_when_the_service_is_dropped() {
    let limits = limits(8);
    let (address, _made, serving) = published(echo().await, limits.clone()).await;
    ask(&client(address).await, b"x").await;
    serving.abort();
    assert!(serving.await.unwrap_err().is_cancelled());
    UdpSocket::bind(address).await.unwrap();
    while limits.places.available_permits() != 64 {
        tokio::task::yield_now().await;
    }
}
