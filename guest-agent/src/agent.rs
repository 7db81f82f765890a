//! The agent proper: what happens when, from the first instruction to the power-off.
//!
//! ```text
//!  listen on vsock ── connect to the supervisor (all the while, in the background)
//!  mounts, shares ──┬── data disk ────────────────────┬── containerd + dockerd, side by side ── serve until told to stop
//!                   └── cgroups, sysctls, network ────┘
//! ```

use std::{io, path::Path, process::ExitCode, sync::Arc, time::Duration};

use lighter_protocol::{
    agent::EngineState,
    causes::chain,
    ports::{GUEST_DOCKER, GUEST_EXEC},
};
use nix::sys::socket::Backlog;
use tokio::{
    sync::{Notify, mpsc, watch},
    task::spawn_blocking,
    time::sleep,
};
use tokio_vsock::{VMADDR_CID_ANY, VsockAddr, VsockListener, VsockStream};

use crate::{
    announce, cgroup, clock,
    control::Control,
    disk, docker_port,
    engine::{Engine, State},
    exec,
    file_events::FileEvents,
    idle, kernel_log,
    log::Log,
    machine_id, measure, mounts, names, network,
    outbox::Outbox,
    power, power_button, random_ports, shares, shutdown, system,
    timeline::{self, Running},
};

/// After a failed accept, which is for want of memory or descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Runs the agent. Returns only when it cannot go on, which PID 1 answers with a power-off.
pub fn main() -> ExitCode {
    let began_ns = timeline::now_ns();
    // The stack of the one blocking thread at a time is small: it only makes system calls.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(4)
        .build();
    match runtime {
        Ok(runtime) => runtime.block_on(run(began_ns)),
        Err(error) => crate::log::to_kernel_log(3, &format!("cannot start the agent's event loop: {error}")),
    }
    ExitCode::FAILURE
}

async fn run(began_ns: i64) {
    let outbox = Outbox::new();
    let log = Log::new(outbox.clone());
    let state = State::new(outbox.clone());
    let (power, mut power_requests) = mpsc::channel(1);
    // Listening first: a client's connection waits in the backlog, and is not refused.
    let docker_listener = listen(GUEST_DOCKER);
    let exec_listener = listen(GUEST_EXEC);
    let (answers, answers_receiver) = mpsc::channel(8);
    let check_clock = Arc::new(Notify::new());
    let went_on = Arc::new(Notify::new());
    tokio::spawn(clock::keep(
        outbox.clone(),
        log.clone(),
        answers_receiver,
        check_clock.clone(),
    ));
    let file_events = FileEvents::default();
    let (settings, mut engine_settings) = watch::channel(None);
    let random_ports = random_ports::Given::default();
    let control = Control {
        outbox: outbox.clone(),
        log: log.clone(),
        engine: state.subscribe(),
        settings,
        answers,
        file_events: file_events.clone(),
        check_clock,
        went_on: went_on.clone(),
        power: power.clone(),
        random_ports: random_ports.clone(),
    };
    // Before the supervisor can tell the VM's name, which is not to be undone.
    system::set_hostname(system::DEFAULT_HOSTNAME, &log);
    tokio::spawn(control.run());
    tokio::spawn(power::watch_signals(power.clone(), log.clone()));

    timeline::report(&outbox, "agent", began_ns, timeline::now_ns());
    let mounting = Running::begin("mounts");
    let errors = spawn_blocking(mounts::all).await.unwrap_or_default();
    announce::start(&log, state.subscribe());
    measure::start(&log, state.subscribe());
    mounting.end(&outbox);
    for error in errors {
        log.error(chain(&error));
    }
    let sharing = Running::begin("shares");
    let errors = spawn_blocking(shares::mount_all).await.unwrap_or_default();
    sharing.end(&outbox);
    for error in errors {
        log.error(chain(&error));
    }
    file_events.start(&log);
    let disk = spawn_blocking({
        let (log, outbox) = (log.clone(), outbox.clone());
        move || disk::prepare(&log, &outbox)
    });
    let settings = Running::begin("settings");
    cgroup::prepare(&log);
    system::prepare(&log);
    settings.end(&outbox);
    let network = Running::begin("network");
    // The engine is of use without either.
    for result in [network::bring_up_loopback(), network::prepare()] {
        if let Err(error) = result {
            log.error(chain(&error));
        }
    }
    if let Err(error) = names::start(&log).await {
        log.error(chain(&error));
    }
    network.end(&outbox);
    accept(docker_listener, GUEST_DOCKER, &log, {
        let state = state.clone();
        move |client| {
            let state = state.subscribe();
            // A broken connection is its two ends' business, who both see it.
            async move { drop(docker_port::serve(client, state, Path::new(docker_port::ENGINE_SOCKET)).await) }
        }
    });
    accept(exec_listener, GUEST_EXEC, &log, {
        let log = log.clone();
        move |client| {
            let log = log.clone();
            async move {
                if let Err(error) = exec::serve(client).await {
                    log.warn(chain(&error));
                }
            }
        }
    });
    power_button::watch(&power, &log);
    tokio::spawn(idle::watch(log.clone(), outbox.clone(), went_on));

    let engine = match disk.await {
        Ok(Ok(())) => {
            if let Err(error) = machine_id::prepare() {
                log.error(chain(&error));
            }
            // Known since long, as a rule; without a supervisor it is known that there is none.
            let settings = engine_settings.wait_for(Option::is_some).await;
            let settings = settings.map(|settings| settings.clone().unwrap_or_default());
            Some(Engine::start(
                &log,
                &outbox,
                &state,
                &settings.unwrap_or_default(),
                &random_ports,
            ))
        }
        Ok(Err(error)) => give_up(&log, &state, chain(&error)),
        Err(error) => give_up(
            &log,
            &state,
            format!("the preparation of the data disk failed: {error}"),
        ),
    };
    // The engine's start is not to wait for this.
    drop(spawn_blocking({
        let (log, outbox) = (log.clone(), outbox.clone());
        move || kernel_log::report(&log, &outbox)
    }));
    let Some(request) = power_requests.recv().await else {
        return log.error("nobody is left who could ask for a power-off");
    };
    let errno = shutdown::perform(request, engine, &state, &log, &outbox).await;
    log.error(format!("cannot power off: {errno}"));
}

/// There will be no engine; the agent stays, so that `lighter exec` can repair.
fn give_up(log: &Log, state: &State, reason: String) -> Option<Engine> {
    log.error(format!("the engine is not started: {reason}"));
    state.set(EngineState::Failed {
        reason,
        last_lines: vec![],
        retry_in_ms: None,
    });
    None
}

/// Listens on a vsock port; with `VMADDR_PORT_ANY` on one that the kernel chooses.
///
/// # Errors
/// When it is taken.
pub fn listen(port: u32) -> io::Result<VsockListener> {
    let listener = VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, port))?;
    // A client too many is refused, and does not wait: 128, as `bind` has it, are soon there when the guest is busy.
    nix::sys::socket::listen(&listener, Backlog::MAXCONN)?;
    Ok(listener)
}

/// Serves each connection in a task of its own.
fn accept<F>(
    listener: io::Result<VsockListener>,
    port: u32,
    log: &Log,
    serve: impl Fn(VsockStream) -> F + Send + 'static,
) where
    F: Future<Output = ()> + Send + 'static,
{
    let listener = match listener {
        Ok(listener) => listener,
        Err(error) => return log.error(format!("cannot listen on vsock port {port}: {error}")),
    };
    let log = log.clone();
    tokio::spawn(async move {
        loop {
            match listener.accept().await {
                Ok((client, _)) => drop(tokio::spawn(serve(client))),
                Err(error) => {
                    log.error(format!(
                        "cannot accept a connection on vsock port {port}: {error}"
                    ));
                    sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    });
}
