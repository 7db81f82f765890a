//! What `bench fork`, `bench restore` and `bench run` measure alike: VMs that go on from a saved one, beside VMs that boot, in the same run.

use super::first_container;
use super::saved_peer::PeerFigures;
use super::stats::{Percentiles, Ratio, Spread};
use crate::boot::START_TIMEOUT;
use crate::clock::monotonic_ns;
use crate::error::{Error, Result};
use crate::memory;
use crate::paths::Paths;
use crate::progress::Progress;
use crate::table;
use crate::throw_away::ThrowAway;
use crate::vm::Settings;
use serde::Serialize;
use std::slice;
use std::time::{Duration, Instant};

/// What one VM took, and what it costs.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    /// From the command to the engine's answer on the VM's socket, milliseconds.
    answer_ms: f64,
    /// How long a first container took after that; not run in every one of those that are made together.
    container_ms: Option<f64>,
    /// Memory that is its alone when its engine has answered.
    own_kib: u64,
    /// What its data disk takes on the host.
    disk_kib: u64,
}

impl Sample {
    /// From the command to the engine's answer.
    pub fn answer_ms(&self) -> f64 {
        self.answer_ms
    }
}

/// What was saved, and at what cost.
#[derive(Clone, Copy, Debug)]
pub struct Saved {
    /// How long the source stood still, if that is known.
    pub paused_ns: Option<u64>,
    /// What is saved takes this on the host, once for all VMs that go on from it.
    pub bytes: u64,
}

/// Longer than a host takes to clear away what it had for a VM that has ended.
const REST: Duration = Duration::from_secs(1);

/// Waits until nothing is left to do for what ran before, and tells when that was, CLOCK_MONOTONIC, nanoseconds.
pub fn begin() -> u64 {
    std::thread::sleep(REST);
    monotonic_ns()
}

/// Measures VMs that were all made by a command that began at `began_ns`. The first of them runs a container.
///
/// # Errors
/// When one cannot be looked at, or runs no container.
pub fn samples(began_ns: u64, vms: &[ThrowAway]) -> Result<Vec<Sample>> {
    let mut samples = vms
        .iter()
        .map(|vm| {
            Ok(Sample {
                answer_ms: ms(vm.answered_ns.saturating_sub(began_ns)),
                container_ms: None,
                own_kib: memory::own_of_vm_kib(&vm.status)?,
                disk_kib: vm.vm.disk_used().map_or(0, |size| size.0 >> 10),
            })
        })
        .collect::<Result<Vec<Sample>>>()?;
    if let (Some(vm), Some(sample)) = (vms.first(), samples.first_mut()) {
        let asked_ns = monotonic_ns();
        let deadline = Instant::now() + START_TIMEOUT;
        let container = first_container::run(&vm.vm.paths.docker_socket(), deadline)?;
        sample.container_ms = Some(ms(container.first_byte_ns.saturating_sub(asked_ns)));
    }
    Ok(samples)
}

/// Boots a VM of `settings`, measures it, and removes it.
///
/// # Errors
/// When it does not boot, or cannot be measured.
pub fn cold(paths: &Paths, settings: &Settings, progress: &Progress) -> Result<Vec<Sample>> {
    let began_ns = begin();
    let deadline = Instant::now() + START_TIMEOUT;
    let vm = ThrowAway::boot(paths, "bench-cold", settings.clone(), deadline, progress)?;
    samples(began_ns, slice::from_ref(&vm))
}

/// Everything that was measured of one way to make VMs.
#[derive(Debug, Default)]
pub struct Series {
    what: String,
    samples: Vec<Sample>,
    saved: Vec<Saved>,
}

impl Series {
    /// Nothing yet of `what`.
    pub fn new(what: String) -> Self {
        Self {
            what,
            ..Self::default()
        }
    }

    /// Adds VMs that were made together.
    pub fn add(&mut self, samples: Vec<Sample>) {
        self.samples.extend(samples);
    }

    /// Adds what VMs were made from.
    pub fn saved(&mut self, saved: Saved) {
        self.saved.push(saved);
    }

    fn answers_ms(&self) -> Vec<f64> {
        self.samples.iter().map(|sample| sample.answer_ms).collect()
    }

    /// From the command to the first container's first byte, had it been run as soon as the engine answered.
    fn containers_ms(&self) -> Vec<f64> {
        let containers = self.samples.iter();
        containers
            .filter_map(|sample| Some(sample.answer_ms + sample.container_ms?))
            .collect()
    }
}

/// What is said of one way to make VMs.
#[derive(Debug, Serialize)]
struct Figures {
    what: String,
    /// How many were made.
    vms: usize,
    answer_ms: Percentiles,
    container_ms: Percentiles,
    /// How many times as long a boot takes to the engine's answer.
    answer_faster: Option<Ratio>,
    /// And to a first container.
    container_faster: Option<Ratio>,
    own_kib: Spread,
    disk_kib: Spread,
    /// `None` of VMs that booted.
    paused_ms: Option<Spread>,
    saved_kib: Option<Spread>,
}

impl Figures {
    fn new(series: &Series, cold: &Series) -> Result<Self> {
        let none = || Error::failure(format!("nothing was measured of {}", series.what));
        let samples = || series.samples.iter();
        let (answers, containers) = (series.answers_ms(), series.containers_ms());
        Ok(Self {
            what: series.what.clone(),
            vms: series.samples.len(),
            answer_faster: Ratio::across(&cold.answers_ms(), &answers),
            container_faster: Ratio::across(&cold.containers_ms(), &containers),
            answer_ms: Percentiles::of(answers).ok_or_else(none)?,
            container_ms: Percentiles::of(containers).ok_or_else(none)?,
            own_kib: Spread::of(samples().map(|sample| sample.own_kib as f64)).ok_or_else(none)?,
            disk_kib: Spread::of(samples().map(|sample| sample.disk_kib as f64)).ok_or_else(none)?,
            paused_ms: Spread::of(series.saved.iter().filter_map(|saved| Some(ms(saved.paused_ns?)))),
            saved_kib: Spread::of(series.saved.iter().map(|saved| (saved.bytes >> 10) as f64)),
        })
    }
}

/// All of it.
#[derive(Debug, Serialize)]
pub struct Report {
    cpus: u16,
    memory_mib: u64,
    runs: u32,
    cold: Figures,
    warm: Vec<Figures>,
    peer: Option<PeerFigures>,
}

impl Report {
    /// Of VMs of `settings`, made in `runs` rounds.
    ///
    /// # Errors
    /// When nothing was measured.
    pub fn new(settings: &Settings, runs: u32, cold: &Series, warm: &[Series]) -> Result<Self> {
        let warm: Result<Vec<Figures>> = warm.iter().map(|series| Figures::new(series, cold)).collect();
        Ok(Self {
            cpus: settings.cpus,
            memory_mib: settings.memory.mib(),
            runs,
            cold: Figures {
                answer_faster: None,
                container_faster: None,
                ..Figures::new(cold, cold)?
            },
            warm: warm?,
            peer: None,
        })
    }

    /// The same, with what was measured of a peer beside it.
    pub fn beside(self, peer: Option<PeerFigures>) -> Self {
        Self { peer, ..self }
    }

    /// For people.
    pub fn text(&self) -> String {
        let mut table = table::plain();
        table.set_header([
            "",
            "VMs",
            "answer p50 ms",
            "p99 ms",
            "times as fast",
            "container p50 ms",
            "p99 ms",
            "times as fast",
            "own memory MiB",
            "data disk MiB",
            "pause ms",
            "saved MiB",
        ]);
        for figures in std::iter::once(&self.cold).chain(&self.warm) {
            table.add_row(figures.row());
        }
        table::align_numbers(&mut table);
        format!(
            "{} vCPUs, {} MiB; {} runs. From the command to the engine's answer on each VM's socket, and to a first \
             container in one of them.\n\
             times as fast: as a cold start, all by all, the median; memory, disk, pause and what is saved: medians\n{table}\n{}",
            self.cpus,
            self.memory_mib,
            self.runs,
            self.peer.as_ref().map_or(String::new(), PeerFigures::text)
        )
    }
}

impl Figures {
    fn row(&self) -> [String; 12] {
        let ratio =
            |ratio: Option<Ratio>| ratio.map_or(String::new(), |ratio| format!("{:.1}", ratio.median));
        let mib = |kib: Spread| format!("{:.1}", kib.median / 1024.0);
        [
            self.what.clone(),
            self.vms.to_string(),
            format!("{:.0}", self.answer_ms.p50),
            format!("{:.0}", self.answer_ms.p99),
            ratio(self.answer_faster),
            format!("{:.0}", self.container_ms.p50),
            format!("{:.0}", self.container_ms.p99),
            ratio(self.container_faster),
            mib(self.own_kib),
            mib(self.disk_kib),
            self.paused_ms
                .map_or(String::new(), |paused| format!("{:.1}", paused.median)),
            self.saved_kib.map_or(String::new(), mib),
        ]
    }
}

fn ms(ns: u64) -> f64 {
    ns as f64 / 1e6
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::testing::settings;

    fn sample(answer_ms: f64, container_ms: Option<f64>) -> Sample {
        Sample {
            answer_ms,
            container_ms,
            own_kib: 10 << 10,
            disk_kib: 512,
        }
    }

    fn report() -> Report {
        let mut cold = Series::new("cold start".into());
        cold.add(vec![sample(900.0, Some(100.0))]);
        cold.add(vec![sample(1100.0, Some(100.0))]);
        let mut forks = Series::new("2 forks".into());
        forks.add(vec![sample(40.0, Some(10.0)), sample(60.0, None)]);
        forks.saved(Saved {
            paused_ns: Some(1_500_000),
            bytes: 20 << 20,
        });
        Report::new(&settings(1 << 30), 2, &cold, &[forks]).unwrap()
    }

    #[test]
    fn every_vm_answers_and_one_of_them_runs_a_container() {
        let report = report();
        let forks = &report.warm[0];
        assert_eq!((forks.vms, forks.answer_ms.p50), (2, 50.0));
        // After the answer of the one that ran it.
        assert_eq!(forks.container_ms.p50, 50.0);
        // 15, 18.33, 22.5 and 27.5.
        assert!((forks.answer_faster.unwrap().median - 20.417).abs() < 0.001);
        assert_eq!(forks.container_faster.unwrap().median, 22.0);
        assert_eq!(report.cold.answer_faster, None);
        assert_eq!((report.cold.vms, report.cold.paused_ms), (2, None));
    }

    #[test]
    fn the_text_has_a_row_for_each_way_and_none_without_a_measurement() {
        let report = report();
        let text = report.text();
        let row = |what: &str| {
            let line = text.lines().find(|line| line.trim_start().starts_with(what));
            let words: Vec<&str> = line.unwrap().split_whitespace().collect();
            words.join(" ")
        };
        assert_eq!(row("cold start"), "cold start 2 1000 1098 1100 1198 10.0 0.5");
        assert_eq!(
            row("2 forks"),
            "2 forks 2 50 60 20.4 50 50 22.0 10.0 0.5 1.5 20.0"
        );
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["warm"][0]["saved_kib"]["median"], 20480.0);
        let nothing = Series::new("nothing".into());
        let error = Report::new(&settings(1 << 30), 1, &nothing, &[]).unwrap_err();
        assert!(error.message.contains("nothing was measured"), "{error}");
    }
}
