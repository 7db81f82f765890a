//! `lighter stats`.

use super::Json;
use crate::client;
use crate::error::{Code, Error, Result};
use crate::memory;
use crate::name::Name;
use crate::paths::Paths;
use crate::size::Size;
use crate::table;
use crate::vm::{self, Vm};
use clap::Args;
use lighter_protocol::agent::GuestMemory;
use lighter_protocol::supervisor::Phase;
use serde::Serialize;

/// Arguments.
#[derive(Debug, Args)]
pub struct Stats {
    /// Which VMs [default: all that run]
    names: Vec<Name>,
    #[command(flatten)]
    output: Json,
}

/// Both sides of one VM.
#[derive(Debug, Serialize)]
struct Row {
    name: String,
    /// What the guest was given, KiB.
    memory_kib: u64,
    /// What it did with it a few seconds ago; `None` until the agent has told.
    guest: Option<GuestMemory>,
    /// What monitor, supervisor and passt take of the host's memory, KiB: their own pages, and their part of what they share.
    host_memory_kib: u64,
    /// The data disk's length, bytes.
    disk_bytes: u64,
    /// What it takes on the host, bytes.
    host_disk_bytes: Option<u64>,
}

impl Row {
    /// Looks at a VM; `None` when it does not run.
    fn of(vm: &Vm) -> Result<Option<Self>> {
        let Some(status) = client::status(vm)?.filter(|status| status.phase != Phase::StandingBy) else {
            return Ok(None);
        };
        Ok(Some(Self {
            host_memory_kib: memory::of_vm_kib(&status)? + memory::of_network_kib(&status),
            name: status.name,
            memory_kib: status.memory_mib << 10,
            guest: status.memory,
            disk_bytes: vm.settings.disk.0,
            host_disk_bytes: vm.disk_used().map(|size| size.0),
        }))
    }

    fn cells(&self) -> [String; 5] {
        let kib = |kib: u64| Size(kib << 10).human();
        let guest = self.guest.map_or("-".into(), |guest| {
            format!(
                "{} of {}, {} of files",
                kib(guest.total_kib.saturating_sub(guest.available_kib)),
                kib(guest.total_kib),
                kib(guest.cache_kib)
            )
        });
        [
            self.name.clone(),
            guest,
            kib(self.host_memory_kib),
            self.host_disk_bytes
                .map_or("-".into(), |bytes| Size(bytes).human()),
            Size(self.disk_bytes).human(),
        ]
    }
}

impl Stats {
    /// Shows them.
    ///
    /// # Errors
    /// When a VM that was named does not run, or cannot be looked at.
    pub fn run(self, paths: &Paths) -> Result<()> {
        let mut rows = vec![];
        for name in &self.names {
            let vm = Vm::load(paths, name)?;
            rows.push(Row::of(&vm)?.ok_or_else(|| client::not_running(&vm))?);
        }
        if self.names.is_empty() {
            for name in vm::list(paths)? {
                let found = Vm::load(paths, &name)
                    .map_err(Error::from)
                    .and_then(|vm| Row::of(&vm));
                match found {
                    Ok(row) => rows.extend(row),
                    // Removed since the list was made.
                    Err(error) if error.code == Code::NoSuchVm => {}
                    Err(error) => return Err(error),
                }
            }
        }
        if self.output.json {
            return super::print_json(&rows);
        }
        let mut table = table::plain();
        table.set_header([
            "NAME",
            "GUEST MEMORY IN USE",
            "HOST MEMORY",
            "HOST DISK",
            "GUEST DISK",
        ]);
        for row in &rows {
            table.add_row(row.cells());
        }
        super::print(&table::text(&table))
    }
}
