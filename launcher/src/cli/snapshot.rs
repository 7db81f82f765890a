//! `lighter snapshot`.

use super::{Json, print, print_json};
use crate::error::{Context, Result};
use crate::name::Name;
use crate::paths::Paths;
use crate::progress::Progress;
use crate::snapshots::create;
use crate::snapshots::store::FullName;
use crate::vm::Vm;
use clap::{Args, Subcommand};

/// What to do with snapshots.
#[derive(Debug, Subcommand)]
pub enum Snapshot {
    /// Save a running VM, which goes on: memory, devices and data disk
    Create(Create),
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

impl Snapshot {
    /// Does it.
    ///
    /// # Errors
    /// Why it is not done.
    pub fn run(self, paths: &Paths) -> Result<()> {
        match self {
            Self::Create(verb) => verb.run(paths),
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
