//! `lighter ports`.

use super::{Json, Target};
use crate::client;
use crate::error::Result;
use crate::paths::Paths;
use crate::table;
use crate::vm::Vm;
use clap::Args;
use lighter_protocol::publish::PublishedPort;

/// Arguments.
#[derive(Debug, Args)]
pub struct Ports {
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    output: Json,
}

impl Ports {
    /// Lists the published ports.
    ///
    /// # Errors
    /// When the VM is not running.
    pub fn run(self, paths: &Paths) -> Result<()> {
        let vm = Vm::load(paths, &self.target.name)?;
        let ports = client::ports(&vm)?.ok_or_else(|| client::not_running(&vm))?;
        if self.output.json {
            super::print_json(&ports)
        } else {
            super::print(&text(&ports))
        }
    }
}

fn text(ports: &[PublishedPort]) -> String {
    let mut table = table::plain();
    table.set_header(["HOST", "CONTAINER"]);
    for port in ports {
        table.add_row([
            port.host.to_string(),
            format!("{}/{}", port.container, port.transport),
        ]);
    }
    table::text(&table)
}

#[cfg(test)]
mod tests {
    use super::*;
    use lighter_protocol::publish::Transport;

    #[test]
    fn a_line_says_what_leads_where() {
        let port = PublishedPort {
            host: "[::]:8080".parse().unwrap(),
            transport: Transport::Tcp,
            container: "172.17.0.2:80".parse().unwrap(),
        };
        let text = text(&[port]);
        let words: Vec<Vec<_>> = text
            .lines()
            .map(|line| line.split_ascii_whitespace().collect())
            .collect();
        assert_eq!(words, [["HOST", "CONTAINER"], ["[::]:8080", "172.17.0.2:80/tcp"]]);
    }
}
