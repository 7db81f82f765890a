use super::*;
use lighter_protocol::agent::ContainersLoad;
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use tokio::net::{TcpStream, UnixListener};

/// A muxer behind which every guest port echoes, with words of its own in front; and a publisher for it.
fn publisher() -> (tempfile::TempDir, Publisher) {
    let folder = tempfile::tempdir().unwrap();
    let muxer = folder.path().join("vsock.sock");
    let listener = UnixListener::bind(&muxer).unwrap();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            tokio::spawn(async move {
                let mut line = [0; 10];
                stream.read_exact(&mut line).await?;
                assert_eq!(&line, b"CONNECT 7\n");
                stream.write_all(b"OK 1\n").await?;
                let (mut reader, mut writer) = stream.split();
                tokio::io::copy(&mut reader, &mut writer).await
            });
        }
    });
    let publisher = Publisher {
        ports: Ports::default(),
        policy: Policy::default(),
        elsewhere: Elsewhere::new(random::reserve().map(|block| block.ports)),
        muxer,
        usage: Usage::new(),
    };
    (folder, publisher)
}

fn publish(transport: Transport, host: SocketAddr) -> Publish {
    Publish {
        transport,
        host,
        container: "172.17.0.2:80".parse().unwrap(),
        guest_port: 7,
        again: false,
    }
}

/// An address that nobody has.
fn free(transport: Transport) -> SocketAddr {
    let address = (Ipv4Addr::LOCALHOST, 0).into();
    match open(transport, address).unwrap() {
        Socket::Tcp(socket) => socket.local_addr(),
        Socket::Udp(socket) => socket.local_addr(),
    }
    .unwrap()
}

async fn begin(publisher: &Publisher, bytes: &[u8], has_place: bool) -> UnixStream {
    let (mut proxy, theirs) = UnixStream::pair().unwrap();
    let publisher = publisher.clone();
    let limits = Limits {
        clients: 8,
        places: Arc::new(Semaphore::new(8)),
    };
    tokio::spawn(async move { publisher.serve(theirs, limits, has_place).await });
    proxy.write_all(bytes).await.unwrap();
    proxy
}

async fn reply(proxy: &mut UnixStream) -> Reply {
    let mut decoder = Decoder::new();
    loop {
        if let Some(frame) = decoder.next_frame().unwrap() {
            return frame.message().unwrap();
        }
        let mut buffer = [0; 256];
        let length = proxy.read(&mut buffer).await.unwrap();
        assert_ne!(length, 0, "an answer");
        decoder.push(&buffer[..length]);
    }
}

async fn ask(publisher: &Publisher, publish: &Publish) -> (UnixStream, Reply) {
    let mut proxy = begin(publisher, &encode_message(publish).unwrap(), true).await;
    let reply = reply(&mut proxy).await;
    (proxy, reply)
}

#[tokio::test]
async fn a_port_is_published_until_its_proxy_ends() {
    let (_folder, publisher) = publisher();
    let address = free(Transport::Tcp);
    let publish = publish(Transport::Tcp, address);
    let (mut proxy, reply) = ask(&publisher, &publish).await;
    assert_eq!(reply, Reply::Published);
    let listed = publisher.ports.list();
    assert_eq!(listed.len(), 1);
    assert_eq!(
        (listed[0].host, listed[0].container),
        (address, publish.container)
    );
    let mut client = TcpStream::connect(address).await.unwrap();
    client.write_all(b"ahoy").await.unwrap();
    client.shutdown().await.unwrap();
    let mut answer = String::new();
    client.read_to_string(&mut answer).await.unwrap();
    assert_eq!(answer, "ahoy");
    proxy.shutdown().await.unwrap();
    assert_eq!(proxy.read(&mut [0; 8]).await.unwrap(), 0);
    // From the moment that the proxy is told.
    assert_eq!(publisher.ports.list(), []);
    listen::tcp(address).unwrap();
}

#[tokio::test]
async fn datagrams_are_published_too() {
    let (_folder, publisher) = publisher();
    let address = free(Transport::Udp);
    let (proxy, reply) = ask(&publisher, &publish(Transport::Udp, address)).await;
    assert_eq!(reply, Reply::Published);
    let client = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    client.connect(address).await.unwrap();
    client.send(b"ahoy").await.unwrap();
    let mut buffer = [0; 8];
    assert_eq!(client.recv(&mut buffer).await.unwrap(), 4);
    assert_eq!(&buffer[..4], b"ahoy");
    drop(proxy);
}

#[tokio::test]
async fn a_port_that_is_taken_is_refused_with_the_reason() {
    let (_folder, publisher) = publisher();
    let program = listen::tcp((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
    let address = program.local_addr().unwrap();
    let (mut proxy, reply) = ask(&publisher, &publish(Transport::Tcp, address)).await;
    let Reply::Refused { reason } = reply else {
        panic!("refused");
    };
    assert!(reason.contains(&format!("{address}/tcp")), "{reason}");
    assert!(reason.contains("in use"), "{reason}");
    assert_eq!(proxy.read(&mut [0; 8]).await.unwrap(), 0);
    assert_eq!(publisher.ports.list(), []);
}

#[tokio::test]
async fn a_port_that_goes_on_with_a_snapshot_gets_another_where_it_is_taken() {
    let (_folder, publisher) = publisher();
    let address = free(Transport::Tcp);
    let mut publish = publish(Transport::Tcp, address);
    publish.again = true;
    let (proxy, reply) = ask(&publisher, &publish).await;
    assert_eq!(reply, Reply::Published);
    let listed = publisher.ports.list();
    assert_eq!((listed[0].host, listed[0].instead_of), (address, None));
    drop(proxy);
    let program = loop {
        match listen::tcp(address) {
            Ok(program) => break program,
            Err(_) => tokio::task::yield_now().await,
        }
    };
    let (_proxy, reply) = ask(&publisher, &publish).await;
    assert_eq!(reply, Reply::Published);
    let listed = publisher.ports.list();
    assert_eq!(listed[0].instead_of, Some(address));
    let mut client = TcpStream::connect(listed[0].host).await.unwrap();
    client.write_all(b"ahoy").await.unwrap();
    let mut answer = [0; 4];
    client.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"ahoy");
    drop(program);
}

#[tokio::test]
async fn the_next_proxy_of_a_port_waits_for_the_one_before_to_be_gone() {
    let (_folder, publisher) = publisher();
    let publish = publish(Transport::Tcp, free(Transport::Tcp));
    let (first, _) = ask(&publisher, &publish).await;
    let mut second = begin(&publisher, &encode_message(&publish).unwrap(), true).await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    drop(first);
    assert_eq!(reply(&mut second).await, Reply::Published);
    // One that stays has the port.
    let (_third, reply) = ask(&publisher, &publish).await;
    assert!(matches!(reply, Reply::Refused { .. }));
    assert_eq!(publisher.ports.list().len(), 1);
}

#[tokio::test]
async fn nonsense_ends_the_connection_and_too_many_ports_are_refused() {
    let (_folder, publisher) = publisher();
    let huge = [&1_000_000u32.to_be_bytes()[..], &[0; MAX_MESSAGE]].concat();
    for nonsense in [&b"\0\0\0\x02\0{}"[..], b"GET / HTTP/1.1\r\n\r\n", &huge] {
        let mut proxy = begin(&publisher, nonsense, true).await;
        // An end, or a reset for what was not read.
        assert!(!matches!(proxy.read(&mut [0; 8]).await, Ok(1..)));
    }
    let (_proxy, reply_to_none) = ask(&publisher, &publish(Transport::Tcp, ([127, 0, 0, 1], 0).into())).await;
    assert!(matches!(reply_to_none, Reply::Refused { .. }));
    let publish = publish(Transport::Tcp, free(Transport::Tcp));
    let mut proxy = begin(&publisher, &encode_message(&publish).unwrap(), false).await;
    let Reply::Refused { reason } = reply(&mut proxy).await else {
        panic!("refused");
    };
    assert!(reason.contains("1024 published ports"), "{reason}");
}

#[tokio::test]
async fn the_monitor_s_end_ends_the_service() {
    let (_folder, publisher) = publisher();
    let (ours, monitor) = rustix::net::socketpair(
        rustix::net::AddressFamily::UNIX,
        rustix::net::SocketType::SEQPACKET,
        rustix::net::SocketFlags::CLOEXEC,
        None,
    )
    .unwrap();
    let serving = tokio::spawn(serve(Connections::new(ours).unwrap(), publisher));
    drop::<OwnedFd>(monitor);
    serving.await.unwrap();
}

/// Makes the VM of `publisher` idle, and shuts its door.
async fn close(publisher: &Publisher) {
    for clock_us in [0, 10_000_000] {
        let cpu_us = 0;
        publisher.usage.containers(ContainersLoad { cpu_us, clock_us });
    }
    while !publisher.usage.close_if_idle(true, Duration::ZERO) {
        tokio::task::yield_now().await;
    }
    assert!(publisher.usage.all_kept().await);
}

async fn echoes(mut client: TcpStream) {
    client.shutdown().await.unwrap();
    let mut answer = String::new();
    client.read_to_string(&mut answer).await.unwrap();
    assert_eq!(answer, "ahoy");
}

#[tokio::test]
async fn clients_wait_while_the_vm_is_suspended_and_are_served_when_it_goes_on() {
    let (_folder, publisher) = publisher();
    let addresses = [Transport::Tcp, Transport::Udp].map(|transport| publish(transport, free(transport)));
    let (tcp, udp) = (addresses[0].host, addresses[1].host);
    let mut proxies = vec![];
    for publish in &addresses {
        proxies.push(ask(&publisher, publish).await.0);
    }
    echoes({
        let mut client = TcpStream::connect(tcp).await.unwrap();
        client.write_all(b"ahoy").await.unwrap();
        client
    })
    .await;
    close(&publisher).await;
    assert!(!publisher.ports.is_wanted());
    // Somebody comes before it is suspended, and it is not.
    let mut client = TcpStream::connect(tcp).await.unwrap();
    client.write_all(b"ahoy").await.unwrap();
    assert!(publisher.ports.is_wanted());
    publisher.usage.open();
    echoes(client).await;

    close(&publisher).await;
    publisher.usage.closed();
    // The guest's connections end.
    drop(proxies);
    publisher.ports.until_given_up().await;
    assert_eq!(publisher.ports.list().len(), 2);
    assert!(listen::tcp(tcp).is_err());
    let mut client = TcpStream::connect(tcp).await.unwrap();
    client.write_all(b"ahoy").await.unwrap();
    publisher.ports.wanted().await.unwrap();
    let sender = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    sender.send_to(b"ahoy", udp).await.unwrap();
    publisher.usage.open();
    let mut proxies = vec![];
    for mut publish in addresses {
        publish.again = true;
        let (proxy, reply) = ask(&publisher, &publish).await;
        assert_eq!(reply, Reply::Published);
        proxies.push(proxy);
    }
    echoes(client).await;
    let mut buffer = [0; 8];
    assert_eq!(sender.recv(&mut buffer).await.unwrap(), 4);
    let hosts: Vec<_> = publisher.ports.list().into_iter().map(|port| port.host).collect();
    assert!(hosts.contains(&tcp) && hosts.contains(&udp), "{hosts:?}");
}

#[tokio::test]
async fn a_port_that_is_given_up_while_its_vm_is_about_to_be_suspended_is_free() {
    let (_folder, publisher) = publisher();
    let publish = publish(Transport::Tcp, free(Transport::Tcp));
    let (proxy, _) = ask(&publisher, &publish).await;
    close(&publisher).await;
    drop(proxy);
    publisher.ports.until_given_up().await;
    assert_eq!(publisher.ports.list(), []);
    listen::tcp(publish.host).unwrap();
}
