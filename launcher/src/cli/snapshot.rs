//! `lighter snapshot`.

use super::{Json, print, print_json};
use crate::error::{Code, Context, Error, Result, say};
use crate::name::Name;
use crate::paths::Paths;
use crate::progress::Progress;
use crate::size::Size;
use crate::snapshots::base::Base;
use crate::snapshots::create;
use crate::snapshots::error::SnapshotError;
use crate::snapshots::manifest::Manifest;
use crate::snapshots::store::{self, Claim, FullName, Reference};
use crate::snapshots::transfer;
use crate::table;
use crate::vm::Vm;
use clap::{Args, Subcommand};
use serde::Serialize;
use std::fs::File;
use std::io::{self, BufReader, BufWriter, IsTerminal};
use std::path::{Path, PathBuf};

/// What to do with snapshots.
#[derive(Debug, Subcommand)]
pub enum Snapshot {
    /// Save a running VM, which goes on: memory, devices and data disk
    Create(Create),
    /// List snapshots
    #[command(alias = "list")]
    Ls(Ls),
    /// Show everything about a snapshot as JSON
    Inspect(Inspect),
    /// Remove snapshots; VMs that were started from them go on
    #[command(alias = "delete")]
    Rm(Rm),
    /// Write a snapshot into one file; it holds all of the VM's secrets
    Export(Export),
    /// Keep a snapshot that was exported; take only those of people whom you would give your shared folders to
    Import(Import),
}

/// Arguments.
#[derive(Debug, Args)]
pub struct Create {
    /// The VM
    vm: Name,
    /// The snapshot's name [default: the date and time]
    snapshot: Option<Name>,
    #[command(flatten)]
    output: Json,
}

/// Arguments.
#[derive(Debug, Args)]
pub struct Ls {
    /// Names only
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    output: Json,
}

/// Which snapshot.
#[derive(Debug, Args)]
pub struct Target {
    /// The snapshot; its VM's name may be left out when no other VM has one of that name
    #[arg(value_name = "[VM/]SNAPSHOT")]
    snapshot: Reference,
}

/// Arguments.
#[derive(Debug, Args)]
pub struct Inspect {
    #[command(flatten)]
    target: Target,
    /// Read all of it, and check it by its checksums
    #[arg(long)]
    verify: bool,
    // Its output is JSON anyway; with the option its errors are, too.
    #[command(flatten)]
    _output: Json,
}

/// Arguments.
#[derive(Debug, Args)]
pub struct Rm {
    /// The snapshots
    #[arg(required = true, value_name = "[VM/]SNAPSHOT")]
    snapshots: Vec<Reference>,
}

/// Arguments.
#[derive(Debug, Args)]
pub struct Export {
    #[command(flatten)]
    target: Target,
    /// The file, or - for standard output
    file: PathBuf,
}

/// Arguments.
#[derive(Debug, Args)]
pub struct Import {
    /// The file, or - for standard input
    file: PathBuf,
    /// What to call it [default: as it was called]
    #[arg(value_name = "VM/SNAPSHOT")]
    name: Option<FullName>,
}

/// A snapshot as `ls` and `inspect` show it.
#[derive(Debug, Serialize)]
struct Report {
    snapshot: String,
    folder: PathBuf,
    /// What its files take on the host.
    used_bytes: u64,
    manifest: Manifest,
}

impl Report {
    fn of(name: &FullName, base: Base) -> Self {
        Self {
            snapshot: name.to_string(),
            used_bytes: base.used(),
            folder: base.folder,
            manifest: base.manifest,
        }
    }
}

impl Snapshot {
    /// Does it.
    ///
    /// # Errors
    /// Why it is not done.
    pub fn run(self, paths: &Paths) -> Result<()> {
        match self {
            Self::Create(verb) => verb.run(paths),
            Self::Ls(verb) => verb.run(paths),
            Self::Inspect(verb) => verb.run(paths),
            Self::Rm(verb) => verb.run(paths),
            Self::Export(verb) => verb.run(paths),
            Self::Import(verb) => verb.run(paths),
        }
    }
}

impl Create {
    fn run(self, paths: &Paths) -> Result<()> {
        let vm = Vm::load(paths, &self.vm)?;
        let progress = Progress::new(!self.output.json);
        let name = match self.snapshot {
            Some(name) => name,
            None => now()?,
        };
        let full = FullName { vm: self.vm, name };
        progress.say(&format!("{full}: saving"));
        let snapshot = create::create(paths, &vm, &full.name)?;
        if self.output.json {
            return print_json(&serde_json::json!({
                "manifest": snapshot.manifest,
                "paused_ns": snapshot.paused_ns,
            }));
        }
        if progress.is_visible() {
            progress.note(&format!(
                "{full} is saved; the VM stood still for {:.0} ms",
                snapshot.paused_ns as f64 / 1e6
            ));
        }
        drop(progress);
        print(&format!("{full}\n"))
    }
}

/// `20260131-120000`, as a name.
fn now() -> Result<Name> {
    let text = crate::clock::rfc3339(crate::clock::unix_ms());
    let digits = text
        .get(..19)
        .unwrap_or(&text)
        .replace(['-', ':'], "")
        .replace('T', "-");
    digits
        .parse()
        .context(|| format!("cannot name a snapshot {digits:?}"))
}

impl Ls {
    fn run(self, paths: &Paths) -> Result<()> {
        store::sweep(paths);
        let names = store::list(paths)?;
        if self.quiet && !self.output.json {
            return print(&names.iter().map(|name| format!("{name}\n")).collect::<String>());
        }
        let mut reports = vec![];
        for name in names {
            match store::load(paths, &name) {
                Ok(base) => reports.push(Report::of(&name, base)),
                // Removed since the list was made.
                Err(SnapshotError::NoSuchSnapshot(_)) => {}
                // One that cannot be read does not hide the others.
                Err(error) => say(Error::from(error)),
            }
        }
        if self.output.json {
            return print_json(&reports);
        }
        let mut table = table::plain();
        table.set_header(["SNAPSHOT", "TAKEN", "CPUS", "MEMORY", "DISK", "USED"]);
        for report in reports {
            let Manifest {
                settings,
                taken_unix_ms,
                ..
            } = &report.manifest;
            table.add_row([
                report.snapshot.clone(),
                crate::clock::rfc3339(*taken_unix_ms),
                settings.cpus.to_string(),
                settings.memory.human(),
                settings.disk.human(),
                Size(report.used_bytes).human(),
            ]);
        }
        print(&table::text(&table))
    }
}

impl Target {
    fn load(&self, paths: &Paths) -> Result<(FullName, Base)> {
        let name = store::find(paths, &self.snapshot)?;
        let base = store::load(paths, &name)?;
        Ok((name, base))
    }
}

impl Inspect {
    fn run(self, paths: &Paths) -> Result<()> {
        let (name, base) = self.target.load(paths)?;
        if self.verify {
            base.verify()?;
        }
        print_json(&Report::of(&name, base))
    }
}

impl Rm {
    fn run(self, paths: &Paths) -> Result<()> {
        for snapshot in &self.snapshots {
            let name = store::find(paths, snapshot)?;
            Claim::take(paths, &name.vm)?.remove(&name.name)?;
        }
        Ok(())
    }
}

impl Export {
    fn run(self, paths: &Paths) -> Result<()> {
        let (name, base) = self.target.load(paths)?;
        base.check()?;
        let progress = Progress::new(true);
        progress.say(&format!("{name}: exporting"));
        let failed = || format!("cannot export {name} to {}", self.file.display());
        if is_standard(&self.file) {
            let out = io::stdout().lock();
            if out.is_terminal() {
                let error = "a snapshot is not for a terminal";
                return Err(Error::new(Code::Usage, error).hint("write it to a file, or into a pipe"));
            }
            return transfer::export(&base, &mut BufWriter::new(out)).context(failed);
        }
        let export = || {
            let folder = self.file.parent().filter(|folder| !folder.as_os_str().is_empty());
            // Readable by the user alone, which is right for a file that holds memory.
            let mut file = tempfile::NamedTempFile::new_in(folder.unwrap_or(Path::new(".")))?;
            transfer::export(&base, &mut BufWriter::new(&mut file))?;
            file.as_file().sync_all()?;
            file.persist(&self.file)?;
            Ok::<_, io::Error>(())
        };
        export().context(failed)
    }
}

impl Import {
    fn run(self, paths: &Paths) -> Result<()> {
        let progress = Progress::new(true);
        progress.say(&format!("importing {}", self.file.display()));
        let (name, lacks) = if is_standard(&self.file) {
            transfer::import(paths, &self.file, &mut io::stdin().lock(), self.name)?
        } else {
            let failed = |error| SnapshotError::Read(self.file.clone(), error);
            let file = File::open(&self.file).map_err(failed)?;
            transfer::import(paths, &self.file, &mut BufReader::new(file), self.name)?
        };
        if let Some(lacks) = lacks {
            let error = Error::from(lacks);
            progress.note(&format!("{name} cannot be started here yet: {}", error.message));
        }
        drop(progress);
        print(&format!("{name}\n"))
    }
}

fn is_standard(file: &Path) -> bool {
    file == Path::new("-")
}
