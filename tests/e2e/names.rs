//! Names, the host's own services, and what the engine gets of the host: proxies and certificates.

use super::Test;
use super::network::{read_head, serve_once};
use super::world::{Docker, Home, Running, client_file, shared, until, with_shared_home};
use std::fs;
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};

pub const TESTS: &[Test] = &[
    ("services_on_the_host_s_loopback_are_reached_by_name", host_access),
    (
        "names_follow_the_host_and_its_loopback_can_be_closed",
        names_follow_the_host,
    ),
    (
        "registries_are_reached_with_the_host_s_certificates_and_proxies",
        registries,
    ),
];

fn host_access() {
    let docker = shared();
    let fetch = |name: &str, options: &[&str]| {
        let url = format!("http://{name}:{}/", serve_once("127.0.0.1", b"ahoy".into()));
        let run = [
            &["run", "--rm"],
            options,
            &["busybox", "wget", "-q", "-O", "-", &url],
        ]
        .concat();
        assert_eq!(docker.ok(&run), "ahoy", "{name}");
    };
    fetch("host.docker.internal", &[]);
    fetch("gateway.docker.internal", &["--network", "host"]);
    // As compose files say it for engines that know no such name.
    fetch("the-host", &["--add-host", "the-host:host-gateway"]);
    // Docker's own name server passes on what it does not know.
    docker.ok(&["network", "create", "named"]);
    fetch("host.docker.internal", &["--network", "named"]);
    docker.ok(&["network", "rm", "named"]);
    let build = Running::start(
        &mut docker.command(&["build", "-q", "-"]),
        format!(
            "FROM busybox\nRUN wget -q -O - http://host.docker.internal:{}/ | grep ahoy\n",
            serve_once("127.0.0.1", b"ahoy".into())
        )
        .as_bytes(),
    );
    build.wait().ok();
    with_shared_home(|home| {
        let url = format!(
            "http://host.docker.internal:{}/",
            serve_once("127.0.0.1", b"ahoy".into())
        );
        let got = home.run(&["exec", "shared", "--", "wget", "-q", "-O", "-", &url]);
        assert_eq!(got.ok(), "ahoy");
    });
}

/// A name server on `address` to which every name has the address `answer`.
fn name_server(address: Ipv4Addr, answer: Ipv4Addr) {
    let socket = UdpSocket::bind((address, 53)).expect("port 53");
    std::thread::spawn(move || {
        let mut buffer = [0; 512];
        while let Ok((length, client)) = socket.recv_from(&mut buffer) {
            // Header and one question, without what came besides.
            let name = buffer[12..length].iter().position(|&byte| byte == 0);
            let end = 12 + name.expect("the end of the name") + 5;
            let is_a = buffer[end - 4..end - 2] == [0, 1];
            let mut message = buffer[..end].to_vec();
            message[2..4].copy_from_slice(&[0x81, 0x80]);
            message[6..12].copy_from_slice(&[0, u8::from(is_a), 0, 0, 0, 0]);
            if is_a {
                // The name of the question, type A, class IN, a second's life, four bytes.
                message.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 1, 0, 4]);
                message.extend(answer.octets());
            }
            // The asker may be gone.
            let _ = socket.send_to(&message, client);
        }
    });
}

/// What a container is told of `name`: the addresses in `getent`'s manner.
fn resolved(docker: &Docker, name: &str) -> String {
    let said = docker.run(&["run", "--rm", "busybox", "nslookup", "-type=a", name]);
    said.stdout.replace("192.168.127.3", "")
}

fn names_follow_the_host() {
    let home = Home::new();
    // The supervisor sees files of its own in the place of the host's.
    let hosts = home.path().join("hosts");
    let resolv = home.path().join("resolv.conf");
    fs::write(&hosts, "127.0.0.1 localhost\n192.0.2.1 first.test\n").expect("write hosts");
    fs::write(&resolv, "nameserver 127.0.0.71\n").expect("write resolv.conf");
    name_server(Ipv4Addr::new(127, 0, 0, 71), Ipv4Addr::new(192, 0, 2, 71));
    name_server(Ipv4Addr::new(127, 0, 0, 72), Ipv4Addr::new(192, 0, 2, 72));
    let script = format!(
        "mount --bind {} /etc/hosts && mount --bind {} /etc/resolv.conf && exec \"$@\"",
        hosts.display(),
        resolv.display()
    );
    let lighter = |arguments: &[&str]| {
        let mut command = Command::new("unshare");
        command.args(["--mount", "--", "sh", "-c", &script, "sh"]);
        Running::start(&mut home.lighter_by(command, arguments), b"")
            .wait()
            .ok()
    };
    lighter(&["start", "-c", "1", "-m", "1g", "-d", "4g", "named"]);
    let docker = home.docker("named");
    docker.import("busybox");
    assert!(resolved(&docker, "first.test").contains("192.0.2.1"));
    assert!(resolved(&docker, "other.test").contains("192.0.2.71"));
    fs::write(&hosts, "127.0.0.1 localhost\n192.0.2.2 first.test\n").expect("write hosts");
    assert!(resolved(&docker, "first.test").contains("192.0.2.2"));
    fs::write(&resolv, "nameserver 127.0.0.72\n").expect("write resolv.conf");
    assert!(resolved(&docker, "other.test").contains("192.0.2.72"));
    // Over TCP, and of a type that the name servers themselves are asked for.
    let text = docker.run(&["run", "--rm", "busybox", "nslookup", "-type=txt", "any.test"]);
    assert!(text.stdout.contains("192.168.127.3"), "{text:?}");

    home.run(&["stop", "named"]).ok();
    lighter(&["start", "--no-host-access", "named"]);
    let port = serve_once("127.0.0.1", b"secret".into());
    for host in ["host.docker.internal", "192.168.127.1"] {
        let url = format!("http://{host}:{port}/");
        let got = docker.run(&[
            "run", "--rm", "busybox", "wget", "-T", "20", "-q", "-O", "-", &url,
        ]);
        assert_ne!(got.code(), 0, "{got:?}");
        assert!(!got.stdout.contains("secret"), "{got:?}");
    }
    home.run(&["rm", "--force", "named"]).ok();
}

/// A registry of Debian's, on a port of the loopback interface.
pub struct Registry {
    pub port: u16,
    _process: Running,
}

impl Registry {
    /// Starts one in `folder`; `tls` are the files of its certificate and its key.
    pub fn start(folder: &Path, tls: Option<(&Path, &Path)>) -> Self {
        let port = TcpListener::bind("127.0.0.1:0")
            .and_then(|listener| listener.local_addr())
            .expect("a port")
            .port();
        fs::create_dir_all(folder).expect("make a folder");
        let mut config = format!(
            "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\nhttp:\n  addr: \
             127.0.0.1:{port}\n",
            folder.join("data").display()
        );
        if let Some((certificate, key)) = tls {
            config += &format!(
                "  tls: {{certificate: {}, key: {}}}\n",
                certificate.display(),
                key.display()
            );
        }
        let file = folder.join("config.yml");
        fs::write(&file, config).expect("write the configuration");
        let mut command = Command::new(client_file("docker-registry"));
        command.arg("serve").arg(&file);
        let process = Running::start(&mut command, b"");
        until("registry", || TcpStream::connect(("127.0.0.1", port)).ok());
        Self {
            port,
            _process: process,
        }
    }
}

/// An HTTP proxy that sends everything to `target`. Returns its port, and what it was asked for.
fn proxy(target: SocketAddr) -> (u16, Arc<Mutex<Vec<String>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("listen");
    let port = listener.local_addr().expect("an address").port();
    let asked = Arc::new(Mutex::new(vec![]));
    let log = asked.clone();
    let serve = move |mut client: TcpStream| -> std::io::Result<()> {
        let head = read_head(&mut client)?;
        log.lock()
            .expect("no panic")
            .push(head.lines().next().unwrap_or_default().to_owned());
        // `GET http://HOST/PATH HTTP/1.1` becomes `GET /PATH HTTP/1.1`, once for each connection.
        let (method, rest) = head.split_once(' ').expect("a request line");
        if method == "CONNECT" {
            return client
                .write_all(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
        }
        let rest = rest.strip_prefix("http://").expect("a URL");
        let path = rest.find('/').map_or("/", |at| &rest[at..]);
        let (line, headers) = path.split_once("\r\n").expect("headers");
        let mut server = TcpStream::connect(target)?;
        server.write_all(format!("{method} {line}\r\nConnection: close\r\n{headers}").as_bytes())?;
        std::io::copy(&mut server, &mut client)?;
        client.shutdown(std::net::Shutdown::Both)
    };
    std::thread::spawn(move || {
        for client in listener.incoming().flatten() {
            let serve = serve.clone();
            // The client may be gone, and says so itself.
            std::thread::spawn(move || drop(serve(client)));
        }
    });
    (port, asked)
}

fn registries() {
    let home = Home::new();
    let path = |name: &str| home.path().join(name);
    let names = ["host.docker.internal".to_owned()];
    let own = rcgen::generate_simple_self_signed(names).expect("a certificate");
    fs::write(path("certificate.pem"), own.cert.pem()).expect("write the certificate");
    fs::write(path("key.pem"), own.signing_key.serialize_pem()).expect("write the key");
    let trusted = Registry::start(
        &path("trusted"),
        Some((&path("certificate.pem"), &path("key.pem"))),
    );
    let plain = Registry::start(&path("plain"), None);
    let (proxy_port, asked) = proxy(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), plain.port));
    let insecure = "plain.test:5000";
    let mut start = home.lighter(&["start", "-c", "1", "-m", "1g", "-d", "4g"]);
    start.args(["--insecure-registry", insecure, "pulling"]);
    // Another that is refused before anything is made.
    let refused = home.run(&["start", "--registry-mirror", "no url", "pulling"]);
    assert!(refused.fails_with(2).contains("https://mirror.example.com"));
    start.env("SSL_CERT_FILE", path("certificate.pem"));
    start.env("HTTP_PROXY", format!("http://127.0.0.1:{proxy_port}"));
    Running::start(&mut start, b"").wait().ok();
    let docker = home.docker("pulling");
    docker.import("busybox");

    // By the host's certificates, and not by the proxy.
    let name = format!("host.docker.internal:{}/box", trusted.port);
    docker.ok(&["tag", "busybox", &name]);
    let pushed = docker.ok(&["push", &name]);
    let digest = pushed
        .split_whitespace()
        .find(|word| word.starts_with("sha256:"))
        .unwrap_or_else(|| panic!("{pushed}"));
    docker.ok(&["rmi", &name, "busybox"]);
    let by_digest = format!("{name}@{digest}");
    docker.ok(&["pull", "-q", &by_digest]);
    assert_eq!(docker.ok(&["run", "--rm", &by_digest, "echo", "ahoy"]), "ahoy");
    assert_eq!(*asked.lock().expect("no panic"), Vec::<String>::new());

    // The docker CLI found its context, and gives containers the proxy as the guest reaches it.
    assert_eq!(
        home.docker_by_context(&["context", "show"]).ok(),
        "lighter-pulling"
    );
    let environment = home.docker_by_context(&["run", "--rm", &by_digest, "env"]).ok();
    let expected = format!("HTTP_PROXY=http://host.docker.internal:{proxy_port}");
    assert!(environment.lines().any(|line| line == expected), "{environment}");

    // A name that only the proxy knows.
    let missing = docker.run(&["pull", "-q", &format!("{insecure}/box")]);
    assert_ne!(missing.code(), 0, "{missing:?}");
    let asked = asked.lock().expect("no panic").clone();
    assert!(
        asked
            .iter()
            .any(|line| line.contains("http://plain.test:5000/v2/")),
        "{asked:?}\n{missing:?}"
    );
    home.run(&["stop", "pulling"]).ok();
    assert_eq!(home.docker_by_context(&["context", "show"]).ok(), "default");
    home.run(&["rm", "--force", "pulling"]).ok();
    let left = home.docker_by_context(&["context", "ls", "-q"]).ok();
    assert_eq!(left, "default");
}
