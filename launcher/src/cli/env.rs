//! `lighter env`.

use super::{Json, Target};
use crate::autostart::Autostart;
use crate::client;
use crate::error::Result;
use crate::paths::Paths;
use crate::shell::quoted;
use crate::vm::Vm;
use clap::{Args, ValueEnum};
use std::collections::BTreeMap;
use std::path::Path;

/// Arguments.
#[derive(Debug, Args)]
pub struct Env {
    #[command(flatten)]
    target: Target,
    /// For which shell [default: that of SHELL]
    #[arg(long)]
    shell: Option<Shell>,
    #[command(flatten)]
    output: Json,
}

/// What Docker puts into every container, and Testcontainers looks for.
const IN_A_CONTAINER: &str = "/.dockerenv";

/// How a shell sets variables.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Shell {
    /// sh, bash, zsh
    Sh,
    /// fish
    Fish,
}

impl Shell {
    fn set(self, variable: &str, value: &str) -> String {
        match self {
            Self::Sh => format!("export {variable}={}\n", quoted(value)),
            Self::Fish => {
                let value = value.replace('\\', r"\\").replace('\'', r"\'");
                format!("set -gx {variable} '{value}';\n")
            }
        }
    }
}

impl Env {
    /// Prints it.
    ///
    /// # Errors
    /// When the VM is not running.
    pub fn run(self, paths: &Paths) -> Result<()> {
        let vm = Vm::load(paths, &self.target.name)?;
        // Where systemd listens, it is started when it is needed.
        if !Autostart::on_demand(&vm.paths) {
            client::running(&vm)?;
        }
        let mut variables = BTreeMap::from([("DOCKER_HOST", vm.paths.docker_host())]);
        // In a container, Testcontainers would look for published ports at the container's gateway; they are here.
        if Path::new(IN_A_CONTAINER).exists() {
            variables.insert("TESTCONTAINERS_HOST_OVERRIDE", "localhost".into());
            variables.insert("TESTCONTAINERS_CONNECTION_MODE", "docker_host".into());
        }
        if self.output.json {
            return super::print_json(&variables);
        }
        let of_user = || {
            let shell = std::env::var("SHELL").unwrap_or_default();
            if shell.ends_with("/fish") {
                Shell::Fish
            } else {
                Shell::Sh
            }
        };
        let name = &vm.name;
        let shell = self.shell.unwrap_or_else(of_user);
        let mut text: String = variables
            .iter()
            .map(|(variable, value)| shell.set(variable, value))
            .collect();
        text += &match shell {
            Shell::Sh => format!("# eval \"$(lighter env {name})\"\n"),
            Shell::Fish => format!("# lighter env {name} | source\n"),
        };
        super::print(&text)
    }
}
