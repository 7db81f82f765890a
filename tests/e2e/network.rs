//! The guest's and its containers' way to the network.

use super::Test;
use super::world::{Home, shared, with_shared_home};
use std::io::{Read, Write};
use std::net::{IpAddr, TcpListener, TcpStream, UdpSocket};

pub const TESTS: &[Test] = &[
    ("a_container_fetches_from_the_host_s_network", fetch),
    ("a_host_without_a_way_out_says_so_and_the_engine_works", no_route),
];

/// The address by which this host is known to others.
fn own_address() -> IpAddr {
    let socket = UdpSocket::bind("0.0.0.0:0").expect("a socket");
    // Nothing is sent; this chooses the route.
    socket.connect("192.0.2.1:9").expect("a route");
    socket.local_addr().expect("an address").ip()
}

/// Reads the head of an HTTP request, and nothing of what follows.
pub fn read_head(client: &mut TcpStream) -> std::io::Result<String> {
    let mut head = vec![];
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        client.read_exact(&mut byte)?;
        head.push(byte[0]);
    }
    Ok(String::from_utf8_lossy(&head).into_owned())
}

/// Serves `body` once over HTTP at `address`, on a port of its own that is returned.
pub fn serve_once(address: &str, body: Vec<u8>) -> u16 {
    let listener = TcpListener::bind((address, 0)).expect("listen");
    let port = listener.local_addr().expect("an address").port();
    std::thread::spawn(move || {
        let (mut client, _) = listener.accept().expect("accept");
        read_head(&mut client).expect("read the request");
        let head = format!("HTTP/1.0 200 OK\r\nContent-Length: {}\r\n\r\n", body.len());
        client.write_all(head.as_bytes()).expect("write the head");
        client.write_all(&body).expect("write the body");
    });
    port
}

fn fetch() {
    const BYTES: usize = 5_000_000;
    let docker = shared();
    let body: Vec<u8> = (0..BYTES).map(|at| (at % 251) as u8).collect();
    let url = format!("http://{}:{}/", own_address(), serve_once("0.0.0.0", body));
    let script = format!(
        "wget -q -O /tmp/got {url} && wc -c < /tmp/got && tail -c 3 /tmp/got | hexdump -e '3/1 \"%d \"'"
    );
    let said = docker.ok(&["run", "--rm", "busybox", "sh", "-c", &script]);
    let end: Vec<String> = (BYTES - 3..BYTES).map(|at| (at % 251).to_string()).collect();
    assert_eq!(
        said.split_whitespace().collect::<Vec<_>>(),
        [vec![BYTES.to_string()], end].concat()
    );
    let resolver = docker.ok(&["run", "--rm", "busybox", "cat", "/etc/resolv.conf"]);
    assert!(resolver.contains("nameserver 192.168.127.3"), "{resolver}");
    with_shared_home(|home| {
        let url = format!(
            "http://{}:{}/",
            own_address(),
            serve_once("0.0.0.0", b"ahoy".into())
        );
        let got = home.run(&["exec", "shared", "--", "wget", "-q", "-O", "-", &url]);
        assert_eq!(got.ok(), "ahoy");
    });
}

fn no_route() {
    let home = Home::new();
    // A network namespace of its own has no route at all.
    let mut command = std::process::Command::new("unshare");
    command.args([
        "--net",
        "--",
        "sh",
        "-c",
        "ip link set lo up && exec \"$0\" \"$@\"",
    ]);
    command.arg(home.lighter(&[]).get_program());
    command.args(["start", "-c", "1", "-m", "1g", "-d", "4g", "alone"]);
    command.env("LIGHTER_HOME", home.path());
    let started = super::world::Running::start(&mut command, b"").wait();
    assert!(started.stderr.contains("no default route"), "{started:?}");
    started.ok();
    let docker = home.docker("alone");
    docker.import("busybox");
    assert_eq!(docker.ok(&["run", "--rm", "busybox", "echo", "ahoy"]), "ahoy");
    // Published ports need none of that.
    let serve = "echo published > /tmp/index.html; httpd -h /tmp; echo listening; sleep 100000";
    let arguments = [
        "run", "-d", "--name", "web", "-p", "7500:80", "busybox", "sh", "-c", serve,
    ];
    docker.ok(&arguments);
    docker.wait_for_log("web", "listening");
    let supervisor = home.pid("alone", "supervisor_pid").as_raw_nonzero().to_string();
    let mut fetch = std::process::Command::new("nsenter");
    fetch.args([
        "--net",
        "--target",
        &supervisor,
        "busybox",
        "wget",
        "-q",
        "-O",
        "-",
    ]);
    fetch.arg("http://127.0.0.1:7500/");
    let fetched = super::world::Running::start(&mut fetch, b"").wait();
    assert_eq!(fetched.ok(), "published");
    home.run(&["rm", "--force", "alone"]).ok();
}
