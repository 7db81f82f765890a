//! `lighter create`.

use super::Target;
use super::options::MachineOptions;
use crate::config::Config;
use crate::disk::DiskSource;
use crate::error::Result;
use crate::lock::Lock;
use crate::paths::Paths;
use crate::vm::Vm;
use clap::Args;

/// Arguments.
#[derive(Debug, Args)]
pub struct Create {
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    options: MachineOptions,
}

impl Create {
    /// Makes the VM.
    ///
    /// # Errors
    /// When it exists, or cannot be made.
    pub fn run(self, paths: &Paths) -> Result<()> {
        let settings = self.options.settings(&Config::load(&paths.config_file)?)?;
        let vm = paths.vm(&self.target.name);
        vm.check_socket_paths()?;
        paths.create_vms()?;
        let _edit = Lock::acquire(&vm.edit_lock)?;
        Vm::create(paths, &self.target.name, settings, DiskSource::New)?;
        Ok(())
    }
}
