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

/// A table; the column of ports that went elsewhere only where there are such.
fn text(ports: &[PublishedPort]) -> String {
    let mut table = table::plain();
    let moved = ports.iter().any(|port| port.instead_of.is_some());
    let columns = if moved { 3 } else { 2 };
    table.set_header(["HOST", "CONTAINER", "INSTEAD OF"].into_iter().take(columns));
    for port in ports {
        let row = [
            port.host.to_string(),
            format!("{}/{}", port.container, port.transport),
            port.instead_of
                .map_or(String::new(), |address| address.to_string()),
        ];
        table.add_row(row.into_iter().take(columns));
    }
    table::text(&table)
}

#[cfg(test)]
mod tests {
    use super::*;
    use lighter_protocol::publish::Transport;

    fn words(ports: &[PublishedPort]) -> Vec<Vec<String>> {
        let text = text(ports);
        let words = |line: &str| line.split_ascii_whitespace().map(str::to_owned).collect();
        text.lines().map(words).collect()
    }

    #[test]
    fn a_line_says_what_leads_where_and_what_it_stands_for() {
        let mut port = PublishedPort {
            host: "[::]:8080".parse().unwrap(),
            transport: Transport::Tcp,
            container: "172.17.0.2:80".parse().unwrap(),
            instead_of: None,
        };
        assert_eq!(
            words(std::slice::from_ref(&port)),
            [["HOST", "CONTAINER"], ["[::]:8080", "172.17.0.2:80/tcp"]]
        );
        port.instead_of = Some("[::]:80".parse().unwrap());
        assert_eq!(words(&[port])[1], ["[::]:8080", "172.17.0.2:80/tcp", "[::]:80"]);
    }
}
