//! The command line: one file for each verb.

mod autostart;
mod config;
mod create;
mod env;
pub mod exec;
pub mod fork;
mod inspect;
mod logs;
mod ls;
pub mod options;
pub mod ports;
mod restore;
mod rm;
mod run;
mod snapshot;
mod start;
mod stats;
mod status;
mod stop;
mod suspend;
mod template;

use crate::boot::Begin;
use crate::error::{Code, Error, Result, say};
use crate::name::Name;
use crate::paths::Paths;
use crate::supervisor::launch::{self, Launch};
use crate::supervisor::{service, starter};
use clap::{Args, CommandFactory, Parser, Subcommand};
use std::path::PathBuf;
use std::process::ExitCode;

/// A real Docker engine in a microVM, on a host socket.
///
/// `lighter start` boots a VM whose engine answers on a Unix socket; `eval "$(lighter env)"` points the docker CLI to it.
#[derive(Debug, Parser)]
#[command(name = "lighter", version, max_term_width = 110)]
#[command(
    after_help = "Exit codes: 0 done, 1 failure, 2 usage, 3 not running, 4 no such VM, 124 time-out. exec, shell and run \
                  return the command's own, and 125 to 127 as docker does.\n\nFiles: see LIGHTER_HOME and the XDG folders in \
                  the manual."
)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Make a VM without starting it
    Create(create::Create),
    /// Start a VM, making it if there is none, and wait until its engine answers
    Start(start::Start),
    /// Shut a VM down
    Stop(stop::Stop),
    /// Stop a VM if it runs, and start it
    Restart(stop::Restart),
    /// Save a running VM to the disk and end it: nothing of it is left running, and it goes on where it stood
    Suspend(suspend::Suspend),
    /// Go on with a suspended VM
    Resume(suspend::Resume),
    /// Remove a VM with its data, but not its snapshots
    #[command(alias = "delete")]
    Rm(rm::Rm),
    /// List VMs
    #[command(alias = "list")]
    Ls(ls::Ls),
    /// Show what a VM is doing
    Status(status::Show),
    /// Show what VMs use, and what they cost the host
    Stats(stats::Stats),
    /// Show everything about a VM as JSON
    Inspect(inspect::Inspect),
    /// Run a command in a VM, outside of containers
    Exec(exec::Exec),
    /// Open a shell in a VM, outside of containers
    #[command(alias = "ssh")]
    Shell(exec::Shell),
    /// Show a VM's logs
    Logs(logs::Logs),
    /// List a VM's published ports
    Ports(ports::Ports),
    /// Save running VMs, and look after what was saved
    #[command(subcommand)]
    Snapshot(snapshot::Snapshot),
    /// Look after the templates that new VMs start from
    #[command(subcommand)]
    Template(template::Template),
    /// Make a VM that goes on where a snapshot's stood
    Restore(restore::Restore),
    /// Make new VMs that go on where a running one stands, which goes on, too
    Fork(fork::Fork),
    /// Print what points the docker CLI to a VM's engine
    Env(env::Env),
    /// Run a host command with an engine of its own, which is thrown away after it
    Run(run::Run),
    /// Have systemd start VMs with your session, or when their engines' sockets are used
    #[command(subcommand)]
    Autostart(autostart::Verb),
    /// Show and change the configuration
    #[command(subcommand)]
    Config(config::Verb),
    /// Check whether this host can run VMs
    #[command(alias = "diagnose")]
    Doctor(crate::doctor::Doctor),
    /// Measure
    #[command(subcommand)]
    Bench(crate::bench::Bench),
    /// Print a shell's completion script
    Completion {
        /// Which shell
        shell: clap_complete::Shell,
    },
    /// Print the version
    Version(Json),
    /// Stand by a running VM
    #[command(hide = true)]
    Supervise {
        /// The VM
        name: Name,
        /// Go on from the snapshot in this folder
        #[arg(long)]
        from: Option<PathBuf>,
        /// Leave a template behind
        #[arg(long, conflicts_with = "from")]
        template: bool,
        /// For systemd
        #[arg(long, conflicts_with_all = ["from", "template"])]
        service: bool,
    },
}

/// Which VM.
#[derive(Debug, Args)]
pub struct Target {
    /// The VM's name
    #[arg(default_value = "default")]
    pub name: Name,
}

/// How to print.
#[derive(Debug, Args)]
pub struct Json {
    /// Print JSON; errors too, on standard error
    #[arg(long)]
    pub json: bool,
}

/// Runs the program.
pub fn main() -> ExitCode {
    let json_errors = std::env::args_os()
        .skip(1)
        .take_while(|argument| argument != "--")
        .any(|argument| argument == "--json");
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) if json_errors && error.use_stderr() => {
            return report(&usage_error(&error), true);
        }
        Err(error) => error.exit(),
    };
    match Paths::from_environment()
        .map_err(Error::from)
        .and_then(|paths| dispatch(cli.verb, &paths))
    {
        Ok(code) => ExitCode::from(code),
        Err(error) => report(&error, json_errors),
    }
}

fn dispatch(verb: Verb, paths: &Paths) -> Result<u8> {
    match verb {
        Verb::Create(verb) => verb.run(paths).map(|()| 0),
        Verb::Start(verb) => verb.run(paths).map(|()| 0),
        Verb::Stop(verb) => verb.run(paths).map(|()| 0),
        Verb::Restart(verb) => verb.run(paths).map(|()| 0),
        Verb::Suspend(verb) => verb.run(paths).map(|()| 0),
        Verb::Resume(verb) => verb.run(paths).map(|()| 0),
        Verb::Rm(verb) => verb.run(paths).map(|()| 0),
        Verb::Ls(verb) => verb.run(paths).map(|()| 0),
        Verb::Status(verb) => verb.run(paths),
        Verb::Stats(verb) => verb.run(paths).map(|()| 0),
        Verb::Inspect(verb) => verb.run(paths).map(|()| 0),
        Verb::Exec(verb) => verb.run(paths),
        Verb::Shell(verb) => verb.run(paths),
        Verb::Logs(verb) => verb.run(paths).map(|()| 0),
        Verb::Ports(verb) => verb.run(paths).map(|()| 0),
        Verb::Snapshot(verb) => verb.run(paths).map(|()| 0),
        Verb::Template(verb) => verb.run(paths).map(|()| 0),
        Verb::Restore(verb) => verb.run(paths).map(|()| 0),
        Verb::Fork(verb) => verb.run(paths).map(|()| 0),
        Verb::Env(verb) => verb.run(paths).map(|()| 0),
        Verb::Run(verb) => verb.run(paths),
        Verb::Autostart(verb) => verb.run(paths).map(|()| 0),
        Verb::Config(verb) => verb.run(paths).map(|()| 0),
        Verb::Doctor(verb) => verb.run(paths),
        Verb::Bench(verb) => verb.run(paths).map(|()| 0),
        Verb::Completion { shell } => {
            let mut script = vec![];
            clap_complete::generate(shell, &mut Cli::command(), "lighter", &mut script);
            print(&String::from_utf8_lossy(&script)).map(|()| 0)
        }
        Verb::Version(Json { json }) => {
            let version = env!("CARGO_PKG_VERSION");
            let text = match json {
                true => print_json(&serde_json::json!({ "version": version })),
                false => print(&format!("lighter {version}\n")),
            };
            text.map(|()| 0)
        }
        Verb::Supervise {
            name, service: true, ..
        } => service::serve(paths, &name).map(|()| 0),
        Verb::Supervise {
            name, from, template, ..
        } => {
            let begin = match (&from, template) {
                (Some(folder), _) => Begin::From(folder),
                (None, true) => Begin::BootForTemplate,
                (None, false) => Begin::Boot,
            };
            let starter = starter::find();
            let service = None;
            let launch = Launch {
                begin,
                starter,
                service,
            };
            launch::run(paths, &name, launch).map(|_| 0)
        }
    }
}

fn report(error: &Error, json: bool) -> ExitCode {
    if json {
        say(error.json());
    } else {
        say(error);
    }
    ExitCode::from(error.code.number())
}

fn usage_error(error: &clap::Error) -> Error {
    let text = error.render().to_string();
    let text = text.trim_start_matches("error: ");
    let (message, _) = text.split_once("\n\n").unwrap_or((text, ""));
    Error::new(Code::Usage, message.trim().replace('\n', " ")).hint("lighter --help")
}

/// Writes to standard output. A reader that went away is no error.
///
/// # Errors
/// When it cannot be written to.
pub fn print(text: &str) -> Result<()> {
    use std::io::Write;
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(Error::failure(format!(
            "cannot write to standard output: {error}"
        ))),
        _ => Ok(()),
    }
}

/// Writes JSON to standard output.
///
/// # Errors
/// When it cannot be written to.
pub fn print_json(value: &impl serde::Serialize) -> Result<()> {
    let json = serde_json::to_string_pretty(value);
    print(&(json.map_err(|error| Error::failure(format!("cannot write JSON: {error}")))? + "\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
