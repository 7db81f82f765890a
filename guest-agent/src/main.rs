//! PID 1 of Lighter's guest.
//!
//! Two processes: PID 1 itself only reaps orphans and watches over its one child ([`init`]); the child is the agent
//! proper ([`agent`]), on one thread but for blocking work. The way of the start-up is told in [`agent::run`].
//!
//! Under the name `docker-proxy` the program is dockerd's proxy for a published port ([`proxy`]); run as a command in the
//! guest, it measures what `lighter bench api`, `fs` and `net` want to know ([`measure`]).

mod agent;
mod announce;
mod cgroup;
mod clock;
mod control;
mod daemon;
mod daemon_log;
mod disk;
mod docker_port;
mod engine;
mod exec;
mod ext4;
mod fd;
mod file_events;
mod frames;
mod identity;
mod idle;
mod init;
mod kernel_log;
mod log;
mod machine_id;
mod measure;
mod mounts;
mod names;
mod network;
mod notify;
mod outbox;
mod power;
mod power_button;
mod process;
mod proxy;
mod random_id;
mod random_ports;
mod root;
mod shares;
mod shutdown;
mod system;
mod timeline;

use std::{ffi::OsStr, io::Write, path::Path};

fn main() -> std::process::ExitCode {
    if std::process::id() == 1 {
        return init::main();
    }
    let mut words = std::env::args_os().map(|word| word.to_string_lossy().into_owned());
    let program = words.next().unwrap_or_default();
    if Path::new(&program).file_name() == Some(OsStr::new(proxy::NAME)) {
        return proxy::main(words);
    }
    let arguments: Vec<String> = words.collect();
    if let [verb, task] = arguments.as_slice()
        && verb == lighter_measure::task::VERB
    {
        return measure::main(task);
    }
    let refusal = "lighter-agent is the init of Lighter's guest; it does nothing when it is not PID 1";
    let _ = writeln!(std::io::stderr(), "{refusal}");
    std::process::ExitCode::from(2)
}
