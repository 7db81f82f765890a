//! `lighter bench net`: what the guest's network and a published port cost.
//!
//! A client and a server ([`lighter_measure::net`]) on the host's loopback interface; the client in the guest, and the server on
//! the host; the client on the host, and the server in a container whose port is published. Another monitor has its own way for
//! the last two, with client and server in the guest itself.

use super::engine::Engine;
use super::environment::Environment;
use super::peer::{Guest, Peer, Running};
use super::session::Session;
use super::stats::Percentiles;
use super::tasks::{AGENT, encoded, in_guest};
use super::ways::{Figure, Report, Table, Way};
use crate::boot::START_TIMEOUT;
use crate::cli::Json;
use crate::cli::options::MachineOptions;
use crate::config::Config;
use crate::error::{Code, Context, Error, Result};
use crate::network::Network;
use crate::paths::Paths;
use crate::progress::Progress;
use crate::supervisor::network::{self, passt};
use crate::throw_away::ThrowAway;
use crate::vm::Settings;
use clap::{Args, ValueEnum};
use command_fds::{CommandFdExt, FdMapping};
use lighter_measure::net::{Plan, Samples, listen, measure, serve};
use lighter_measure::tar::archive;
use lighter_measure::task::{SERVING, Task, VERB, WORD};
use lighter_protocol::network::{GATEWAY, GuestNetwork};
use serde_json::{Value, json};
use std::ffi::OsString;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::process::{Command, Stdio};
use std::time::Instant;

/// How the name of the VM begins.
const NAME: &str = "bench-net";

/// The most that a guest's samples may be, bytes: more than twice what 100 000 of each kind make.
const MAX_SAMPLES: usize = 8 << 20;

/// Where the server in a guest listens.
const PORT: u16 = 7777;

/// The name of its image.
const IMAGE: &str = "lighter-bench-server";

/// Arguments.
#[derive(Debug, Args)]
pub struct Net {
    /// How many rounds, after one that is not counted
    #[arg(short = 'n', long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    runs: u32,
    /// How many bytes go back and forth, and how many connections are made, one after another
    #[arg(long, value_name = "N", default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    requests: u32,
    /// How many clients make as many connections at once
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=32))]
    clients: u32,
    /// How much is sent, and received, MiB
    #[arg(long, value_name = "MIB", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    mib: u32,
    /// Compare with this monitor: qemu (its microvm)
    #[arg(long, value_name = "NAME[=PATH]")]
    peer: Option<Peer>,
    /// The other monitor's network: user (its own), passt, or both
    #[arg(
        long,
        value_name = "NETWORK",
        value_delimiter = ',',
        default_value = "user",
        requires = "peer"
    )]
    peer_network: Vec<PeerNetwork>,
    #[command(flatten)]
    options: MachineOptions,
    #[command(flatten)]
    output: Json,
}

impl Net {
    /// Measures and prints.
    ///
    /// # Errors
    /// When a VM does not boot, has no network, or a connection fails.
    pub fn run(self, paths: &Paths) -> Result<()> {
        let config = Config::load(&paths.config_file)?;
        let settings = self.options.settings(&config)?;
        let gateway = network::host_of(&settings).ok_or_else(|| {
            Error::new(Code::Usage, "the guest cannot reach a server on the host")
                .hint("leave --no-host-access and --network none out; on a tap, the host needs an address of its own on its network")
        })?;
        self.peer.as_ref().map_or(Ok(()), Peer::check_devices)?;
        let environment = Environment::of(paths, &config, &settings, false)?;
        let progress = Progress::new(!self.output.json);
        let on_host = serve_on_host(match settings.network {
            // passt connects to it there.
            Network::Passt => Ipv4Addr::LOCALHOST,
            _ => gateway,
        })?;
        let deadline = Instant::now() + START_TIMEOUT;
        let engine = ThrowAway::boot(paths, NAME, settings.clone(), deadline, &progress)?;
        let trouble = engine.status.trouble.as_ref();
        if let Some(trouble) = trouble.filter(|trouble| trouble.device == network::DEVICE) {
            let reason = format!("there is no network to measure: {}", trouble.reason);
            return Err(Error::failure(reason));
        }
        progress.say("starting the server's container");
        let published = publish(&engine)?;
        let mut about = vec![format!(
            "{} requests of each kind, {} clients at once, {} MiB each way; Lighter's network is {}. Published port: for Lighter, of a \
             container (docker run -p); for another monitor, of a program in its guest.",
            self.requests, self.clients, self.mib, settings.network
        )];
        let mut others = vec![];
        for &network in self.peer_network.iter().filter(|_| self.peer.is_some()) {
            progress.say(&format!("booting {}", network.name()));
            others.extend(
                self.peer
                    .as_ref()
                    .map(|peer| Other::start(peer, network, &environment, &settings, &engine, &mut about)),
            );
        }
        let mut others = others.into_iter().collect::<Result<Vec<Other>>>()?;
        let from_guest = Task::Net(self.plan((gateway, on_host.port()).into()));
        let host_client =
            |server| measure(&self.plan(server)).map_err(|error| Error::of(Code::Failure, &error));
        let mut host = Way::new("host");
        let mut ours = [Way::new("lighter"), Way::new("lighter")];
        for round in 0..=self.runs {
            let say = |what: &str| match round {
                0 => progress.say(&format!("warming up, {what}")),
                _ => progress.say(&format!("round {round} of {}, {what}", self.runs)),
            };
            let counted = round > 0;
            say("on the host");
            host.add_if(counted, self.figures(&host_client(on_host)?)?);
            say("from the guest");
            let samples = in_guest(&engine.vm, &from_guest, MAX_SAMPLES)?;
            ours[0].add_if(counted, self.figures(&samples)?);
            for other in &mut others {
                say(&format!("from the guest, {}", other.network.name()));
                let samples = other.session.measure(&from_guest)?;
                other.ways[0].add_if(counted, self.figures(&samples)?);
            }
            say("to the published port");
            ours[1].add_if(counted, self.figures(&host_client(published)?)?);
            for other in &mut others {
                say(&format!("to the published port, {}", other.network.name()));
                let samples = host_client(other.published)?;
                other.ways[1].add_if(counted, self.figures(&samples)?);
            }
        }
        let titles = [
            "client in the guest, server on the host",
            "client on the host, published port",
        ];
        let table = |(number, title): (usize, &'static str)| {
            let others = others.iter().map(|other| &other.ways[number]);
            let beside: Vec<&Way> = std::iter::once(&host).chain(others).collect();
            Table::new(title, &ours[number], &beside)
        };
        let tables = titles.into_iter().enumerate().map(table).collect::<Result<_>>()?;
        drop((others, engine, progress));
        let report = Report {
            environment,
            rounds: self.runs,
            about,
            tables,
        };
        report.tell(self.output.json)
    }

    fn plan(&self, server: SocketAddr) -> Plan {
        Plan {
            server,
            round_trips: self.requests,
            connections: self.requests,
            clients: self.clients,
            mib: self.mib,
        }
    }

    /// Of samples that may be anything.
    fn figures(&self, samples: &Samples) -> Result<Vec<Figure>> {
        let us = |samples: &[u64]| {
            Percentiles::of(samples.iter().map(|&ns| ns as f64 / 1e3))
                .filter(|_| samples.len() == self.requests as usize)
                .ok_or_else(|| Error::failure("a guest did not measure what it was told to"))
        };
        let (round_trip, connection) = (us(&samples.round_trip_ns)?, us(&samples.connection_ns)?);
        Ok(vec![
            Figure::time("a byte back and forth, p50, µs", round_trip.p50),
            Figure::time("a byte back and forth, p99, µs", round_trip.p99),
            Figure::time("a connection and a byte, p50, µs", connection.p50),
            Figure::time("a connection and a byte, p99, µs", connection.p99),
            Figure::rate(
                "connections per second, several clients",
                samples.concurrent.per_second(),
            ),
            Figure::rate("client to server, MiB/s", samples.upload.mib_per_second()),
            Figure::rate("server to client, MiB/s", samples.download.mib_per_second()),
        ])
    }
}

/// Serves on an address of the host's for as long as this process runs.
fn serve_on_host(address: Ipv4Addr) -> Result<SocketAddr> {
    let listener = listen((address, 0).into()).map_err(|error| Error::of(Code::Failure, &error))?;
    let address = listener
        .local_addr()
        .context(|| "cannot tell the server's address".into())?;
    std::thread::Builder::new()
        .name("bench server".into())
        .spawn(move || serve(&listener))
        .context(|| "cannot start the server's thread".into())?;
    Ok(address)
}

/// Starts a server in a container, and returns where it is published on the host.
fn publish(vm: &ThrowAway) -> Result<SocketAddr> {
    let socket = vm.vm.paths.docker_socket();
    let engine = Engine {
        socket: &socket,
        deadline: Instant::now() + START_TIMEOUT,
    };
    let port = format!("{PORT}/tcp");
    // The program is the guest's own; only what is told to it says that it is not to be PID 1.
    let config = json!({
        "Cmd": ["/measure", VERB, encoded(&Task::Serve(PORT))?],
        "ExposedPorts": { &port: {} },
        "HostConfig": {
            "Binds": [format!("{AGENT}:/measure:ro")],
            "PidMode": "host",
            "PortBindings": { &port: [{ "HostIp": "127.0.0.1", "HostPort": "" }] },
        },
    });
    let image = archive("measure", "755", b"");
    let started = engine.run(IMAGE, &image, config, SERVING.as_bytes())?;
    let inspect = format!("GET /containers/{}/json", started.id);
    let container = engine.ask(&inspect, "application/json", b"")?;
    let published = match &container["NetworkSettings"]["Ports"][&port][0]["HostPort"] {
        Value::String(number) => number.parse().ok(),
        _ => None,
    };
    let published: u16 = published
        .ok_or_else(|| Error::failure("the engine does not tell where the container's port is published"))?;
    Ok((Ipv4Addr::LOCALHOST, published).into())
}

/// Another monitor's network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum PeerNetwork {
    /// QEMU's own.
    User,
    /// The same program as Lighter's.
    Passt,
}

impl PeerNetwork {
    fn name(self) -> &'static str {
        match self {
            Self::User => "qemu (user)",
            Self::Passt => "qemu (passt)",
        }
    }
}

/// The other monitor.
struct Other {
    network: PeerNetwork,
    session: Session,
    published: SocketAddr,
    /// From its guest, and to its port.
    ways: [Way; 2],
    _passt: Option<Running>,
}

/// The socket's number in QEMU, behind those that it always has.
const STREAM_FD: i32 = 5;

impl Other {
    fn start(
        peer: &Peer,
        network: PeerNetwork,
        environment: &Environment,
        settings: &Settings,
        engine: &ThrowAway,
        about: &mut Vec<String>,
    ) -> Result<Self> {
        let published = free_port()?;
        let (netdev, device, passt, inherited) = match network {
            PeerNetwork::User => (
                user_network(published),
                "virtio-net-device,netdev=net".into(),
                None,
                vec![],
            ),
            PeerNetwork::Passt => {
                let (passt, stream) = start_passt(published, about)?;
                let netdev = format!("stream,id=net,server=off,addr.type=fd,addr.str={STREAM_FD}");
                let device = format!("virtio-net-device,netdev=net,host_mtu={}", passt::MTU);
                let mapping = FdMapping {
                    parent_fd: stream,
                    child_fd: STREAM_FD,
                };
                (netdev, device, Some(passt), vec![mapping])
            }
        };
        let guest = Guest {
            kernel: environment.kernel.clone(),
            image: environment.image.clone(),
            cpus: settings.cpus,
            memory: settings.memory,
            disk: settings.disk,
            words: format!("{} {WORD} ", GuestNetwork::of_passt()),
            qemu_options: ["-netdev".into(), netdev, "-device".into(), device]
                .map(OsString::from)
                .into(),
        };
        let contender = peer.prepare(&guest, &engine.vm.paths.data)?;
        about.push(contender.version.clone());
        about.push(contender.settings());
        let mut session = Session::start(&contender, inherited, Instant::now() + START_TIMEOUT)?;
        session.measure::<()>(&Task::Serve(PORT))?;
        Ok(Self {
            network,
            session,
            published,
            ways: [Way::new(network.name()), Way::new(network.name())],
            _passt: passt,
        })
    }
}

/// Starts a passt as Lighter's, but that it publishes a port; returns the other end of its socket, too.
fn start_passt(published: SocketAddr, about: &mut Vec<String>) -> Result<(Running, OwnedFd)> {
    let program =
        passt::program().map_err(|absence| Error::failure(format!("no passt for QEMU: {absence}")))?;
    let (stream, socket) = passt::sockets()?;
    let ports = format!("{}/{}:{PORT}", published.ip(), published.port());
    let arguments = passt::arguments(true, &ports);
    about.push(format!("{} {}", program.display(), arguments.join(" ")));
    let failed = || format!("cannot start {}", program.display());
    let mut command = Command::new(&program);
    command
        .args(&arguments)
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let mapping = FdMapping {
        parent_fd: socket,
        child_fd: passt::FD,
    };
    command.fd_mappings(vec![mapping]).context(failed)?;
    Ok((Running::start(&mut command, None).context(failed)?, stream))
}

/// QEMU's own network, where the guest has the address that it has behind passt.
fn user_network(published: SocketAddr) -> String {
    // The network that `GuestNetwork::of_passt` is in.
    let [a, b, c, _] = GATEWAY.octets();
    let at = |last| Ipv4Addr::new(a, b, c, last);
    let guest = at(2);
    format!(
        "user,id=net,net={}/24,host={GATEWAY},dns={},hostfwd=tcp:{published}-{guest}:{PORT}",
        at(0),
        at(3)
    )
}

/// A port of the loopback interface that nobody has now.
fn free_port() -> Result<SocketAddr> {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
        .and_then(|listener| listener.local_addr())
        .context(|| "cannot find a free port".into())
}
