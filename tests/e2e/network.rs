//! The guest's and its containers' way to the network.

use super::Test;
use super::world::{Docker, Home, Ran, Running, shared, until, with_shared_home, write_program};
use rustix::process::{Pid, Signal, kill_process};
use std::io::{Read, Write};
use std::net::{IpAddr, TcpListener, TcpStream, UdpSocket};

pub const TESTS: &[Test] = &[
    ("a_container_fetches_from_the_host_s_network", fetch),
    ("a_passt_that_dies_is_followed_by_another", killed),
    (
        "a_host_without_a_way_out_says_so_and_a_way_that_comes_is_taken",
        no_route,
    ),
];

/// The address by which this host is known to others.
pub fn own_address() -> IpAddr {
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

/// Reads everything that one client at `address` sends, on a port of its own that is returned.
pub fn receive_all_once(address: &str) -> (u16, std::thread::JoinHandle<Vec<u8>>) {
    let listener = TcpListener::bind((address, 0)).expect("listen");
    let port = listener.local_addr().expect("an address").port();
    let receiving = std::thread::spawn(move || {
        let (mut client, _) = listener.accept().expect("accept");
        let mut received = vec![];
        client.read_to_end(&mut received).expect("read to the end");
        received
    });
    (port, receiving)
}

/// Runs `script` in a container on the engine's `network`; returns what it said.
pub fn run_on(docker: &Docker, network: &str, script: &str) -> String {
    docker.ok(&["run", "--rm", "--network", network, "busybox", "sh", "-c", script])
}

/// Has a container on the engine's `network` download `length` bytes, that are served at `address`, from `host`.
pub fn download(docker: &Docker, network: &str, address: &str, host: &str, length: usize) {
    let body: Vec<u8> = (0..length).map(|at| (at % 251) as u8).collect();
    let url = format!("http://{host}:{}/", serve_once(address, body));
    let script = format!(
        "wget -q -O /tmp/got {url} && wc -c < /tmp/got && tail -c 3 /tmp/got | hexdump -e '3/1 \"%d \"'"
    );
    let said = run_on(docker, network, &script);
    let end: Vec<String> = (length - 3..length).map(|at| (at % 251).to_string()).collect();
    assert_eq!(
        said.split_whitespace().collect::<Vec<_>>(),
        [vec![length.to_string()], end].concat()
    );
}

fn fetch() {
    let docker = shared();
    let host = own_address().to_string();
    download(&docker, "bridge", "0.0.0.0", &host, 5_000_000);
    let resolver = docker.ok(&["run", "--rm", "busybox", "cat", "/etc/resolv.conf"]);
    assert!(resolver.contains("nameserver 192.168.127.3"), "{resolver}");
    with_shared_home(|home| assert_reaches_host(home, "shared"));
}

/// The guest of VM `name` reaches a service of the host's.
pub fn assert_reaches_host(home: &Home, name: &str) {
    let url = format!(
        "http://{}:{}/",
        own_address(),
        serve_once("0.0.0.0", b"ahoy".into())
    );
    let got = home.run(&["exec", name, "--", "wget", "-q", "-O", "-", &url]);
    assert_eq!(got.ok(), "ahoy");
}

/// passt puts itself into a cage of its own: no capability, a list of system calls, and nothing in its root.
fn assert_caged(passt: Pid) {
    let folder = format!("/proc/{}", passt.as_raw_nonzero());
    let status = std::fs::read_to_string(format!("{folder}/status")).expect("its status");
    for line in [
        "CapEff:\t0000000000000000",
        "CapPrm:\t0000000000000000",
        "NoNewPrivs:\t1",
        "Seccomp:\t2",
    ] {
        assert!(
            status.lines().any(|other| other == line),
            "{line} is missing: {status}"
        );
    }
    let root = std::fs::read_dir(format!("{folder}/root")).expect("its root");
    assert_eq!(root.count(), 0);
}

/// The passt of the supervisor `supervisor`.
pub fn passt_of(supervisor: Pid) -> Option<Pid> {
    std::fs::read_dir("/proc")
        .expect("/proc")
        .flatten()
        .find_map(|process| {
            let stat = std::fs::read_to_string(process.path().join("stat")).ok()?;
            // PID (NAME) STATE PARENT …
            let (begin, rest) = stat.rsplit_once(") ")?;
            let (pid, name) = begin.split_once(" (")?;
            let parent: i32 = rest.split(' ').nth(1)?.parse().ok()?;
            let is_it = name.starts_with("passt") && parent == supervisor.as_raw_nonzero().get();
            Pid::from_raw(pid.parse().ok()?).filter(|_| is_it)
        })
}

fn killed() {
    let docker = shared();
    with_shared_home(|home| {
        let supervisor = home.pid("shared", "supervisor_pid");
        let first = passt_of(supervisor).expect("a passt");
        assert_caged(first);
        kill_process(first, Signal::KILL).expect("kill passt");
        until("another passt", || {
            passt_of(supervisor).filter(|other| *other != first)
        });
        let url = format!(
            "http://{}:{}/",
            own_address(),
            serve_once("0.0.0.0", b"ahoy".into())
        );
        // The link may be a moment behind.
        let fetch = format!("until wget -q -T 60 -O - {url}; do sleep 0.1; done");
        assert_eq!(docker.ok(&["run", "--rm", "busybox", "sh", "-c", &fetch]), "ahoy");
        until("the end of the trouble", || {
            home.status("shared")["running"]["trouble"]
                .is_null()
                .then_some(())
        });
    });
}

/// Runs `script` in the network of process `of`.
fn in_network_of(of: Pid, script: &str) -> Ran {
    let mut command = std::process::Command::new("nsenter");
    let of = of.as_raw_nonzero().to_string();
    command.args(["--net", "--target", &of, "sh", "-e", "-c", script]);
    command.env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin");
    Running::start(&mut command, b"").wait()
}

/// A command in a network of its own, which has no route at all.
fn in_new_network(command: &mut std::process::Command) -> std::process::Command {
    let mut outer = std::process::Command::new("unshare");
    outer.args([
        "--net",
        "--",
        "sh",
        "-c",
        "ip link set lo up && exec \"$0\" \"$@\"",
    ]);
    outer.arg(command.get_program()).args(command.get_args());
    outer
}

fn no_route() {
    let home = Home::new();
    // A passt that ends at once when it is told to.
    let broken = home.path().join("broken");
    let programs = home.path().join("bin");
    std::fs::create_dir(&programs).expect("make a folder");
    let real = "PATH=${PATH#*:}; exec passt \"$@\"";
    let script = format!(
        "#!/bin/sh\n[ ! -e {0} ] || {{ echo broken >&2; exit 1; }}\n{real}\n",
        broken.display()
    );
    write_program(&programs.join("passt"), script);
    let path = format!("{}:{}", programs.display(), std::env::var("PATH").expect("PATH"));

    let mut command =
        in_new_network(&mut home.lighter(&["start", "-c", "1", "-m", "1g", "-d", "4g", "alone"]));
    command.env("LIGHTER_HOME", home.path()).env("PATH", path);
    let started = Running::start(&mut command, b"").wait();
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
    let supervisor = home.pid("alone", "supervisor_pid");
    let fetched = in_network_of(supervisor, "busybox wget -q -O - http://127.0.0.1:7500/");
    assert_eq!(fetched.ok(), "published");

    // The rest of the world is another network, with two cables to this one.
    let page = home.path().join("index.html");
    std::fs::write(page, "far away").expect("write");
    let mut world = std::process::Command::new("busybox");
    let folder = home.path().to_string_lossy().into_owned();
    world.args(["httpd", "-f", "-p", "[::]:80", "-h", &folder]);
    let world_server = Running::start(&mut in_new_network(&mut world), b"");
    let world = until("the other network", || {
        world_is_there(world_server.pid(), supervisor)
    });
    let plug = |number: u32| {
        let process = world.as_raw_nonzero();
        let script = format!(
            "ip link add lt{number} type veth peer name lt{number} netns {process}
             ip address add 198.18.{number}.1/24 dev lt{number}
             ip address add fd18:{number}::1/64 dev lt{number} nodad
             ip link set lt{number} up"
        );
        in_network_of(supervisor, &script).ok();
        let script = format!(
            "ip address add 198.18.{number}.254/24 dev lt{number}
             ip address add fd18:{number}::fe/64 dev lt{number} nodad
             ip link set lt{number} up
             ip address replace 198.18.99.1/32 dev lo
             ip address replace fd18:99::1/128 dev lo nodad"
        );
        in_network_of(world, &script).ok();
        let route = format!("ip route replace default via 198.18.{number}.254");
        in_network_of(supervisor, &route).ok();
    };
    let fetch = |network: &str, host: &str| {
        let script = format!("until wget -q -T 20 -O - http://{host}/; do sleep 0.5; done");
        let said = run_on(&docker, network, &script);
        assert_eq!(said, "far away");
    };
    let no_trouble = || {
        until("the end of the trouble", || {
            home.status("alone")["running"]["trouble"].is_null().then_some(())
        });
    };
    plug(61);
    fetch("bridge", "198.18.99.1");
    no_trouble();
    let first = passt_of(supervisor).expect("a passt");
    // Another cable: what is new goes that way.
    plug(62);
    in_network_of(supervisor, "ip link del lt61").ok();
    fetch("bridge", "198.18.99.1");
    assert_eq!(passt_of(supervisor), Some(first));
    // The other family has a way out, too.
    in_network_of(supervisor, "ip -6 route add default via fd18:62::fe").ok();
    fetch("host", "[fd18:99::1]");
    no_trouble();

    std::fs::write(&broken, "").expect("write");
    let last = passt_of(supervisor).expect("a passt");
    kill_process(last, Signal::KILL).expect("kill passt");
    let reason = until("trouble with passt", || {
        let status = home.status("alone");
        let reason = status["running"]["trouble"]["reason"].as_str()?;
        reason.contains("in a row").then(|| reason.to_owned())
    });
    assert!(
        reason.contains("broken") && reason.contains("until it is started anew"),
        "{reason}"
    );
    let carrier = home.run(&["exec", "alone", "--", "cat", "/sys/class/net/eth0/carrier"]);
    assert_eq!(carrier.ok(), "0");
    assert_eq!(docker.ok(&["run", "--rm", "busybox", "echo", "ahoy"]), "ahoy");
    drop(world_server);
    home.run(&["rm", "--force", "alone"]).ok();
}

/// Process `world`, when it is in a network of its own.
fn world_is_there(world: Pid, supervisor: Pid) -> Option<Pid> {
    let network = |of: Pid| std::fs::read_link(format!("/proc/{}/ns/net", of.as_raw_nonzero())).ok();
    let own = std::fs::read_link("/proc/self/ns/net").ok();
    let there = network(world)?;
    (Some(&there) != own.as_ref() && Some(&there) != network(supervisor).as_ref()).then_some(world)
}
