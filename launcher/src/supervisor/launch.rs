//! The life of a supervisor: what it begins with, its sockets, and what is left when its VM is over.

use super::ports::Ports;
use super::service::Service;
use super::snapshot::Snapshots;
use super::state::State;
use super::usage::Usage;
use super::{FAREWELL, Lasting, control, docker, failed, machine, standby, starter};
use crate::boot::Begin;
use crate::error::{Context, Error, Result, say};
use crate::lock::{self, Lock};
use crate::name::Name;
use crate::paths::Paths;
use crate::snapshots::store;
use crate::vm::Vm;
use lighter_protocol::causes::chain;
use lighter_protocol::supervisor::End;
use std::os::unix::net;
use tokio::net::UnixListener;
use tokio::sync::mpsc;
use tokio::time::timeout;

/// How a supervisor begins.
#[derive(Debug)]
pub struct Launch<'a> {
    /// How its VM does.
    pub begin: Begin<'a>,
    /// The command that has asked for it.
    pub starter: Option<net::UnixStream>,
    /// What it has besides when systemd has started it.
    pub service: Option<Service>,
}

/// How a VM was.
#[derive(Clone, Debug)]
pub struct Life {
    /// Why it is over.
    pub end: End,
    /// Whether its engine has answered.
    pub was_ready: bool,
}

/// Runs the supervisor of the VM `name`, until the VM is over.
///
/// # Errors
/// When it could not even begin; what happens to the VM is told to the watchers.
pub fn run(paths: &Paths, name: &Name, launch: Launch<'_>) -> Result<Life> {
    let started_ns = crate::clock::monotonic_ns();
    // It fails for a process that leads a group: then a service manager started it, and there is no terminal to leave.
    let _ = rustix::process::setsid();
    // Whoever started this process has seen to it that nobody else holds the lock for long.
    let vm = Vm::load(paths, name)?;
    let lock = Lock::acquire(&vm.paths.life_lock())?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context(|| "cannot start the runtime".into())?;
    raise_descriptor_limit();
    let life = runtime.block_on(supervise(paths, &vm, launch, started_ns));
    runtime.shutdown_background();
    drop(lock);
    Ok(life)
}

async fn supervise(paths: &Paths, vm: &Vm, launch: Launch<'_>, started_ns: u64) -> Life {
    let Launch {
        begin,
        starter,
        service,
    } = launch;
    // How the VM ended before says nothing about this life, however it ends.
    if let Err(error) = vm.forget_end() {
        let _ = std::fs::remove_file(vm.paths.end());
        say(format_args!("lighter: {}", chain(&error)));
    }
    let lasting = Lasting {
        state: State::new(vm, started_ns),
        ports: Ports::default(),
        snapshots: Snapshots::new(vm),
        usage: Usage::new(),
        suspends_after: vm.settings.suspends_after(),
    };
    let state = &lasting.state;
    let demands = mpsc::channel(16);
    let mut farewells = vec![];
    let (mut edit, mut engine) = (None, None);
    if let Some(service) = service {
        farewells.push(tokio::spawn(service.notifier.follow(state.clone())));
        (edit, engine) = (Some(service.edit), service.engine);
    }
    // In this order: whoever hears from this process finds its sockets.
    let result = sockets(paths, vm, engine).map(|(control, docker)| {
        let serving = control::serve(control, lasting.clone(), demands.0.clone());
        farewells.push(tokio::spawn(serving));
        tokio::spawn(docker::serve(
            docker,
            vm.paths.vsock_socket(),
            state.clone(),
            lasting.usage.clone(),
        ));
    });
    drop(edit.take());
    if let Some(starter) = starter.and_then(starter::watched) {
        let watch = starter::watch(starter, state.clone(), vm.settings.throw_away, demands.0.clone());
        farewells.push(tokio::spawn(watch));
    }
    let end = match result {
        Ok(()) => standby::live(paths, vm, begin, &lasting, demands).await,
        Err(error) => failed(error),
    };
    if vm.settings.throw_away {
        if let Err(error) = vm.clone().remove() {
            say(format_args!("lighter: {}", chain(&error)));
        }
        // Its starter may be gone, and nobody needs it any more.
        lock::sweep(&vm.paths.edit_lock);
        // Its starter may have been forking it.
        store::sweep(paths);
    } else {
        vm.remove_runtime();
        if let Err(error) = vm.save_end(&end) {
            say(format_args!("lighter: {}", chain(&error)));
        }
    }
    let was_ready = state.watch().borrow().timeline.engine_ready_ns.is_some();
    state.ended(end.clone());
    let _ = timeout(FAREWELL, async {
        for farewell in farewells {
            let _ = farewell.await;
        }
    })
    .await;
    Life { end, was_ready }
}

/// Listens on the control socket and the engine's, which may be there already.
fn sockets(
    paths: &Paths,
    vm: &Vm,
    engine: Option<net::UnixListener>,
) -> Result<(UnixListener, UnixListener)> {
    paths.create_runtime(&vm.paths).map_err(Error::from)?;
    let control = machine::listen(&vm.paths.control_socket())?;
    let docker = engine.map_or_else(|| machine::listen(&vm.paths.docker_socket()), Ok)?;
    Ok((
        listener_of(control, "control.sock")?,
        listener_of(docker, "docker.sock")?,
    ))
}

fn listener_of(listener: net::UnixListener, what: &str) -> Result<UnixListener> {
    listener
        .set_nonblocking(true)
        .and_then(|()| UnixListener::from_std(listener))
        .context(|| format!("cannot watch {what}"))
}

/// Every client of the engine needs two descriptors here and one in the monitor, which inherits the limit.
fn raise_descriptor_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        ..limit
    };
    let _ = setrlimit(Resource::Nofile, raised);
}
