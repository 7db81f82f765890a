//! `lighter inspect`.

use super::status::Report;
use super::{Json, Target};
use crate::config::Config;
use crate::error::Result;
use crate::logs::Source;
use crate::mounts::Mount;
use crate::network::Network;
use crate::paths::Paths;
use crate::supervisor::machine::artifact_paths;
use crate::vm::{Settings, Vm};
use clap::{Args, ValueEnum};
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::PathBuf;

/// Arguments.
#[derive(Debug, Args)]
pub struct Inspect {
    #[command(flatten)]
    target: Target,
    // Its output is JSON anyway; with the option its errors are, too.
    #[command(flatten)]
    _output: Json,
}

#[derive(Serialize)]
struct Everything {
    #[serde(flatten)]
    report: Report,
    settings: Settings,
    /// How the guest reaches the network from the next start on.
    network: Network,
    /// The host folders that the guest sees from the next start on.
    mounts: Vec<Mount>,
    files: BTreeMap<&'static str, PathBuf>,
    logs: BTreeMap<&'static str, PathBuf>,
}

impl Inspect {
    /// Shows it.
    ///
    /// # Errors
    /// When there is no such VM.
    pub fn run(self, paths: &Paths) -> Result<()> {
        let vm = Vm::load(paths, &self.target.name)?;
        let config = Config::load(&paths.config_file)?;
        let [kernel, image] = artifact_paths(paths, &vm.settings.kernel, &vm.settings.image, &config);
        let files = BTreeMap::from([
            ("settings", vm.paths.settings()),
            ("data_disk", vm.paths.disk()),
            ("kernel", kernel),
            ("image", image),
            ("docker_socket", vm.paths.docker_socket()),
            ("control_socket", vm.paths.control_socket()),
            ("monitor_socket", vm.paths.monitor_socket()),
            ("vsock_socket", vm.paths.vsock_socket()),
        ]);
        let logs = Source::value_variants().iter();
        super::print_json(&Everything {
            report: Report::of(&vm)?,
            files,
            logs: logs
                .map(|&source| (source.file_name(), vm.paths.log(source)))
                .collect(),
            network: vm.settings.network.clone(),
            mounts: vm.settings.mounts(),
            settings: vm.settings,
        })
    }
}
