//! Boots one after another: Lighter's, and after each those of other monitors.

use super::environment::Environment;
use super::once::Starter;
use super::page::PageFile;
use super::peer::Contender;
use super::phases::{ConsoleRun, Run};
use super::report::Report;
use super::system::{System, SystemRun};
use crate::boot::START_TIMEOUT;
use crate::cli::options::MachineOptions;
use crate::cli::{Json, print, print_json};
use crate::config::Config;
use crate::error::{Context, Error, Result};
use crate::paths::Paths;
use crate::progress::Progress;
use clap::Args;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::PathBuf;
use std::time::Instant;

/// What drops the host's file cache.
const DROP_CACHES: &str = "/proc/sys/vm/drop_caches";

/// Arguments.
#[derive(Debug, Args)]
pub struct Series {
    /// How many boots
    #[arg(short = 'n', long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    runs: u32,
    /// How many rounds before that are not counted: the first boot reads its files from the disk, later ones do not
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(0..=1000))]
    warmup: u32,
    /// Drop the host's file cache before each boot, so that each reads its files from the disk; needs root
    #[arg(long)]
    drop_caches: bool,
    /// Write a page with plots, too
    #[arg(long, value_name = "FILE.html")]
    report: Option<PathBuf>,
    /// The machine
    #[command(flatten)]
    pub options: MachineOptions,
    #[command(flatten)]
    output: Json,
}

/// What was checked before the first boot, which takes long.
#[derive(Debug)]
pub struct Ready {
    /// Host and guest.
    pub environment: Environment,
    page: Option<PageFile>,
    caches: Option<File>,
}

/// What was measured.
#[derive(Debug)]
pub struct Boots {
    /// Lighter's.
    pub lighter: Vec<Run>,
    /// Those of each contender.
    pub contenders: Vec<Vec<ConsoleRun>>,
    /// Those of the other system.
    pub system: Vec<SystemRun>,
}

impl Series {
    /// Checks what would fail later.
    ///
    /// # Errors
    /// When the page cannot be written, the caches cannot be dropped, or KVM cannot be probed.
    pub fn prepare(&self, paths: &Paths) -> Result<Ready> {
        let config = Config::load(&paths.config_file)?;
        let settings = self.options.settings(&config)?;
        let caches = self.drop_caches.then(open_drop_caches).transpose()?;
        Ok(Ready {
            page: self.report.as_deref().map(PageFile::create).transpose()?,
            environment: Environment::of(paths, &config, &settings, self.drop_caches)?,
            caches,
        })
    }

    /// Boots Lighter, each of `contenders` and `system` in turn. Call it from the main thread.
    ///
    /// # Errors
    /// When one does not boot.
    pub fn boot(&self, ready: &Ready, contenders: &[Contender], system: Option<&System>) -> Result<Boots> {
        let starter = Starter::new(&self.options)?;
        let progress = Progress::new(!self.output.json);
        let mut boots = Boots {
            lighter: vec![],
            contenders: vec![vec![]; contenders.len()],
            system: vec![],
        };
        for round in 0..self.warmup + self.runs {
            let name = match round.checked_sub(self.warmup) {
                None => "warm-up".into(),
                Some(number) => format!("boot {} of {}", number + 1, self.runs),
            };
            progress.say(&name);
            ready.drop_caches()?;
            let run = starter.boot()?;
            if round >= self.warmup {
                boots.lighter.push(run);
            }
            for (contender, runs) in contenders.iter().zip(&mut boots.contenders) {
                progress.say(&format!("{name}, {}", contender.name));
                ready.drop_caches()?;
                let (started_ns, milestones) = contender.boot(Instant::now() + START_TIMEOUT)?;
                if round >= self.warmup {
                    runs.push(ConsoleRun::new(started_ns, milestones));
                }
            }
            if let Some(system) = system {
                progress.say(&format!("{name}, {}", system.disk.display()));
                ready.drop_caches()?;
                let run = system.boot(Instant::now() + START_TIMEOUT)?;
                if round >= self.warmup {
                    boots.system.push(run);
                }
            }
        }
        Ok(boots)
    }

    /// Prints the report, and writes the page.
    ///
    /// # Errors
    /// When one cannot be written.
    pub fn tell(&self, report: &Report, ready: Ready) -> Result<()> {
        if let Some(page) = ready.page {
            page.write(report)?;
        }
        match self.output.json {
            true => print_json(&report.json()),
            false => print(&report.text()),
        }
    }
}

impl Ready {
    fn drop_caches(&self) -> Result<()> {
        let Some(mut file) = self.caches.as_ref() else {
            return Ok(());
        };
        // Pages that are not on the disk yet stay.
        rustix::fs::sync();
        // 3: file contents, and what is known of files.
        file.write_all(b"3")
            .context(|| format!("cannot drop the host's file cache ({DROP_CACHES})"))
    }
}

fn open_drop_caches() -> Result<File> {
    let failed = format!("cannot drop the host's file cache: {DROP_CACHES} does not open for writing");
    OpenOptions::new().write(true).open(DROP_CACHES).map_err(|error| {
        let told = Error::failure(format!("{failed}: {error}"));
        match error.kind() {
            io::ErrorKind::PermissionDenied => {
                told.hint("--drop-caches needs root: run the command as root, or leave the option out")
            }
            _ => told.hint("leave --drop-caches out"),
        }
    })
}
