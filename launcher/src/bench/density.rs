//! `lighter bench density`: how many idle engines this host carries, and what each of them costs.
//!
//! Engines are started one after another and stay. Before each, the memory that the host has available must cover a reserve
//! and all of the next guest's memory, so that no guest can drive the host into swapping, whatever it does. In the end
//! every engine has to answer still.

use super::settling::{BETWEEN_LOOKS, PATIENCE, Rule, Settling};
use super::stats::Spread;
use crate::boot::{START_TIMEOUT, ping};
use crate::cli::options::MachineOptions;
use crate::cli::{Json, print, print_json};
use crate::clock::monotonic_ns;
use crate::config::Config;
use crate::error::{Error, Result};
use crate::memory::{self, Host, Memory};
use crate::paths::Paths;
use crate::progress::Progress;
use crate::size::Size;
use crate::table;
use crate::throw_away::ThrowAway;
use crate::vm::Settings;
use clap::Args;
use serde::Serialize;
use std::time::{Duration, Instant};

/// Guest memory when nobody says otherwise.
const MEMORY: Size = Size(512 << 20);

/// The least that is kept available when nobody says otherwise, KiB.
const LEAST_RESERVE_KIB: u64 = 256 << 10;

/// Arguments.
#[derive(Debug, Args)]
pub struct Density {
    /// Stop at this many engines
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=1000))]
    max: u32,
    /// Keep this much of the host's memory available [default: a tenth of it, at least 256m]
    #[arg(long, value_name = "SIZE")]
    reserve: Option<Size>,
    #[command(flatten)]
    options: MachineOptions,
    #[command(flatten)]
    output: Json,
}

/// One idle engine among those before it.
#[derive(Clone, Debug, Serialize)]
struct Engine {
    /// From the start of its supervisor to the engine's answer on the host's socket.
    boot_ms: f64,
    /// From there until its memory stayed as it is.
    settle_ms: f64,
    /// Whether it has.
    settled: bool,
    /// Proportional set size of the whole VM.
    pss_kib: u64,
    /// The supervisor's part of it.
    supervisor_pss_kib: u64,
    #[serde(flatten)]
    monitor: Memory,
    /// What its data disk takes on the host: memory, where that is a tmpfs.
    data_disk_kib: u64,
    /// What the host has left after it.
    host_available_kib: u64,
}

/// Why no more engines were started.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
enum Limit {
    /// As many as were asked for.
    Max,
    /// The host's memory.
    Memory { available_kib: u64, needed_kib: u64 },
    /// The host has begun to swap.
    Swap { pages: u64 },
    /// An engine failed.
    Failure { message: String },
}

impl Limit {
    fn sentence(&self) -> String {
        match self {
            Self::Max => "as many as --max allows".into(),
            Self::Memory {
                available_kib,
                needed_kib,
            } => format!(
                "the host's memory: {:.0} MiB are available, reserve and one more guest need {:.0} MiB",
                mib(*available_kib),
                mib(*needed_kib)
            ),
            Self::Swap { pages } => format!("the host began to swap ({pages} pages went out)"),
            Self::Failure { message } => message.clone(),
        }
    }
}

/// What is known when all are running.
#[derive(Debug, Serialize)]
struct Report {
    guest_memory_mib: u64,
    cpus: u16,
    reserve_kib: u64,
    /// Before the first engine.
    host: Host,
    idle: Rule,
    engines: Vec<Engine>,
    limit: Limit,
    together: Option<Together>,
}

/// All engines, with the last of them running.
#[derive(Debug, Serialize)]
struct Together {
    /// How long each engine took to answer when asked in the end.
    answer_ms: Spread,
    /// Proportional set sizes of all VMs.
    pss_kib: u64,
    /// By how much the host's available memory fell for each.
    host_memory_per_engine_kib: u64,
}

impl Density {
    /// Starts engines, prints what they cost, removes them.
    ///
    /// # Errors
    /// When one does not start or does not answer; what was measured before is printed all the same.
    pub fn run(self, paths: &Paths) -> Result<()> {
        let settings = self.options.settings(&Config::load(&paths.config_file)?)?;
        let settings = Settings {
            memory: self.options.memory.unwrap_or(MEMORY),
            ..settings
        };
        let progress = Progress::new(!self.output.json);
        let host = Host::now()?;
        let reserve_kib = self
            .reserve
            .map_or(default_reserve_kib(host.total_kib), |size| size.0 >> 10);
        let mut vms = vec![];
        let mut engines = vec![];
        let limit = loop {
            let now = Host::now()?;
            if let Some(limit) = self.limit(engines.len(), &host, &now, reserve_kib, settings.memory) {
                break Ok(limit);
            }
            let number = engines.len() + 1;
            match start(paths, number, &settings, &progress) {
                Ok((vm, engine)) => {
                    vms.push(vm);
                    engines.push(engine);
                }
                Err(error) => break Err(error),
            }
        };
        progress.say("asking every engine");
        let together = limit.and_then(|limit| Ok((limit, together(&vms, &host)?)));
        progress.say("removing the engines");
        ThrowAway::end_all(vms);
        drop(progress);
        let (limit, together, failure) = match together {
            Ok((limit, together)) => (limit, together, None),
            Err(error) => {
                let message = error.message.clone();
                (Limit::Failure { message }, None, Some(error))
            }
        };
        let report = Report {
            guest_memory_mib: settings.memory.mib(),
            cpus: settings.cpus,
            reserve_kib,
            host,
            idle: Rule::new(),
            engines,
            limit,
            together,
        };
        match self.output.json {
            true => print_json(&report)?,
            false => print(&report.text())?,
        }
        failure.map_or(Ok(()), Err)
    }

    /// Whether, and why, no other engine may be started.
    fn limit(
        &self,
        running: usize,
        before: &Host,
        now: &Host,
        reserve_kib: u64,
        memory: Size,
    ) -> Option<Limit> {
        let needed_kib = reserve_kib.saturating_add(memory.0 >> 10);
        let pages = now.swapped_out_pages.saturating_sub(before.swapped_out_pages);
        if running >= self.max as usize {
            Some(Limit::Max)
        } else if pages > 0 {
            Some(Limit::Swap { pages })
        } else if now.available_kib < needed_kib {
            Some(Limit::Memory {
                available_kib: now.available_kib,
                needed_kib,
            })
        } else {
            None
        }
    }
}

fn default_reserve_kib(total_kib: u64) -> u64 {
    (total_kib / 10).max(LEAST_RESERVE_KIB)
}

/// Starts one engine and waits until it is idle.
fn start(
    paths: &Paths,
    number: usize,
    settings: &Settings,
    progress: &Progress,
) -> Result<(ThrowAway, Engine)> {
    let about = |error: Error| Error {
        message: format!("engine {number}: {}", error.message),
        ..error
    };
    let began_ns = monotonic_ns();
    let deadline = Instant::now() + START_TIMEOUT;
    // The process id in the name makes it this process's, the number makes it unique.
    let prefix = format!("density-{number}");
    let vm = ThrowAway::boot(paths, &prefix, settings.clone(), deadline, progress).map_err(about)?;
    progress.say(&format!("engine {number}: waiting until it is idle"));
    let (settled, settle) = settle(&vm).map_err(about)?;
    let monitor = vm.monitor_pid().and_then(memory::of).map_err(about)?;
    let engine = Engine {
        boot_ms: vm.answered_ns.saturating_sub(began_ns) as f64 / 1e6,
        settle_ms: settle.as_secs_f64() * 1e3,
        settled,
        pss_kib: memory::of_vm_kib(&vm.status).map_err(about)?,
        supervisor_pss_kib: memory::proportional_kib(vm.status.supervisor_pid).map_err(about)?,
        monitor,
        data_disk_kib: vm.vm.disk_used().map_or(0, |size| size.0 >> 10),
        host_available_kib: Host::now()?.available_kib,
    };
    Ok((vm, engine))
}

/// Waits until the VM's memory stays as it is. Returns whether it does, and how long that took.
fn settle(vm: &ThrowAway) -> Result<(bool, Duration)> {
    let began = Instant::now();
    let mut settling = Settling::default();
    loop {
        let settled = settling.look(memory::of_vm_kib(&vm.status)?);
        if settled || began.elapsed() >= PATIENCE {
            return Ok((settled, began.elapsed()));
        }
        std::thread::sleep(BETWEEN_LOOKS);
    }
}

fn together(vms: &[ThrowAway], before: &Host) -> Result<Option<Together>> {
    let mut answers_ms = vec![];
    for vm in vms {
        let began = Instant::now();
        ping(&vm.vm.paths.docker_socket(), began + START_TIMEOUT)?;
        answers_ms.push(began.elapsed().as_secs_f64() * 1e3);
    }
    let pss_kib = vms
        .iter()
        .map(|vm| memory::of_vm_kib(&vm.status))
        .sum::<Result<u64>>()?;
    let fell_kib = before.available_kib.saturating_sub(Host::now()?.available_kib);
    Ok(Spread::of(answers_ms).map(|answer_ms| Together {
        answer_ms,
        pss_kib,
        host_memory_per_engine_kib: fell_kib / vms.len() as u64,
    }))
}

fn mib(kib: u64) -> f64 {
    kib as f64 / 1024.0
}

impl Report {
    fn text(&self) -> String {
        let mut table = table::plain();
        table.set_header([
            "engine",
            "boot ms",
            "idle after s",
            "VM PSS MiB",
            "guest resident MiB",
            "monitor RSS KiB",
            "monitor private KiB",
            "supervisor PSS KiB",
            "data disk MiB",
            "host available MiB",
        ]);
        for (index, engine) in self.engines.iter().enumerate() {
            let idle = match engine.settled {
                true => format!("{:.0}", engine.settle_ms / 1e3),
                false => format!("not in {:.0}", engine.settle_ms / 1e3),
            };
            table.add_row([
                (index + 1).to_string(),
                format!("{:.0}", engine.boot_ms),
                idle,
                format!("{:.1}", mib(engine.pss_kib)),
                format!("{:.1}", mib(engine.monitor.guest_rss_kib)),
                engine.monitor.monitor_rss_kib.to_string(),
                engine.monitor.monitor_private_kib.to_string(),
                engine.supervisor_pss_kib.to_string(),
                format!("{:.1}", mib(engine.data_disk_kib)),
                format!("{:.0}", mib(engine.host_available_kib)),
            ]);
        }
        table::align_numbers(&mut table);
        let together = self.together.as_ref().map_or(String::new(), |together| {
            let Spread { min, median, max } = together.answer_ms;
            format!(
                "All answered in the end, in {min:.1} / {median:.1} / {max:.1} ms (min / median / max). \
                 PSS of all VMs {:.0} MiB; the host's available memory fell by {:.1} MiB for each.\n",
                mib(together.pss_kib),
                mib(together.host_memory_per_engine_kib),
            )
        });
        format!(
            "Idle engines of {} MiB and {} vCPUs; host {:.0} MiB, {:.0} MiB available before, {:.0} MiB kept in reserve\n\
             {table}\n{together}{} engines; limited by {}\n",
            self.guest_memory_mib,
            self.cpus,
            mib(self.host.total_kib),
            mib(self.host.available_kib),
            mib(self.reserve_kib),
            self.engines.len(),
            self.limit.sentence(),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bench(max: u32) -> Density {
        Density {
            max,
            reserve: None,
            options: MachineOptions::default(),
            output: Json { json: false },
        }
    }

    fn host(available_kib: u64, swapped_out_pages: u64) -> Host {
        Host {
            total_kib: 4000,
            available_kib,
            swapped_out_pages,
        }
    }

    #[test]
    fn the_next_engine_is_started_only_when_all_of_its_memory_is_there() {
        let limit = |running, now| bench(3).limit(running, &host(4000, 5), &now, 100, Size(300 << 10));
        assert_eq!(limit(2, host(400, 5)), None);
        assert_eq!(
            limit(2, host(399, 5)),
            Some(Limit::Memory {
                available_kib: 399,
                needed_kib: 400
            })
        );
        assert_eq!(limit(0, host(4000, 6)), Some(Limit::Swap { pages: 1 }));
        assert_eq!(limit(3, host(4000, 5)), Some(Limit::Max));
    }

    #[test]
    fn the_reserve_is_a_tenth_of_the_host_and_never_tiny() {
        assert_eq!(default_reserve_kib(16 << 20), (16 << 20) / 10);
        assert_eq!(default_reserve_kib(1 << 20), LEAST_RESERVE_KIB);
    }

    #[test]
    fn the_text_has_a_row_for_each_engine_and_says_what_limited_them() {
        let engine = Engine {
            boot_ms: 1234.4,
            settle_ms: 10_000.0,
            settled: false,
            pss_kib: 150 << 10,
            supervisor_pss_kib: 2000,
            monitor: Memory::default(),
            data_disk_kib: 1024,
            host_available_kib: 2048,
        };
        let report = Report {
            guest_memory_mib: 512,
            cpus: 1,
            reserve_kib: 1024,
            host: host(3000, 0),
            idle: Rule::new(),
            engines: vec![engine.clone(), engine],
            limit: Limit::Memory {
                available_kib: 2048,
                needed_kib: 4096,
            },
            together: None,
        };
        let text = report.text();
        assert!(
            text.contains("1234") && text.contains("150.0") && text.contains("not in 10"),
            "{text}"
        );
        assert!(text.ends_with(
            "2 engines; limited by the host's memory: 2 MiB are available, reserve and one more guest need 4 MiB\n"
        ));
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["limit"]["kind"], "memory");
        assert_eq!(json["engines"][1]["guest_rss_kib"], 0);
    }
}
