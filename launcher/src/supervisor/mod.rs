//! The supervisor: one process for each running VM.
//!
//! `lighter start` runs `lighter supervise NAME` in a session of its own. It holds the VM's life lock for as long as it
//! lives; it opens what the monitor needs, starts it, and ends when the monitor has ended. The process that started it
//! watches it over a socket on its standard input, as the clients of its control socket do.
//!
//! - `machine`: the description of the VM, and its files and sockets
//! - `monitor`: the monitor process
//! - `passt`: the network
//! - `agent`: the guest's agent
//! - `identity`: who the guest of a snapshot is
//! - `engine_settings`: what the engine is started with
//! - `file_events`: what the host changes in shared folders
//! - `names`: the guest's questions about names
//! - `docker`: the engine's socket
//! - `ports`: published ports
//! - `control`: the control socket
//! - `snapshot`: snapshots of the running VM
//! - `start`: everything around a monitor that begins
//! - `starter`: the process that started this one
//! - `state`: what is known about the VM
//! - `suspension`: what a suspended VM goes on from
//! - `template`: what it leaves behind for new VMs

pub mod agent;
pub mod control;
pub mod docker;
pub mod engine_settings;
pub mod file_events;
pub mod identity;
pub mod lines;
pub mod machine;
pub mod monitor;
pub mod names;
pub mod passt;
pub mod ports;
pub mod snapshot;
mod start;
pub mod starter;
pub mod state;
pub mod suspension;
mod template;
mod working_set;

use crate::boot::Begin;
use crate::error::{Context, Error, Result, say};
use crate::lock::Lock;
use crate::logs::{Source, last_lines};
use crate::name::Name;
use crate::paths::Paths;
use crate::snapshots::store;
use crate::vm::Vm;
use agent::GuestLogs;
use lighter_protocol::agent::{EngineSettings, SupervisorMessage, VERSION};
use lighter_protocol::causes::chain;
use lighter_protocol::monitor::{Event, EventKind, Request, StopReason};
use lighter_protocol::supervisor::{End, UsedFile};
use lines::Lines;
use ports::Ports;
use snapshot::Snapshots;
use state::State;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use suspension::Resumption;
use tokio::net::UnixStream;
use tokio::net::unix::pipe;
use tokio::process::Child;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};

/// How long a guest may take to power itself off when nobody says otherwise.
pub const STOP_TIMEOUT: Duration = Duration::from_secs(120);

/// How long the monitor may take to end once it was told to, before it is killed.
const MONITOR_ENDS: Duration = Duration::from_secs(60);

/// How long watchers may take to hear of the end.
const FAREWELL: Duration = Duration::from_secs(5);

/// Lines of the console that go with a crash.
const CONSOLE_LINES: usize = 20;

/// A client wants the VM to end.
#[derive(Clone, Copy, Debug)]
pub struct StopRequest {
    /// Pull the plug.
    force: bool,
    /// How long the guest may take otherwise.
    timeout: Duration,
}

impl StopRequest {
    /// At once.
    const PULL_THE_PLUG: Self = Self {
        force: true,
        timeout: Duration::ZERO,
    };
}

/// Runs the supervisor of the VM `name`, which begins as `begin` says, until the VM is over.
///
/// # Errors
/// When it could not even begin; what happens to the VM is told to the watchers.
pub fn run(paths: &Paths, name: &Name, begin: Begin<'_>) -> Result<()> {
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
    runtime.block_on(supervise(paths, &vm, begin, started_ns));
    runtime.shutdown_background();
    drop(lock);
    Ok(())
}

async fn supervise(paths: &Paths, vm: &Vm, begin: Begin<'_>, started_ns: u64) {
    // How the VM ended before says nothing about this life, however it ends.
    if let Err(error) = vm.forget_end() {
        let _ = std::fs::remove_file(vm.paths.end());
        say(format_args!("lighter: {}", chain(&error)));
    }
    let state = State::new(vm, started_ns);
    let ports = Ports::default();
    let snapshots = Snapshots::new(vm);
    let (stop_sender, stop_receiver) = mpsc::channel(16);
    let control = paths
        .create_runtime(&vm.paths)
        .map_err(Error::from)
        .and_then(|()| machine::listen(&vm.paths.control_socket()))
        .and_then(|listener| listener_of(listener, "control.sock"));
    let mut farewells = vec![];
    // In this order: whoever hears from this process finds its control socket.
    let result = match control {
        Err(error) => Err(error),
        Ok(listener) => {
            farewells.push(tokio::spawn(control::serve(
                listener,
                state.clone(),
                ports.clone(),
                snapshots.clone(),
                stop_sender.clone(),
            )));
            Ok(())
        }
    };
    if let Some(starter) = starter::find() {
        let watch = starter::watch(
            starter,
            state.clone(),
            vm.settings.throw_away,
            stop_sender.clone(),
        );
        farewells.push(tokio::spawn(watch));
    }
    let result = match result {
        Err(error) => Err(error),
        Ok(()) => Supervisor::start(paths, vm, begin, state.clone(), ports, snapshots).await,
    };
    let end = match result {
        Ok(supervisor) => supervisor.run(stop_receiver).await,
        Err(error) => End {
            reason: StopReason::Failed {
                detail: error.message,
            },
            requested: false,
            unix_ms: crate::clock::unix_ms(),
            hint: error.hint,
            last_lines: error.lines,
        },
    };
    if vm.settings.throw_away {
        if let Err(error) = vm.clone().remove() {
            say(format_args!("lighter: {}", chain(&error)));
        }
        // Its starter may have been forking it.
        store::sweep(paths);
    } else {
        vm.paths.remove_runtime();
        if let Err(error) = vm.save_end(&end) {
            say(format_args!("lighter: {}", chain(&error)));
        }
    }
    state.ended(end);
    let _ = timeout(FAREWELL, async {
        for farewell in farewells {
            let _ = farewell.await;
        }
    })
    .await;
}

/// The supervisor's tasks around one running monitor.
struct Supervisor<'a> {
    vm: &'a Vm,
    state: State,
    /// What it goes on from, if it was not booted.
    from: Option<PathBuf>,
    /// It was suspended.
    resumption: Option<Resumption>,
    snapshots: Snapshots,
    /// Kernel and image.
    booted_from: [UsedFile; 2],
    child: Child,
    events: Lines<pipe::Receiver>,
    agents: agent::Connections,
    logs: Arc<Mutex<GuestLogs>>,
    orders: Option<mpsc::Sender<SupervisorMessage>>,
    engine: EngineSettings,
    /// Who the guest is, if it is that of a snapshot.
    identity: Option<identity::Giver>,
    /// Reserved for as long as the VM runs.
    _random_ports: Option<ports::random::Block>,
    stderr: JoinHandle<Vec<String>>,
}

/// How far the end of a VM was brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ending {
    /// The guest was asked.
    Asked,
    /// The monitor was told to pull the plug.
    Pulled,
    /// The monitor was killed.
    Killed,
}

impl<'a> Supervisor<'a> {
    /// Until the monitor has ended.
    async fn run(mut self, mut stop: mpsc::Receiver<StopRequest>) -> End {
        let mut terminate = signal(SignalKind::terminate()).ok();
        let mut hangup = signal(SignalKind::hangup()).ok();
        let mut interrupt = signal(SignalKind::interrupt()).ok();
        let mut ending: Option<(Ending, Instant)> = None;
        let (mut events_open, mut agents_open) = (true, true);
        let mut reason = None;
        let exit = loop {
            let deadline = ending.map(|(_, deadline)| deadline);
            tokio::select! {
                exit = self.child.wait() => break exit,
                line = self.events.next(), if events_open => match line {
                    Ok(Some(line)) => self.event(&line, &mut reason),
                    Ok(None) | Err(_) => events_open = false,
                },
                agent = self.agents.accept(), if agents_open => match agent {
                    Ok(Some(stream)) => self.serve_agent(stream),
                    Ok(None) => agents_open = false,
                    Err(error) => {
                        say(format_args!("lighter: cannot take an agent's connection: {error}"));
                        agents_open = false;
                    }
                },
                Some(request) = stop.recv() => self.stop(request, &mut ending),
                () = received(&mut terminate) => self.stop(GRACEFUL, &mut ending),
                () = received(&mut interrupt) => self.stop(GRACEFUL, &mut ending),
                // The terminal of whoever started this is none of its business.
                () = received(&mut hangup) => {}
                () = sleep_until(deadline), if deadline.is_some() => self.escalate(&mut ending),
            }
        };
        // What was written before the end is still in the pipes.
        let _ = timeout(FAREWELL, async {
            while let Ok(Some(line)) = self.events.next().await {
                self.event(&line, &mut reason);
            }
        })
        .await;
        let stderr = timeout(FAREWELL, &mut self.stderr).await;
        let stderr = stderr.ok().and_then(std::result::Result::ok).unwrap_or_default();
        let console = || last_lines(&self.vm.paths.log(Source::Console), CONSOLE_LINES).unwrap_or_default();
        let requested = ending.is_some();
        let hint = (!requested && self.state.before_the_agent()).then(|| self.start_hint());
        let reason = match (reason, ending) {
            (Some(reason), _) => reason,
            (None, Some((Ending::Killed, _))) => StopReason::Requested,
            (None, _) => StopReason::Failed {
                detail: match exit {
                    Ok(status) => format!("the monitor lighter-vmm ended without a reason ({status})"),
                    Err(error) => format!("the monitor lighter-vmm cannot be waited for: {error}"),
                },
            },
        };
        let last_lines = match reason {
            StopReason::GuestCrashed { .. } => console(),
            StopReason::Reset if !requested => console(),
            StopReason::Failed { .. } => stderr,
            _ => vec![],
        };
        End {
            reason,
            requested,
            unix_ms: crate::clock::unix_ms(),
            hint,
            last_lines,
        }
    }

    /// What to look at when the guest did not get as far as its agent.
    fn start_hint(&self) -> String {
        let name = &self.vm.name;
        if let Some(folder) = &self.from {
            return format!(
                "it was to go on from the snapshot in {}; lighter logs --source monitor {name} tells more",
                folder.display(),
            );
        }
        format!(
            "it was booted from the kernel {} and the image {}; if they are the right ones, lighter logs --source \
             console {name} and --source monitor {name} tell more",
            self.booted_from[0].path.display(),
            self.booted_from[1].path.display(),
        )
    }

    fn event(&mut self, line: &str, reason: &mut Option<StopReason>) {
        match serde_json::from_str::<Event>(line) {
            Ok(Event {
                kind: EventKind::Stopped { reason: why },
                ..
            }) => *reason = Some(why),
            Ok(event) => {
                match &event.kind {
                    EventKind::DeviceFailed { device, reason } => {
                        say(format_args!(
                            "lighter: the guest broke the rules of its device {device}: {reason}"
                        ));
                    }
                    EventKind::DeviceTrouble { device, reason } => {
                        say(format_args!("lighter: device {device}: {reason}"));
                        self.state.trouble(device, reason);
                    }
                    // Without an agent, or with one that has orders enough, the guest is not walking through folders.
                    EventKind::DeviceCrowded { .. } => self.order(SupervisorMessage::ForgetFiles),
                    // Its clock stood still.
                    EventKind::Resumed => self.order(SupervisorMessage::CheckClock),
                    EventKind::GuestEntered => {
                        if let Some(resumption) = &mut self.resumption {
                            resumption.runs();
                        }
                    }
                    EventKind::Saved => self.snapshots.written(Ok(())),
                    EventKind::SaveFailed { reason } => self.snapshots.written(Err(reason.clone())),
                    _ => {}
                }
                self.state.event(&event.kind, event.monotonic_ns);
            }
            Err(error) => say(format_args!(
                "lighter: an event of the monitor is not understood ({error}): {line:?}"
            )),
        }
    }

    /// Gives the agent an order that does no harm when it is lost.
    fn order(&self, order: SupervisorMessage) {
        if let Some(orders) = &self.orders {
            let _ = orders.try_send(order);
        }
    }

    /// Serves a new connection of the agent; one before it gets no more orders.
    fn serve_agent(&mut self, stream: UnixStream) {
        let (sender, orders) = mpsc::channel(8);
        self.orders = Some(sender);
        let (state, logs) = (self.state.clone(), self.logs.clone());
        let watcher = file_events::Watcher::new(self.vm.settings.mounts());
        let (hostname, engine, identity) = (
            self.vm.name.to_string(),
            self.engine.clone(),
            self.identity.clone(),
        );
        let welcome = move || SupervisorMessage::Welcome {
            protocol: VERSION,
            hostname: hostname.clone(),
            engine: engine.clone(),
            identity: identity.as_ref().and_then(identity::Giver::identity),
        };
        tokio::spawn(async move {
            if let Err(error) = agent::serve(stream, state, logs, welcome, orders, watcher).await {
                say(format_args!("lighter: {}", chain(&error)));
            }
        });
    }

    fn stop(&mut self, request: StopRequest, ending: &mut Option<(Ending, Instant)>) {
        self.state.stopping();
        let pulled = matches!(ending, Some((Ending::Pulled | Ending::Killed, _)));
        if pulled {
            return;
        }
        // A guest without an agent has not begun to use its data disk.
        let agent = self.orders.as_ref().filter(|_| !request.force);
        let Some(orders) = agent else {
            *ending = Some((Ending::Asked, Instant::now()));
            return self.escalate(ending);
        };
        // At most a century: the clock would overflow otherwise.
        let deadline = Instant::now() + request.timeout.min(Duration::from_secs(3_000_000_000));
        if ending.is_none() {
            let shutdown = SupervisorMessage::Shutdown {
                container_grace_s: None,
            };
            if orders.try_send(shutdown).is_err() {
                self.ask_monitor(Request::PowerButton);
            }
            *ending = Some((Ending::Asked, deadline));
        } else if let Some((_, earlier)) = ending {
            *earlier = deadline.min(*earlier);
        }
    }

    fn escalate(&mut self, ending: &mut Option<(Ending, Instant)>) {
        let next = match ending {
            None | Some((Ending::Asked, _)) => {
                self.ask_monitor(Request::Stop);
                Ending::Pulled
            }
            Some((Ending::Pulled | Ending::Killed, _)) => {
                say("lighter: the monitor did not end when it was told to, and is killed");
                let _ = self.child.start_kill();
                Ending::Killed
            }
        };
        *ending = Some((next, Instant::now() + MONITOR_ENDS));
    }

    fn ask_monitor(&self, request: Request) {
        let socket = self.vm.paths.monitor_socket();
        tokio::spawn(async move {
            if let Err(error) = monitor::request(&socket, &request).await {
                say(error);
            }
        });
    }
}

const GRACEFUL: StopRequest = StopRequest {
    force: false,
    timeout: STOP_TIMEOUT,
};

async fn received(signal: &mut Option<tokio::signal::unix::Signal>) {
    match signal {
        Some(signal) => {
            signal.recv().await;
        }
        None => std::future::pending().await,
    }
}

async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

fn listener_of(listener: std::os::unix::net::UnixListener, what: &str) -> Result<tokio::net::UnixListener> {
    listener
        .set_nonblocking(true)
        .and_then(|()| tokio::net::UnixListener::from_std(listener))
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
