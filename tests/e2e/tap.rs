//! VMs on an interface of the host's.

use super::Test;
use super::network::{receive_all_once, run_on, serve_once};
use super::world::{Docker, Home, Running, until};
use std::process::Command;

pub const TESTS: &[Test] = &[("a_vm_on_a_tap_is_on_the_network_of_the_tap", tap)];

/// Who owns the tap and runs the VM.
const USER: u32 = 4712;

const HOST: &str = "198.18.50.1";
const HOST6: &str = "fd18:50::1";

/// Long enough that most of the packets are full.
const BYTES: usize = 4_000_000;

/// An interface that is gone when this is dropped.
pub struct Interface(&'static str);

impl Interface {
    fn new(name: &'static str, arguments: &[&str]) -> Self {
        let interface = Self(name);
        ip(arguments);
        interface
    }

    /// Bytes and packets, of those that go to the guest (`tx`) or come from it (`rx`).
    fn count(&self, direction: &str) -> [f64; 2] {
        ["bytes", "packets"].map(|what| {
            let path = format!("/sys/class/net/{}/statistics/{direction}_{what}", self.0);
            let text = std::fs::read_to_string(path).expect("statistics");
            text.trim().parse().expect("a number")
        })
    }
}

impl Drop for Interface {
    fn drop(&mut self) {
        // The test may have removed it.
        let _ = Command::new("ip").args(["link", "del", self.0]).output();
    }
}

fn ip(arguments: &[&str]) {
    let mut command = Command::new("ip");
    command
        .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
        .args(arguments);
    Running::start(&mut command, b"").wait().ok();
}

/// A tap of `owner`'s.
pub fn new_tap(name: &'static str, owner: u32) -> Interface {
    let owner = owner.to_string();
    Interface::new(
        name,
        &["tuntap", "add", "dev", name, "mode", "tap", "user", &owner],
    )
}

/// Starts a VM on `network` that cannot be.
fn refused(home: &Home, network: &str, code: i32) -> String {
    home.run(&["start", "-m", "1g", "-d", "1g", "--network", network, "bad"])
        .fails_with(code)
}

/// What a container downloads from `host`, and that the packets for it were longer than the network carries.
fn download(docker: &Docker, tap: &Interface, network: &str, host: &str) {
    let [bytes, packets] = tap.count("tx");
    super::network::download(docker, network, "::", host, BYTES);
    let [more_bytes, more_packets] = tap.count("tx");
    let mean = (more_bytes - bytes) / (more_packets - packets);
    assert!(mean > 3000.0, "packets of {mean} bytes for the guest");
}

/// What a container sends to `host`.
fn upload(docker: &Docker, network: &str, host: &str) {
    let (port, received) = receive_all_once("::");
    // `nc` goes on reading until the other end has closed.
    let script = format!("yes ahoy | head -c {BYTES} | nc {host} {port}");
    run_on(docker, network, &script);
    let received = received.join().expect("receive");
    assert_eq!(received.len(), BYTES);
    assert!(received.chunks(5).all(|line| line == &b"ahoy\n"[..line.len()]));
}

/// What the host downloads from the guest at `addresses`, and that the packets were longer than the network carries.
fn serve(docker: &Docker, tap: &Interface, addresses: &[&str]) {
    let script = format!(
        "yes ahoy | head -c {BYTES} > /tmp/file; httpd -p 8000 -h /tmp; echo listening; sleep 100000"
    );
    docker.ok(&[
        "run",
        "-d",
        "--name",
        "web",
        "--network",
        "host",
        "busybox",
        "sh",
        "-c",
        &script,
    ]);
    docker.wait_for_log("web", "listening");
    for address in addresses {
        let [bytes, packets] = tap.count("rx");
        let mut wget = Command::new("busybox");
        wget.args(["wget", "-q", "-O", "-", &format!("http://{address}:8000/file")]);
        let fetched = Running::start(&mut wget, b"").wait();
        assert_eq!(fetched.stdout.len(), BYTES, "{}", fetched.stderr);
        let [more_bytes, more_packets] = tap.count("rx");
        let mean = (more_bytes - bytes) / (more_packets - packets);
        assert!(mean > 3000.0, "packets of {mean} bytes from the guest");
    }
    docker.ok(&["rm", "--force", "web"]);
}

fn tap() {
    let home = Home::of_ordinary_user(USER);
    let addresses = "address=198.18.50.2/24,address=fd18:50::2/64";
    let network = format!("tap:lt-tap,{addresses},gateway={HOST}");
    // Each mistake has its own message, and what to type.
    let message = refused(&home, "tap:lt-tap", 2);
    assert!(message.contains("needs an address on lt-tap"), "{message}");
    let message = refused(&home, &network, 1);
    assert!(message.contains("no interface lt-tap"), "{message}");
    assert!(
        message.contains("sudo ip tuntap add dev lt-tap mode tap user"),
        "{message}"
    );
    {
        let _dummy = Interface::new("lt-dummy", &["link", "add", "lt-dummy", "type", "bridge"]);
        let message = refused(&home, "tap:lt-dummy,address=10.0.0.2/8", 1);
        assert!(message.contains("lt-dummy is no tap"), "{message}");
        let _foreign = new_tap("lt-foreign", USER + 1);
        let message = refused(&home, "tap:lt-foreign,address=10.0.0.2/8", 1);
        assert!(message.contains("lt-foreign is another user's"), "{message}");
    }
    let tap = new_tap("lt-tap", USER);
    ip(&["address", "add", &format!("{HOST}/24"), "dev", "lt-tap"]);
    ip(&["address", "add", &format!("{HOST6}/64"), "dev", "lt-tap", "nodad"]);
    ip(&["link", "set", "lt-tap", "up"]);
    home.run(&[
        "start",
        "-c",
        "1",
        "-m",
        "1g",
        "-d",
        "4g",
        "--no-mounts",
        "--network",
        &network,
        "tap",
    ])
    .ok();
    let message = refused(&home, &network, 1);
    assert!(message.contains("lt-tap is in use by another VM"), "{message}");
    home.run(&["rm", "--force", "bad"]).ok();
    let inspected: serde_json::Value =
        serde_json::from_str(&home.run(&["inspect", "tap"]).ok()).expect("JSON");
    assert_eq!(inspected["network"], network.as_str());

    let docker = home.docker("tap");
    docker.import("busybox");
    download(&docker, &tap, "bridge", HOST);
    download(&docker, &tap, "host", &format!("[{HOST6}]"));
    upload(&docker, "bridge", HOST);
    upload(&docker, "host", HOST6);
    serve(&docker, &tap, &["198.18.50.2", "[fd18:50::2]"]);
    let port = serve_once("0.0.0.0", b"ahoy".into());
    let url = format!("http://host.docker.internal:{port}/");
    assert_eq!(
        docker.ok(&["run", "--rm", "busybox", "wget", "-q", "-O", "-", &url]),
        "ahoy"
    );

    super::ports::low_ports(&docker);

    // What goes on elsewhere is of the same network.
    home.run(&["suspend", "tap"]).ok();
    home.run(&["start", "tap"]).ok();
    download(&docker, &tap, "bridge", HOST);
    let message = home.run(&["start", "--network", "none", "tap"]).fails_with(2);
    assert!(message.contains("is running"), "{message}");
    drop(tap);
    until("trouble with the network", || {
        let trouble = &home.status("tap")["running"]["trouble"];
        trouble["reason"].as_str()?.contains("is gone").then_some(())
    });
    home.run(&["stop", "tap"]).ok();
    home.run(&["start", "--network", "none", "tap"]).ok();
    let interfaces = home.run(&["exec", "tap", "--", "ls", "/sys/class/net"]).ok();
    assert!(!interfaces.contains("eth0"), "{interfaces}");
    home.run(&["rm", "--force", "tap"]).ok();
}
