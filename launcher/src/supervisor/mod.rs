//! The supervisor: one process for each VM that runs, or stands by while it is suspended.
//!
//! `lighter start` runs `lighter supervise NAME` in a session of its own. It holds the VM's life lock for as long as it
//! lives; it opens what the monitor needs, starts it, and ends when the monitor has ended, unless it stands by. The process that started it
//! watches it over a socket on its standard input, as the clients of its control socket do.
//!
//! - `launch`: its life
//! - `machine`: the description of the VM, and its files and sockets
//! - `monitor`: the monitor process
//! - `network`: its network
//! - `agent`: the guest's agent
//! - `identity`: who the guest of a snapshot is
//! - `engine_settings`: what the engine is started with
//! - `host_clock`: jumps of the host's clock
//! - `file_events`: what the host changes in shared folders
//! - `names`: the guest's questions about names
//! - `docker`: the engine's socket
//! - `ports`: published ports
//! - `process`: a child that another one has left in its place
//! - `control`: the control socket
//! - `demand`: what its clients want
//! - `snapshot`: snapshots of the running VM
//! - `service`: what it has to do with systemd, where that has started it
//! - `signals`: signals to it
//! - `standby`: the lives of a VM that suspends by itself
//! - `start`: everything around a monitor that begins
//! - `starter`: the process that started this one
//! - `state`: what is known about the VM
//! - `suspension`: what a suspended VM goes on from
//! - `template`: what it leaves behind for new VMs
//! - `usage`: who uses the VM

pub mod agent;
pub mod control;
mod demand;
pub mod docker;
pub mod engine_settings;
pub mod file_events;
mod host_clock;
pub mod identity;
pub mod launch;
pub mod lines;
pub mod machine;
pub mod monitor;
pub mod names;
pub mod network;
pub mod ports;
pub mod process;
pub mod service;
mod signals;
pub mod snapshot;
mod standby;
mod start;
pub mod starter;
pub mod state;
pub mod suspension;
mod template;
pub mod usage;
mod working_set;

use crate::error::{Error, say};
use crate::logs::{Source, last_lines};
use crate::vm::Vm;
use agent::GuestLogs;
use demand::{Demand, StopRequest};
use host_clock::Jumps;
use lighter_protocol::agent::{EngineSettings, SupervisorMessage, VERSION};
use lighter_protocol::causes::chain;
use lighter_protocol::monitor::{Event, EventKind, Request, StopReason};
use lighter_protocol::supervisor::{End, UsedFile};
use lines::Lines;
use ports::Ports;
use process::Process;
use rustix::process::Signal;
use signals::Signals;
use snapshot::Snapshots;
use standby::Outcome;
use state::State;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use suspension::Resumption;
use tokio::net::UnixStream;
use tokio::net::unix::pipe;
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, JoinHandle, JoinSet};
use tokio::time::{Instant, timeout};
use usage::Usage;

/// How long a guest may take to power itself off when nobody says otherwise.
pub const STOP_TIMEOUT: Duration = Duration::from_secs(120);

/// How long the monitor may take to end once it was told to, before it is killed.
const MONITOR_ENDS: Duration = Duration::from_secs(60);

/// How long watchers may take to hear of the end.
const FAREWELL: Duration = Duration::from_secs(5);

/// Lines of the console that go with a crash.
const CONSOLE_LINES: usize = 20;

/// What stays while monitors come and go; clones share it.
#[derive(Clone, Debug)]
pub struct Lasting {
    /// What is known about the VM.
    pub state: State,
    /// Published ports.
    pub ports: Ports,
    /// Who saves the VM.
    pub snapshots: Snapshots,
    /// Who uses it.
    pub usage: Usage,
    /// After how much idle time it suspends.
    pub suspends_after: Option<Duration>,
}

/// The end of a VM that did not begin.
fn failed(error: Error) -> End {
    End {
        reason: StopReason::Failed {
            detail: error.message,
        },
        requested: false,
        unix_ms: crate::clock::unix_ms(),
        hint: error.hint,
        last_lines: error.lines,
    }
}

/// The supervisor's tasks around one running monitor.
struct Supervisor<'a> {
    vm: &'a Vm,
    lasting: Lasting,
    /// What it goes on from, if it was not booted.
    from: Option<PathBuf>,
    /// It was suspended.
    resumption: Option<Resumption>,
    /// Kernel and image.
    booted_from: [UsedFile; 2],
    /// The monitor.
    process: Process,
    events: Lines<pipe::Receiver>,
    agents: agent::Connections,
    logs: Arc<Mutex<GuestLogs>>,
    orders: Option<mpsc::Sender<SupervisorMessage>>,
    /// The agent's connection.
    agent: Option<AbortHandle>,
    /// To be started by this thread.
    passts: mpsc::Receiver<network::Order>,
    engine: EngineSettings,
    /// Who the guest is, if it is that of a snapshot.
    identity: Option<identity::Giver>,
    /// They end with the monitor.
    tasks: JoinSet<()>,
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
    async fn run(
        mut self,
        demands: &mut mpsc::Receiver<Demand>,
        signals: &mut Signals,
        jumps: &Jumps,
    ) -> Outcome {
        let mut stands_by = false;
        let mut ending: Option<(Ending, Instant)> = None;
        let (mut events_open, mut agents_open) = (true, true);
        let mut reason = None;
        let exit = loop {
            let deadline = ending.map(|(_, deadline)| deadline);
            tokio::select! {
                exit = self.process.wait() => break exit,
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
                Some(demand) = demands.recv() => match demand {
                    Demand::Stop(request) => {
                        stands_by = false;
                        self.stop(request, &mut ending);
                    }
                    Demand::StandBy if ending.is_none() => {
                        stands_by = true;
                        self.escalate(&mut ending);
                    }
                    Demand::StandBy => {}
                    Demand::StandDown(answer) => drop(answer.send(std::mem::take(&mut stands_by))),
                },
                Some(passt) = self.passts.recv() => passt.carry_out(),
                () = jumps.next() => self.clock_has_jumped(),
                () = signals.end() => {
                    stands_by = false;
                    self.stop(StopRequest::GRACEFUL, &mut ending);
                }
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
        let hint = (!requested && self.lasting.state.before_the_agent()).then(|| self.start_hint());
        let reason = match (reason, ending) {
            (Some(reason), _) => reason,
            (None, Some((Ending::Killed, _))) => StopReason::Requested,
            (None, _) => StopReason::Failed {
                detail: match exit {
                    Ok(status) if status.signal() == Some(Signal::SYS.as_raw()) => {
                        "the monitor lighter-vmm was ended by its filter of system calls (SIGSYS): its guest took it over, or the \
                         filter lacks a call of this host's libraries; the kernel's log has a line `type=1326` with the call \
                         (docs/security.md)"
                            .into()
                    }
                    Ok(status) if status.signal() == Some(Signal::KILL.as_raw()) => {
                        "the monitor lighter-vmm was killed (SIGKILL): by somebody, or by the host's kernel for want of memory, of which \
                         the kernel's log tells"
                            .into()
                    }
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
        // What they still know of the guest is not that of the next.
        self.tasks.shutdown().await;
        Outcome {
            end: End {
                reason,
                requested,
                unix_ms: crate::clock::unix_ms(),
                hint,
                last_lines,
            },
            stands_by,
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
                        let reason = match device.strip_prefix("block ") == Some(machine::DATA_DISK) {
                            true => format!("{}: {reason}", self.vm.paths.disk().display()),
                            false => reason.clone(),
                        };
                        say(format_args!("lighter: device {device}: {reason}"));
                        self.lasting.state.trouble(device, &reason);
                    }
                    // Without an agent, or with one that has orders enough, the guest is not walking through folders.
                    EventKind::DeviceCrowded { .. } => drop(self.order(SupervisorMessage::ForgetFiles)),
                    // Its clock stood still.
                    EventKind::Resumed => drop(self.order(SupervisorMessage::CheckClock)),
                    EventKind::GuestEntered => {
                        if let Some(resumption) = &mut self.resumption {
                            resumption.runs();
                        }
                    }
                    EventKind::Saved => self.lasting.snapshots.written(Ok(())),
                    EventKind::SaveFailed { reason } => self.lasting.snapshots.written(Err(reason.clone())),
                    _ => {}
                }
                self.lasting.state.event(&event.kind, event.monotonic_ns);
            }
            Err(error) => say(format_args!(
                "lighter: an event of the monitor is not understood ({error}): {line:?}"
            )),
        }
    }

    /// Gives the agent an order that does no harm when it is lost. Returns whether there is one that may get it.
    fn order(&self, order: SupervisorMessage) -> bool {
        let orders = self.orders.as_ref();
        orders.is_some_and(|orders| orders.try_send(order).is_ok())
    }

    /// The host has slept, say. Clients of the engine wait until the guest knows.
    fn clock_has_jumped(&self) {
        if self.order(SupervisorMessage::CheckClock) {
            self.lasting.state.clock_awaited(true);
        }
    }

    /// Serves a new connection of the agent, which has one at a time: one before it is over, so that those of a guest with many
    /// cost no more.
    fn serve_agent(&mut self, stream: UnixStream) {
        let (sender, orders) = mpsc::channel(8);
        self.orders = Some(sender);
        let (lasting, logs) = (self.lasting.clone(), self.logs.clone());
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
        while self.tasks.try_join_next().is_some() {}
        if let Some(before) = self.agent.take() {
            before.abort();
        }
        let served = self.tasks.spawn(async move {
            if let Err(error) = agent::serve(stream, &lasting, logs, welcome, orders, watcher).await {
                say(format_args!("lighter: {}", chain(&error)));
            }
        });
        self.agent = Some(served);
    }

    fn stop(&mut self, request: StopRequest, ending: &mut Option<(Ending, Instant)>) {
        self.lasting.state.stopping();
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
                self.process.kill();
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

async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}
