//! `lighter`: a real Docker engine in a microVM, on a host socket.
//!
//! - [`cli`]: one file for each verb
//! - [`boot`], [`client`]: the CLI's way to a supervisor
//! - [`supervisor`]: the process beside each running VM
//! - [`throw_away`]: VMs for one command
//! - [`die_with_parent`]: processes that end with this one
//! - [`vm`], [`disk`], [`lock`], [`paths`], [`config`], [`logs`]: what lies on disk
//! - [`snapshots`]: VMs saved while they ran, and new ones from them
//! - [`name`], [`size`], [`network`], [`auto_suspend`], [`error`]: words the user types and reads
//! - [`bench`], [`doctor`]: looking closely at this host

mod auto_suspend;
mod bench;
mod boot;
mod cli;
mod client;
mod clock;
mod config;
mod die_with_parent;
mod disk;
mod docker_context;
mod doctor;
mod error;
mod lock;
mod logs;
mod memory;
mod mounts;
mod name;
mod network;
mod paths;
mod progress;
mod registry;
mod size;
mod snapshots;
mod supervisor;
mod table;
mod templates;
mod throw_away;
mod vm;

fn main() -> std::process::ExitCode {
    cli::main()
}
