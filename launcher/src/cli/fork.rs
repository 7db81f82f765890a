//! `lighter fork`.

use super::start::{Following, Ready, Started, change_context};
use super::{print, print_json};
use crate::docker_context::Contexts;
use crate::error::{Code, Error, Result, say};
use crate::name::Name;
use crate::paths::Paths;
use crate::snapshots::fork::{self, Fork as Snapshot};
use crate::snapshots::restore::Lives;
use crate::vm::Vm;
use clap::Args;
use std::time::Instant;

/// The most new VMs at once.
pub const MOST: u16 = 256;

/// Arguments.
#[derive(Debug, Args)]
pub struct Fork {
    /// The running VM
    vm: Name,
    /// How many new VMs
    #[arg(short = 'n', long = "number", value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=i64::from(MOST)))]
    number: u16,
    /// They are named PREFIX-1, PREFIX-2 and so on [default: the VM's name]
    #[arg(long = "as", value_name = "PREFIX")]
    prefix: Option<Name>,
    #[command(flatten)]
    following: Following,
}

impl Fork {
    /// Makes the VMs and waits for their engines.
    ///
    /// # Errors
    /// Why not all of them run.
    pub fn run(self, paths: &Paths) -> Result<()> {
        let deadline = self.following.wait.deadline();
        let began = Instant::now();
        let progress = self.following.progress();
        let source = Vm::load(paths, &self.vm)?;
        let names = names(self.prefix.as_ref().unwrap_or(&self.vm), self.number)?;
        progress.say(&format!("{}: saving", self.vm));
        let claim = fork::prepare(paths, &source, &names)?;
        let snapshot = Snapshot::of(&source, &claim)?;
        let started = snapshot.start(paths, &names, Lives::On, deadline);
        let mut failures = vec![];
        let mut ready = vec![];
        for started in started {
            let ended = started.and_then(|fork| fork.follow(deadline, &progress));
            match ended {
                Ok((vm, status, answered_ns)) => ready.push(Ready {
                    vm,
                    status,
                    answered_ns,
                    took: began.elapsed(),
                }),
                Err(error) => failures.push(error),
            }
        }
        let paused_ns = snapshot.paused_ns;
        drop(snapshot);
        if self.following.context.wanted(paths)? {
            for ready in &ready {
                change_context(paths, &ready.vm, Contexts::add, &progress);
            }
        }
        if self.following.output.json {
            let forks: Vec<Started<'_>> = ready.iter().map(Ready::started).collect();
            print_json(&serde_json::json!({ "forks": forks, "paused_ns": paused_ns }))?;
        } else {
            if progress.is_visible() {
                progress.note(&format!(
                    "{} VMs are ready after {:.1} s; {} stood still for {:.0} ms",
                    ready.len(),
                    began.elapsed().as_secs_f64(),
                    self.vm,
                    paused_ns as f64 / 1e6
                ));
            }
            drop(progress);
            print(
                &ready
                    .iter()
                    .map(|ready| format!("{}\n", ready.vm.name))
                    .collect::<String>(),
            )?;
        }
        let Some(last) = failures.pop() else {
            return Ok(());
        };
        for failure in failures {
            say(failure);
        }
        Err(last)
    }
}

/// The names of `number` new VMs.
///
/// # Errors
/// When they would be too long.
pub fn names(prefix: &Name, number: u16) -> Result<Vec<Name>> {
    let name = |number| {
        let name = format!("{prefix}-{number}");
        name.parse()
            .map_err(|error| Error::of(Code::Usage, &error).hint("choose a shorter prefix with --as"))
    };
    (1..=number).map(name).collect()
}
