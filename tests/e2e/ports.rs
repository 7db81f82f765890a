//! Published ports, by real containers and clients of the host. All tests share one VM of their own, which the last one
//! stops, starts and kills.
//!
//! The long form transfers 1 GiB each way and tries 50 conflicts.

use super::Test;
use super::world::{Docker, Home, PATIENCE, Ran, is_long, shared, until};
use lighter_tests::pattern::Pattern;
use rustix::process::{Signal, kill_process};
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

pub const TESTS: &[Test] = &[
    ("every_kind_of_port_leads_to_its_container", every_kind),
    ("two_hundred_clients_at_once_are_served", crowd),
    ("a_direction_ends_alone_and_a_slow_reader_is_alone", slow_reader),
    ("large_transfers_arrive_whole", transfers),
    ("a_port_that_is_taken_fails_with_the_reason", conflicts),
    ("random_ports_are_never_given_twice", random),
    ("ports_come_back_with_their_engine", comebacks),
];

const VM: &str = "ports";
const LOCALHOST: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const LOCALHOST6: IpAddr = IpAddr::V6(Ipv6Addr::LOCALHOST);
static HOME: Mutex<Option<Home>> = Mutex::new(None);

/// Runs `act` with the VM and the container `quay`, whose ports 7, 9 and 19 are published as 7007, 7009 and 7019; both
/// are made by the first who asks.
fn with_quay(act: impl FnOnce(&Home, &Docker)) {
    let mut slot = HOME.lock().unwrap_or_else(PoisonError::into_inner);
    let home = slot.get_or_insert_with(|| {
        let home = Home::new();
        home.boot(VM);
        let docker = home.docker(VM);
        docker.import("ports");
        let ports = ["7007:7", "7007:7/udp", "7009:9", "7019:19"];
        serve(&docker, "quay", &ports, &["--restart", "always"]).ok();
        docker.wait_for_log("quay", "listening");
        home
    });
    act(home, &home.docker(VM));
}

/// Runs port-server in a container with published `ports`.
pub fn serve(docker: &Docker, name: &str, ports: &[&str], options: &[&str]) -> Ran {
    let mut arguments = vec!["run", "-d", "--name", name];
    arguments.extend(options);
    for port in ports {
        arguments.extend(["-p", port]);
    }
    arguments.extend(["ports", "port-server"]);
    docker.run(&arguments)
}

/// Publishes a port below 1024 from the engine of an ordinary user, where the host lets only root do that and where it does not.
pub fn low_ports(docker: &Docker) {
    const SETTING: &str = "/proc/sys/net/ipv4/ip_unprivileged_port_start";
    /// Puts the host's setting back.
    struct Before(String);
    impl Drop for Before {
        fn drop(&mut self) {
            std::fs::write(SETTING, &self.0).expect("put the setting back");
        }
    }
    let _before = Before(std::fs::read_to_string(SETTING).expect("the setting"));
    let publish = || {
        let serve = "echo low > /tmp/index.html; httpd -h /tmp; echo listening; sleep 100000";
        docker.run(&[
            "run", "-d", "--name", "low", "-p", "81:80", "busybox", "sh", "-c", serve,
        ])
    };
    std::fs::write(SETTING, "1024").expect("set");
    let message = publish().fails_with(125);
    assert!(
        message.contains("ports below 1024 are root's")
            && message.contains("sudo sysctl net.ipv4.ip_unprivileged_port_start=81"),
        "{message}"
    );
    docker.ok(&["rm", "low"]);
    std::fs::write(SETTING, "81").expect("set");
    publish().ok();
    docker.wait_for_log("low", "listening");
    let mut client = connect(LOCALHOST, 81);
    client.write_all(b"GET / HTTP/1.0\r\n\r\n").expect("ask");
    let mut answer = String::new();
    client.read_to_string(&mut answer).expect("read");
    assert!(answer.ends_with("low\n"), "{answer}");
    docker.ok(&["rm", "--force", "low"]);
}

/// The address by which this host is known to others.
fn own_address() -> IpAddr {
    let socket = UdpSocket::bind("0.0.0.0:0").expect("a socket");
    // Nothing is sent; this chooses the route.
    socket.connect("192.0.2.1:9").expect("a route");
    socket.local_addr().expect("an address").ip()
}

#[track_caller]
fn connect(ip: IpAddr, port: u16) -> TcpStream {
    let stream = TcpStream::connect((ip, port)).unwrap_or_else(|error| panic!("{ip} port {port}: {error}"));
    stream.set_read_timeout(Some(PATIENCE)).expect("a time-out");
    stream
}

/// Says something, ends that direction, and reads what comes back.
#[track_caller]
fn ask(ip: IpAddr, port: u16, text: &str) -> Vec<u8> {
    let mut stream = connect(ip, port);
    stream.write_all(text.as_bytes()).expect("write");
    stream.shutdown(Shutdown::Write).expect("end a direction");
    let mut answer = vec![];
    stream.read_to_end(&mut answer).expect("read");
    answer
}

#[track_caller]
fn assert_echoes(ip: IpAddr, port: u16) {
    assert_eq!(ask(ip, port, "ahoy"), b"ahoy", "{ip} port {port}");
}

#[track_caller]
fn assert_refused(ip: IpAddr, port: u16) {
    let error = TcpStream::connect((ip, port)).expect_err("nobody listens");
    assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{ip} port {port}");
}

#[track_caller]
fn assert_echoes_datagrams(ip: IpAddr, port: u16) {
    let any: SocketAddr = match ip {
        IpAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        IpAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let socket = UdpSocket::bind(any).expect("a socket");
    socket.connect((ip, port)).expect("connect");
    socket.set_read_timeout(Some(PATIENCE)).expect("a time-out");
    for payload in [vec![], b"ahoy".to_vec(), vec![7; 20_000]] {
        socket.send(&payload).expect("send");
        let mut buffer = vec![0; 65_536];
        let length = socket.recv(&mut buffer).expect("an answer");
        assert!(buffer[..length] == payload, "{ip} port {port}: {length} bytes");
    }
}

/// What `lighter ports` lists, as `HOST CONTAINER-PORT/PROTOCOL`.
fn listed(home: &Home) -> Vec<String> {
    let ports = home.run(&["ports", "--json", VM]).ok();
    let ports: serde_json::Value = serde_json::from_str(&ports).expect("JSON");
    let text = |value: &serde_json::Value| value.as_str().expect("text").to_owned();
    let line = |port: &serde_json::Value| {
        let container = text(&port["container"]);
        let (_, container_port) = container.rsplit_once(':').expect("a port");
        format!(
            "{} {container_port}/{}",
            text(&port["host"]),
            text(&port["transport"])
        )
    };
    ports.as_array().expect("a list").iter().map(line).collect()
}

/// The port of the host that docker says is `port` of `container`.
fn port_of(docker: &Docker, container: &str, port: &str) -> u16 {
    let addresses = docker.ok(&["port", container, port]);
    let first = addresses.lines().next().expect("an address");
    let (_, port) = first.rsplit_once(':').expect("a port");
    port.parse().expect("a number")
}

fn every_kind() {
    with_quay(|home, docker| {
        let own = own_address();
        for ip in [LOCALHOST, own, LOCALHOST6] {
            assert_echoes(ip, 7007);
        }
        for ip in [LOCALHOST, LOCALHOST6] {
            assert_echoes_datagrams(ip, 7007);
        }
        let one_address = format!("{own}:7207:7");
        let ports = ["127.0.0.2:7107:7", &one_address, "[::1]:7107:7", "7306-7309:6-9"];
        serve(docker, "pier", &ports, &[]).ok();
        docker.wait_for_log("pier", "listening");
        for ip in [IpAddr::from([127, 0, 0, 2]), LOCALHOST6] {
            assert_echoes(ip, 7107);
        }
        assert_refused(LOCALHOST, 7107);
        assert_echoes(own, 7207);
        assert_refused(LOCALHOST, 7207);
        assert_echoes(LOCALHOST, 7307);
        assert_eq!(ask(LOCALHOST6, 7309, ""), b"0 true");
        let listed = listed(home);
        for line in [
            "0.0.0.0:7007 7/tcp",
            "[::]:7007 7/udp",
            "127.0.0.2:7107 7/tcp",
            "0.0.0.0:7306 6/tcp",
        ] {
            assert!(listed.iter().any(|port| port == line), "{line} in {listed:?}");
        }
        let text = home.run(&["ports", VM]).ok();
        assert!(text.starts_with("HOST"), "{text}");
        assert!(home.run(&["status", VM]).ok().contains("lighter ports ports"));
        // As on any Docker host: from the container itself by its gateway, and in the VM.
        let script = "echo ahoy | nc $(ip route | sed -n 's/default via \\([^ ]*\\).*/\\1/p') 7007";
        assert_eq!(docker.ok(&["exec", "quay", "sh", "-c", script]), "ahoy");
        let script = "echo ahoy | nc 127.0.0.1 7007";
        assert_eq!(home.run(&["exec", VM, "--", "sh", "-c", script]).ok(), "ahoy");
        docker.ok(&["rm", "-f", "pier"]);
        // From the moment that the command has ended.
        for address in ["0.0.0.0:7307", "[::]:7307", "127.0.0.2:7107"] {
            TcpListener::bind(address).unwrap_or_else(|error| panic!("{address}: {error}"));
        }
    });
}

fn crowd() {
    with_quay(|_, _| {
        let mut clients: Vec<_> = (0..200).map(|_| connect(LOCALHOST, 7007)).collect();
        for (number, client) in clients.iter_mut().enumerate() {
            writeln!(client, "client {number}").expect("write");
        }
        // All are open until each has its answer.
        for (number, client) in clients.iter_mut().enumerate().rev() {
            let expected = format!("client {number}\n");
            let mut answer = vec![0; expected.len()];
            client.read_exact(&mut answer).expect("an answer");
            assert_eq!(answer, expected.as_bytes());
        }
    });
}

fn slow_reader() {
    with_quay(|_, _| {
        // The container ends its direction first, and still gets all of the client's.
        let mut stream = connect(LOCALHOST, 7019);
        stream.write_all(b"4\n").expect("write");
        let mut got = vec![];
        stream.read_to_end(&mut got).expect("read to the end");
        assert_eq!(got, Pattern::new().next(4));
        // One that asks for much and reads nothing fills every buffer on the way.
        let mut slow = connect(LOCALHOST, 7019);
        slow.write_all(b"64000000\n").expect("write");
        slow.peek(&mut [0]).expect("a first byte");
        thread::sleep(Duration::from_secs(2));
        for _ in 0..3 {
            assert_echoes(LOCALHOST, 7007);
            assert_eq!(ask(LOCALHOST, 7019, "4\n"), Pattern::new().next(4));
        }
        // And has lost nothing.
        let mut pattern = Pattern::new();
        let mut buffer = vec![0; 1 << 20];
        slow.read_exact(&mut buffer).expect("read");
        assert!(pattern.goes_on_with(&buffer));
    });
}

fn transfers() {
    let bytes = if is_long() { 1 << 30 } else { 32 << 20 };
    with_quay(|_, _| {
        let began = Instant::now();
        send(7009, bytes);
        report("to the container", bytes, began);
        let began = Instant::now();
        receive(7019, bytes);
        report("from the container", bytes, began);
    });
}

/// Sends so many bytes to the container, which finds them to be right.
pub fn send(port: u16, bytes: usize) {
    let mut stream = connect(LOCALHOST, port);
    let (mut pattern, mut left) = (Pattern::new(), bytes);
    while left > 0 {
        let piece = pattern.next(left);
        stream.write_all(piece).expect("write");
        left -= piece.len();
    }
    stream.shutdown(Shutdown::Write).expect("end a direction");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("read");
    assert_eq!(answer, format!("{bytes} true"));
}

/// Has the container send so many bytes, which are right.
pub fn receive(port: u16, bytes: usize) {
    let mut stream = connect(LOCALHOST, port);
    writeln!(stream, "{bytes}").expect("write");
    let (mut pattern, mut got) = (Pattern::new(), 0);
    let mut buffer = vec![0; 1 << 20];
    loop {
        let length = stream.read(&mut buffer).expect("read");
        if length == 0 {
            break;
        }
        assert!(pattern.goes_on_with(&buffer[..length]), "after {got} bytes");
        got += length;
    }
    assert_eq!(got, bytes);
}

fn report(way: &str, bytes: usize, began: Instant) {
    let seconds = began.elapsed().as_secs_f64();
    let mib = (bytes >> 20) as f64;
    eprintln!("{mib} MiB {way}: {seconds:.1} s, {:.1} MiB/s", mib / seconds);
}

/// Starts `container` by the API, and returns the answer: the command line would take its time, again and again.
fn start_by_api(home: &Home, container: &str) -> String {
    let socket = home.status(VM)["docker_socket"]
        .as_str()
        .expect("a path")
        .to_owned();
    let mut stream = std::os::unix::net::UnixStream::connect(socket).expect("connect");
    let request = format!(
        "POST /v1.43/containers/{container}/start HTTP/1.1\r\nHost: d\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).expect("write");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("read");
    answer
}

/// Proxies and NAT rules in the guest that have to do with `port`.
fn traces(home: &Home, port: &str) -> String {
    let script = format!(
        "ps -eo args | grep '^/usr/bin/docker-proxy' | grep -w {port}; iptables-save -t nat | grep -w {port}; true"
    );
    home.run(&["exec", VM, "--", "sh", "-c", &script]).ok()
}

fn conflicts() {
    with_quay(|home, docker| {
        let program = TcpListener::bind("0.0.0.0:7400").expect("listen");
        let before = listed(home);
        let message = serve(docker, "wreck", &["7400:7"], &[]).fails_with(125);
        for part in [
            "cannot publish 0.0.0.0:7400/tcp on the host",
            "in use",
            "ss -tlnp",
        ] {
            assert!(message.contains(part), "{part:?} in {message}");
        }
        for _ in 1..if is_long() { 50 } else { 4 } {
            let answer = start_by_api(home, "wreck");
            assert!(answer.starts_with("HTTP/1.1 500"), "{answer}");
            assert!(answer.contains("cannot publish 0.0.0.0:7400/tcp"), "{answer}");
        }
        assert_eq!(listed(home), before);
        assert_eq!(traces(home, "7400"), "");
        drop(program);
        docker.ok(&["start", "wreck"]);
        docker.wait_for_log("wreck", "listening");
        assert_echoes(LOCALHOST, 7400);
        // Another engine is told the same, and has the port when it is free.
        let other = shared();
        let arguments = ["run", "-d", "--name", "wreck2", "-p", "7400:80", "busybox"];
        let serve = ["sh", "-c", "echo other > /tmp/index.html; exec httpd -f -h /tmp"];
        let message = other.run(&[&arguments[..], &serve].concat()).fails_with(125);
        assert!(message.contains("cannot publish 0.0.0.0:7400/tcp"), "{message}");
        assert_echoes(LOCALHOST, 7400);
        docker.ok(&["rm", "-f", "wreck"]);
        other.ok(&["start", "wreck2"]);
        let answer = until("answer of the other engine", || {
            Some(ask(LOCALHOST, 7400, "GET / HTTP/1.0\r\n\r\n")).filter(|answer| !answer.is_empty())
        });
        assert!(
            answer.ends_with(b"other\n"),
            "{}",
            String::from_utf8_lossy(&answer)
        );
        other.ok(&["rm", "-f", "wreck2"]);
        let nowhere = ["192.0.2.77:7400:7"];
        let message = self::serve(docker, "nowhere", &nowhere, &[]).fails_with(125);
        assert!(
            message.contains("192.0.2.77 is no address of this host"),
            "{message}"
        );
        docker.ok(&["rm", "-f", "nowhere"]);
    });
}

fn random() {
    with_quay(|_, docker| {
        let other = shared();
        serve(docker, "random", &["7", "7/udp", "9"], &[]).ok();
        other.ok(&[
            "run", "-d", "--name", "random", "-p", "7", "-p", "9", "busybox", "sleep", "100000",
        ]);
        docker.wait_for_log("random", "listening");
        let echo = port_of(docker, "random", "7/tcp");
        assert_echoes(LOCALHOST, echo);
        assert_echoes_datagrams(LOCALHOST, port_of(docker, "random", "7/udp"));
        let last = echo.max(port_of(docker, "random", "9/tcp"));
        for port in ["7/tcp", "9/tcp"] {
            let others = port_of(&other, "random", port);
            // Blocks are of 512 ports.
            assert!(others.abs_diff(last) > 256, "{others} and {last}");
        }
        // What a program of the host has by chance is passed over.
        let taken = [1, 2].map(|step| TcpListener::bind(("0.0.0.0", last + step)).expect("listen"));
        serve(docker, "passed", &["7"], &[]).ok();
        docker.wait_for_log("passed", "listening");
        let passed = port_of(docker, "passed", "7/tcp");
        assert!(passed > last + 2, "{passed} after {last}");
        assert_echoes(LOCALHOST, passed);
        drop(taken);
        docker.ok(&["rm", "-f", "random", "passed"]);
        other.ok(&["rm", "-f", "random"]);
    });
}

fn comebacks() {
    with_quay(|home, docker| {
        let back = |what: &str| {
            until(what, || {
                let mut stream = TcpStream::connect((LOCALHOST, 7007)).ok()?;
                stream.set_read_timeout(Some(PATIENCE)).ok()?;
                stream.write_all(b"ahoy").ok()?;
                stream.shutdown(Shutdown::Write).ok()?;
                let mut answer = String::new();
                stream.read_to_string(&mut answer).ok()?;
                (answer == "ahoy").then_some(())
            });
        };
        let proxies = listed(home);
        let before = home.status(VM)["running"]["engine_failures"].as_u64();
        home.run(&["exec", VM, "--", "sh", "-c", "kill -9 $(pidof dockerd)"])
            .ok();
        until("word of the failure", || {
            (home.status(VM)["running"]["engine_failures"].as_u64() > before).then_some(())
        });
        docker.ok(&["version"]);
        back("port after the engine's death");
        until("all ports", || (listed(home) == proxies).then_some(()));

        kill_process(home.pid(VM, "supervisor_pid"), Signal::KILL).expect("kill the supervisor");
        until("end of the port", || {
            TcpStream::connect((LOCALHOST, 7007)).is_err().then_some(())
        });
        home.run(&["start", VM]).ok();
        back("port after the supervisor's death");

        home.run(&["stop", VM]).ok();
        assert_refused(LOCALHOST, 7007);
        let settings = home.vm_file(VM, "vm.toml");
        let mut text = std::fs::read_to_string(&settings).expect("read the settings");
        text += "\n[ports]\ndefault-address = \"127.0.0.1\"\n";
        std::fs::write(&settings, text).expect("write the settings");
        home.run(&["start", VM]).ok();
        back("port after a stop");
        assert_refused(own_address(), 7007);
        until("the narrowed ports", || {
            let listed = listed(home);
            (listed.len() == proxies.len()).then(|| assert_narrow(&listed))
        });
    });
    let home = HOME.lock().unwrap_or_else(PoisonError::into_inner).take();
    home.expect("the VM").run(&["rm", "--force", VM]).ok();
}

fn assert_narrow(listed: &[String]) {
    let is_narrow = |line: &String| line.starts_with("127.0.0.1:") || line.starts_with("[::1]:");
    assert!(listed.iter().all(is_narrow), "{listed:?}");
}
