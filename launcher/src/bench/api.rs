//! `lighter bench api`: what the way from the host's socket to the engine costs.
//!
//! The same requests are made on both ends of that way: by this process on the VM's socket, and inside the guest on
//! dockerd's own ([`lighter_measure`]). The ends take turns, so that an engine that gets faster or slower meanwhile
//! favours neither.

use super::stats::Percentiles;
use super::tasks::in_guest;
use crate::boot::START_TIMEOUT;
use crate::cli::options::MachineOptions;
use crate::cli::{Json, print, print_json};
use crate::config::Config;
use crate::error::{Code, Context, Error, Result};
use crate::paths::Paths;
use crate::progress::Progress;
use crate::table;
use crate::throw_away::ThrowAway;
use crate::vm::Vm;
use clap::Args;
use lighter_measure::image::Image;
use lighter_measure::requests::{Plan, Samples, measure};
use lighter_measure::task::Task;
use serde::Serialize;
use sha2::{Digest, Sha256};
use std::time::Instant;

/// The most that the guest's samples may be, bytes: more than twice what 100 000 requests of each kind make.
const MAX_SAMPLES: usize = 8 << 20;

/// Before the first round: an engine that was just started reads its own program from the disk at the first requests.
const WARM_UP_REQUESTS: u32 = 20;

/// Arguments.
#[derive(Debug, Args)]
pub struct Api {
    /// How many requests of each kind in each of two rounds
    #[arg(short = 'n', long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    requests: u32,
    /// How many connections at once where several make requests
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=256))]
    clients: u32,
    /// Size of the image that is loaded and saved, MiB
    #[arg(long, value_name = "MIB", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=4096))]
    image_mib: u32,
    #[command(flatten)]
    options: MachineOptions,
    #[command(flatten)]
    output: Json,
}

/// The ends of the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Host,
    Guest,
}

/// The rounds: neither end is first more often.
const ROUNDS: [End; 4] = [End::Host, End::Guest, End::Guest, End::Host];

impl Api {
    /// Measures and prints.
    ///
    /// # Errors
    /// When the VM does not boot or a request fails.
    pub fn run(self, paths: &Paths) -> Result<()> {
        let settings = self.options.settings(&Config::load(&paths.config_file)?)?;
        let progress = Progress::new(!self.output.json);
        let plan = Plan {
            requests: self.requests,
            clients: self.clients,
            image: image(self.image_mib)?,
        };
        let warm_up = Plan {
            requests: WARM_UP_REQUESTS,
            clients: self.clients,
            image: image(1)?,
        };
        let (cpus, memory_mib) = (settings.cpus, settings.memory.mib());
        let deadline = Instant::now() + START_TIMEOUT;
        let engine = ThrowAway::boot(paths, "bench-api", settings, deadline, &progress)?;
        for end in [End::Host, End::Guest] {
            progress.say("warming up");
            end.measure(&engine.vm, &warm_up)?;
        }
        let (mut host, mut guest) = (Samples::default(), Samples::default());
        for (index, end) in ROUNDS.into_iter().enumerate() {
            let place = match end {
                End::Host => "on the host",
                End::Guest => "in the guest",
            };
            progress.say(&format!("measuring {place}, {} of {}", index + 1, ROUNDS.len()));
            let samples = end.measure(&engine.vm, &plan)?;
            match end {
                End::Host => add(&mut host, samples),
                End::Guest => add(&mut guest, samples),
            }
        }
        drop(engine);
        drop(progress);
        let requests = host.kept_alive_ns.len();
        let (host, guest) = (Figures::new(&host)?, Figures::new(&guest)?);
        let report = Report {
            cpus,
            memory_mib,
            requests,
            clients: self.clients,
            image_mib: self.image_mib,
            cost: Figures::cost(&host, &guest),
            host,
            guest,
        };
        match self.output.json {
            true => print_json(&report),
            false => print(&report.text()),
        }
    }
}

fn image(mib: u32) -> Result<Image> {
    let digest = |write: &dyn Fn(&mut dyn std::io::Write) -> std::io::Result<()>| {
        let mut hasher = Sha256::new();
        write(&mut hasher)?;
        Ok(format!("{:x}", hasher.finalize()))
    };
    Image::new(mib, digest).context(|| "cannot make the image".into())
}

impl End {
    fn measure(self, vm: &Vm, plan: &Plan) -> Result<Samples> {
        match self {
            Self::Host => {
                let socket = vm.paths.docker_socket();
                measure(&socket, plan).map_err(|error| Error::of(Code::Failure, &error))
            }
            Self::Guest => checked(in_guest(vm, &Task::Api(plan.clone()), MAX_SAMPLES)?, plan),
        }
    }
}

/// What the guest says, if it can be what was asked for.
fn checked(samples: Samples, plan: &Plan) -> Result<Samples> {
    let lengths = [samples.kept_alive_ns.len(), samples.new_connection_ns.len()];
    match lengths == [plan.requests as usize; 2] {
        true => Ok(samples),
        false => Err(Error::failure(format!(
            "the guest measured {lengths:?} requests instead of {} of each kind",
            plan.requests
        ))),
    }
}

fn add(sum: &mut Samples, more: Samples) {
    sum.kept_alive_ns.extend(more.kept_alive_ns);
    sum.new_connection_ns.extend(more.new_connection_ns);
    for (sum, more) in [
        (&mut sum.concurrent, more.concurrent),
        (&mut sum.load, more.load),
        (&mut sum.save, more.save),
    ] {
        // The guest's numbers may be anything.
        sum.amount = sum.amount.saturating_add(more.amount);
        sum.ns = sum.ns.saturating_add(more.ns);
    }
}

/// What one end measured.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
struct Figures {
    /// `GET /_ping` on one connection.
    kept_alive_us: Percentiles,
    /// `GET /_ping` each on a connection of its own, with its making.
    new_connection_us: Percentiles,
    requests_per_s: f64,
    load_mib_per_s: f64,
    save_mib_per_s: f64,
}

impl Figures {
    fn new(samples: &Samples) -> Result<Self> {
        let percentiles = |samples: &[u64]| {
            Percentiles::of(samples.iter().map(|&ns| ns as f64 / 1e3))
                .ok_or_else(|| Error::failure("no request was measured"))
        };
        Ok(Self {
            kept_alive_us: percentiles(&samples.kept_alive_ns)?,
            new_connection_us: percentiles(&samples.new_connection_ns)?,
            requests_per_s: samples.concurrent.per_second(),
            load_mib_per_s: samples.load.mib_per_second(),
            save_mib_per_s: samples.save.mib_per_second(),
        })
    }

    /// How many times as long each takes on the host's socket as in the guest.
    fn cost(host: &Self, guest: &Self) -> Cost {
        let latency = |host: Percentiles, guest: Percentiles| Percentiles {
            min: host.min / guest.min,
            p50: host.p50 / guest.p50,
            p99: host.p99 / guest.p99,
        };
        Cost {
            kept_alive: latency(host.kept_alive_us, guest.kept_alive_us),
            new_connection: latency(host.new_connection_us, guest.new_connection_us),
            requests: guest.requests_per_s / host.requests_per_s,
            load: guest.load_mib_per_s / host.load_mib_per_s,
            save: guest.save_mib_per_s / host.save_mib_per_s,
        }
    }
}

/// How many times as long something takes on the host's socket.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
struct Cost {
    kept_alive: Percentiles,
    new_connection: Percentiles,
    requests: f64,
    load: f64,
    save: f64,
}

/// All of it.
#[derive(Debug, Serialize)]
struct Report {
    cpus: u16,
    memory_mib: u64,
    /// Of each kind at each end.
    requests: usize,
    clients: u32,
    image_mib: u32,
    host: Figures,
    guest: Figures,
    cost: Cost,
}

impl Report {
    fn text(&self) -> String {
        let mut table = table::plain();
        table.set_header(["", "host socket", "in the guest", "cost"]);
        let mut row = |what: &str, host: f64, guest: f64, cost: f64| {
            table.add_row([
                what.to_owned(),
                format!("{host:.1}"),
                format!("{guest:.1}"),
                format!("{cost:.2}"),
            ]);
        };
        let (host, guest, cost) = (&self.host, &self.guest, &self.cost);
        for (what, host, guest, cost) in [
            (
                "one connection",
                host.kept_alive_us,
                guest.kept_alive_us,
                cost.kept_alive,
            ),
            (
                "a new connection each",
                host.new_connection_us,
                guest.new_connection_us,
                cost.new_connection,
            ),
        ] {
            row(&format!("ping on {what}, min µs"), host.min, guest.min, cost.min);
            row(&format!("ping on {what}, p50 µs"), host.p50, guest.p50, cost.p50);
            row(&format!("ping on {what}, p99 µs"), host.p99, guest.p99, cost.p99);
        }
        row(
            &format!("pings per second on {} connections", self.clients),
            host.requests_per_s,
            guest.requests_per_s,
            cost.requests,
        );
        row(
            "docker load, MiB/s",
            host.load_mib_per_s,
            guest.load_mib_per_s,
            cost.load,
        );
        row(
            "docker save, MiB/s",
            host.save_mib_per_s,
            guest.save_mib_per_s,
            cost.save,
        );
        table::align_numbers(&mut table);
        format!(
            "{} requests of each kind at each end, image of {} MiB; {} vCPUs, {} MiB\n\
             cost: how many times as long it takes on the host's socket\n{table}\n",
            self.requests, self.image_mib, self.cpus, self.memory_mib
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lighter_measure::work::Work;

    fn work(amount: u64, ns: u64) -> Work {
        Work { amount, ns }
    }

    fn all(factor: u64) -> Samples {
        Samples {
            kept_alive_ns: vec![1000 * factor, 3000 * factor, 2000 * factor],
            new_connection_ns: vec![5000 * factor; 3],
            concurrent: work(100, 1_000_000_000 * factor),
            load: work(4 << 20, 2_000_000_000 * factor),
            save: work(4 << 20, 1_000_000_000 * factor),
        }
    }

    #[test]
    fn the_cost_is_how_many_times_as_long_it_takes_whatever_the_unit() {
        let host = Figures::new(&all(3)).unwrap();
        let figures = Figures::new(&all(1)).unwrap();
        assert_eq!((figures.kept_alive_us.min, figures.kept_alive_us.p50), (1.0, 2.0));
        assert_eq!((figures.requests_per_s, figures.load_mib_per_s), (100.0, 2.0));
        let cost = Figures::cost(&host, &figures);
        let same = Percentiles {
            min: 3.0,
            p50: 3.0,
            p99: 3.0,
        };
        assert_eq!((cost.kept_alive, cost.new_connection), (same, same));
        for ratio in [cost.requests, cost.load, cost.save] {
            assert!((ratio - 3.0).abs() < 1e-9, "{cost:?}");
        }
    }

    #[test]
    fn rounds_are_added_up() {
        let mut sum = all(1);
        add(&mut sum, all(3));
        assert_eq!(sum.kept_alive_ns.len(), 6);
        assert_eq!(sum.load, work(8 << 20, 8_000_000_000));
    }

    #[test]
    fn what_a_guest_says_has_to_be_what_was_asked_for() {
        let plan = |requests| Plan {
            requests,
            clients: 1,
            image: image(1).unwrap(),
        };
        assert_eq!(checked(all(1), &plan(3)).unwrap(), all(1));
        let error = checked(all(1), &plan(2)).unwrap_err();
        assert!(error.message.contains("[3, 3]"), "{error}");
        // Times of nothing at all divide nothing by zero.
        let nothing = Figures::new(&Samples {
            load: work(u64::MAX, 0),
            ..all(0)
        });
        assert!(nothing.unwrap().load_mib_per_s.is_finite());
    }

    #[test]
    fn the_digest_is_of_the_layer() {
        let (one, other) = (image(1).unwrap(), image(2).unwrap());
        assert_eq!(one.layer_sha256.len(), 64);
        assert_ne!(one.layer_sha256, other.layer_sha256);
    }
}
