//! `lighter bench net`: what the guest's network and a published port cost.
//!
//! A client and a server ([`lighter_measure::net`]) on the host's loopback interface; the client in the guest, and the server on
//! the host; the client on the host, and the server in a container whose port is published. Another monitor has its own way for
//! the last two, with client and server in the guest itself.

use super::engine::Engine;
use super::environment::Environment;
use super::peer::{Guest, Peer};
use super::session::Session;
use super::stats::Percentiles;
use super::tasks::{AGENT, encoded, in_guest};
use super::ways::{Figure, Report, Table, Way};
use crate::boot::START_TIMEOUT;
use crate::cli::Json;
use crate::cli::options::MachineOptions;
use crate::config::Config;
use crate::error::{Code, Context, Error, Result};
use crate::paths::Paths;
use crate::progress::Progress;
use crate::throw_away::ThrowAway;
use crate::vm::Settings;
use clap::Args;
use lighter_measure::net::{Plan, Samples, listen, measure, serve};
use lighter_measure::tar::archive;
use lighter_measure::task::{SERVING, Task, VERB, WORD};
use lighter_measure::work::Work;
use lighter_protocol::network::NETWORK;
use serde_json::{Value, json};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
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
    /// Compare with this monitor: qemu (its microvm) with its user-mode network
    #[arg(long, value_name = "NAME[=PATH]")]
    peer: Option<Peer>,
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
        if !settings.host_access {
            return Err(
                Error::new(Code::Usage, "the guest may not reach the server on the host")
                    .hint("give --host-access, or take no-host-access out of the configuration"),
            );
        }
        self.peer.as_ref().map_or(Ok(()), Peer::check_devices)?;
        let environment = Environment::of(paths, &config, &settings, false)?;
        let progress = Progress::new(!self.output.json);
        let on_host = serve_on_host()?;
        let deadline = Instant::now() + START_TIMEOUT;
        let engine = ThrowAway::boot(paths, NAME, settings.clone(), deadline, &progress)?;
        if let Some(trouble) = engine
            .status
            .trouble
            .as_ref()
            .filter(|trouble| trouble.device == "net")
        {
            let reason = format!("there is no network to measure: {}", trouble.reason);
            return Err(Error::failure(reason));
        }
        progress.say("starting the server's container");
        let published = publish(&engine)?;
        let mut about = vec![format!(
            "{} requests of each kind, {} clients at once, {} MiB each way. Published port: for Lighter, of a container (docker run -p); \
             for the other monitor, of a program in its guest.",
            self.requests, self.clients, self.mib
        )];
        let mut peer = match &self.peer {
            Some(peer) => {
                progress.say(&format!("booting {}", peer.name()));
                Some(Other::start(peer, &environment, &settings, &engine, &mut about)?)
            }
            None => None,
        };
        let gateway = SocketAddr::from((NETWORK.gateway, on_host.port()));
        let host_client =
            |server| measure(&self.plan(server)).map_err(|error| Error::of(Code::Failure, &error));
        let mut host = Way::new("host");
        let mut ours = [Way::new("lighter"), Way::new("lighter")];
        let name = peer.as_ref().map_or("", |other| other.name);
        let mut others = [Way::new(name), Way::new(name)];
        for round in 0..=self.runs {
            let say = |what: &str| match round {
                0 => progress.say(&format!("warming up, {what}")),
                _ => progress.say(&format!("round {round} of {}, {what}", self.runs)),
            };
            say("on the host");
            let loopback = self.figures(&host_client(on_host)?)?;
            say("from the guest");
            let task = Task::Net(self.plan(gateway));
            let out = self.figures(&in_guest(&engine.vm, &task, MAX_SAMPLES)?)?;
            let mut theirs = vec![];
            if let Some(other) = &mut peer {
                say(&format!("from the guest of {name}"));
                theirs.push(self.figures(&other.session.measure(&task)?)?);
            }
            say("to the published port");
            let to_port = self.figures(&host_client(published)?)?;
            if let Some(other) = &peer {
                say(&format!("to the port of {name}"));
                theirs.push(self.figures(&host_client(other.published)?)?);
            }
            if round > 0 {
                host.add(loopback);
                for (way, figures) in ours.iter_mut().zip([out, to_port]) {
                    way.add(figures);
                }
                for (way, figures) in others.iter_mut().zip(theirs) {
                    way.add(figures);
                }
            }
        }
        let has_peer = peer.is_some();
        drop((peer, engine, progress));
        let titles = [
            "client in the guest, server on the host",
            "client on the host, published port",
        ];
        let table = |((title, ours), others): ((&'static str, &Way), &Way)| {
            let all = [&host, others];
            Table::new(title, ours, if has_peer { &all } else { &all[..1] })
        };
        let report = Report {
            environment,
            rounds: self.runs,
            about,
            tables: titles
                .into_iter()
                .zip(&ours)
                .zip(&others)
                .map(table)
                .collect::<Result<_>>()?,
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
        let mib = |work: Work| work.per_second() / f64::from(1 << 20);
        Ok(vec![
            Figure::time("a byte back and forth, p50, µs", round_trip.p50),
            Figure::time("a byte back and forth, p99, µs", round_trip.p99),
            Figure::time("a connection and a byte, p50, µs", connection.p50),
            Figure::time("a connection and a byte, p99, µs", connection.p99),
            Figure::rate(
                "connections per second, several clients",
                samples.concurrent.per_second(),
            ),
            Figure::rate("client to server, MiB/s", mib(samples.upload)),
            Figure::rate("server to client, MiB/s", mib(samples.download)),
        ])
    }
}

/// Serves on the host's loopback interface for as long as this process runs.
fn serve_on_host() -> Result<SocketAddr> {
    let listener =
        listen((Ipv4Addr::LOCALHOST, 0).into()).map_err(|error| Error::of(Code::Failure, &error))?;
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

/// The other monitor.
struct Other {
    name: &'static str,
    session: Session,
    published: SocketAddr,
}

impl Other {
    fn start(
        peer: &Peer,
        environment: &Environment,
        settings: &Settings,
        engine: &ThrowAway,
        about: &mut Vec<String>,
    ) -> Result<Self> {
        let published = free_port()?;
        let guest = Guest {
            kernel: environment.kernel.clone(),
            image: environment.image.clone(),
            cpus: settings.cpus,
            memory: settings.memory,
            disk: settings.disk,
            words: format!("{NETWORK} {WORD} "),
            qemu_options: [
                "-netdev".into(),
                user_network(published),
                "-device".into(),
                "virtio-net-device,netdev=net".into(),
            ]
            .map(Into::into)
            .into(),
        };
        let contender = peer.prepare(&guest, &engine.vm.paths.data)?;
        about.push(contender.version.clone());
        about.push(contender.settings());
        let mut session = Session::start(&contender, vec![], Instant::now() + START_TIMEOUT)?;
        session.measure::<()>(&Task::Serve(PORT))?;
        Ok(Self {
            name: contender.name,
            session,
            published,
        })
    }
}

/// QEMU's own network, where the guest has the address that Lighter's has.
fn user_network(published: SocketAddr) -> String {
    let (guest, host) = (NETWORK.address, NETWORK.gateway);
    let network = Ipv4Addr::from_bits(guest.to_bits() & NETWORK.mask().to_bits());
    let names = Ipv4Addr::from_bits(guest.to_bits() + 1);
    format!(
        "user,id=net,net={network}/{},host={host},dns={names},hostfwd=tcp:{published}-{guest}:{PORT}",
        NETWORK.prefix
    )
}

/// A port of the loopback interface that nobody has now.
fn free_port() -> Result<SocketAddr> {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
        .and_then(|listener| listener.local_addr())
        .context(|| "cannot find a free port".into())
}
