//! `lighter env`.

use super::{Json, Target};
use crate::client;
use crate::error::Result;
use crate::paths::Paths;
use crate::vm::Vm;
use clap::{Args, ValueEnum};

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

/// How a shell sets variables.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Shell {
    /// sh, bash, zsh
    Sh,
    /// fish
    Fish,
}

impl Env {
    /// Prints it.
    ///
    /// # Errors
    /// When the VM is not running.
    pub fn run(self, paths: &Paths) -> Result<()> {
        let vm = Vm::load(paths, &self.target.name)?;
        client::running(&vm)?;
        let value = format!("unix://{}", vm.paths.docker_socket().display());
        if self.output.json {
            return super::print_json(&serde_json::json!({ "DOCKER_HOST": value }));
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
        super::print(&match self.shell.unwrap_or_else(of_user) {
            Shell::Sh => {
                let value = value.replace('\'', r"'\''");
                format!("export DOCKER_HOST='{value}'\n# eval \"$(lighter env {name})\"\n")
            }
            Shell::Fish => {
                let value = value.replace('\\', r"\\").replace('\'', r"\'");
                format!("set -gx DOCKER_HOST '{value}';\n# lighter env {name} | source\n")
            }
        })
    }
}
