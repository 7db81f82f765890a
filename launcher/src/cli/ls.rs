//! `lighter ls`.

use super::Json;
use super::status::Report;
use crate::error::{Error, Result, say};
use crate::paths::Paths;
use crate::table;
use crate::vm::{self, Vm, VmError};
use clap::Args;

/// Arguments.
#[derive(Debug, Args)]
pub struct Ls {
    /// Names only
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    output: Json,
}

impl Ls {
    /// Lists the VMs.
    ///
    /// # Errors
    /// When they cannot be read.
    pub fn run(self, paths: &Paths) -> Result<()> {
        let names = vm::list(paths)?;
        if self.quiet && !self.output.json {
            return super::print(&names.iter().map(|name| format!("{name}\n")).collect::<String>());
        }
        let mut reports = vec![];
        for name in names {
            match Vm::load(paths, &name) {
                Ok(vm) => reports.push(Report::of(&vm)?),
                // Removed since the list was made.
                Err(VmError::NoSuchVm(_)) => {}
                // One VM that cannot be read does not hide the others.
                Err(error) => say(Error::from(error)),
            }
        }
        if self.output.json {
            return super::print_json(&reports);
        }
        let mut table = table::plain();
        table.set_header(["NAME", "STATE", "CPUS", "MEMORY", "DISK", "DISK USED", "SOCKET"]);
        for report in reports {
            table.add_row([
                report.name.clone(),
                report.state(),
                report.cpus.to_string(),
                report.memory.human(),
                report.disk.human(),
                report.disk_used.map(crate::size::Size::human).unwrap_or_default(),
                report.docker_socket.clone(),
            ]);
        }
        super::print(&table::text(&table))
    }
}
