//! `lighter template`.

use super::{Json, print, print_json};
use crate::error::{Code, Error, Result, say};
use crate::name::Name;
use crate::paths::Paths;
use crate::size::Size;
use crate::snapshots::base::Base;
use crate::snapshots::manifest::Manifest;
use crate::table;
use crate::templates::store;
use clap::{Args, Subcommand};
use serde::Serialize;
use std::path::PathBuf;

/// What to do with templates.
#[derive(Debug, Subcommand)]
pub enum Template {
    /// List the templates that new VMs start from
    #[command(alias = "list")]
    Ls(Ls),
    /// Remove templates; VMs that were started from them go on
    #[command(alias = "delete")]
    Rm(Rm),
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

/// Arguments.
#[derive(Debug, Args)]
pub struct Rm {
    /// The templates
    #[arg(required_unless_present = "all", value_name = "TEMPLATE")]
    templates: Vec<Name>,
    /// All of them
    #[arg(long, conflicts_with = "templates")]
    all: bool,
    #[command(flatten)]
    output: Json,
}

/// A template as `ls` shows it.
#[derive(Debug, Serialize)]
struct Report {
    template: Name,
    folder: PathBuf,
    /// What its files take on the host.
    used_bytes: u64,
    /// When a VM was last started from it, or it was made: milliseconds since 1970.
    used_unix_ms: u64,
    /// Whether its kernel and image are there still.
    current: bool,
    manifest: Manifest,
}

impl Template {
    /// Does it.
    ///
    /// # Errors
    /// Why it is not done.
    pub fn run(self, paths: &Paths) -> Result<()> {
        match self {
            Self::Ls(verb) => verb.run(paths),
            Self::Rm(verb) => verb.run(paths),
        }
    }
}

impl Ls {
    fn run(self, paths: &Paths) -> Result<()> {
        let names = store::list(paths)?;
        if self.quiet && !self.output.json {
            return print(&names.iter().map(|name| format!("{name}\n")).collect::<String>());
        }
        let mut reports = vec![];
        for template in names {
            let folder = store::folder(paths, &template);
            match Base::load(&folder) {
                Ok(base) => reports.push(Report {
                    used_bytes: base.used(),
                    used_unix_ms: store::used_unix_ms(&folder),
                    current: store::is_current(&base),
                    template,
                    folder,
                    manifest: base.manifest,
                }),
                // Removed since the list was made.
                Err(_) if !folder.exists() => {}
                // One that cannot be read does not hide the others.
                Err(error) => {
                    say(Error::of(Code::Failure, &error).hint(format!("lighter template rm {template}")))
                }
            }
        }
        if self.output.json {
            return print_json(&reports);
        }
        let mut table = table::plain();
        table.set_header([
            "TEMPLATE",
            "MADE",
            "LAST USED",
            "CPUS",
            "MEMORY",
            "DISK",
            "NETWORK",
            "USED",
            "",
        ]);
        for report in reports {
            let Manifest {
                settings,
                taken_unix_ms,
                network,
                ..
            } = &report.manifest;
            table.add_row([
                report.template.to_string(),
                crate::clock::rfc3339(*taken_unix_ms),
                crate::clock::rfc3339(report.used_unix_ms),
                settings.cpus.to_string(),
                settings.memory.human(),
                settings.disk.human(),
                if *network { "yes" } else { "no" }.into(),
                Size(report.used_bytes).human(),
                if report.current {
                    ""
                } else {
                    "of another kernel or image"
                }
                .into(),
            ]);
        }
        print(&table::text(&table))
    }
}

impl Rm {
    fn run(self, paths: &Paths) -> Result<()> {
        let names = match self.all {
            true => store::list(paths)?,
            false => self.templates,
        };
        for name in &names {
            if !store::folder(paths, name).exists() {
                return Err(Error::failure(format!("there is no template {name}"))
                    .hint("lighter template ls shows the templates there are"));
            }
            store::remove(paths, name)?;
        }
        match self.output.json {
            true => print_json(&serde_json::json!({ "removed": names })),
            false => Ok(()),
        }
    }
}
