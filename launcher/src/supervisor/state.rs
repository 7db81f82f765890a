//! What the supervisor knows about its VM: one [`Status`] that tasks change and clients watch.

use crate::vm::Vm;
use lighter_protocol::agent::{EngineState, GuestMemory, Step};
use lighter_protocol::monitor::EventKind;
use lighter_protocol::supervisor::{BootClock, End, MAX_STEPS, Phase, Status, Timeline, Trouble};
use tokio::sync::watch;

/// The shared status.
#[derive(Clone, Debug)]
pub struct State(watch::Sender<Status>);

impl State {
    /// The status of a VM whose supervisor has just started.
    pub fn new(vm: &Vm, supervisor_started_ns: u64) -> Self {
        Self(watch::Sender::new(Status {
            name: vm.name.to_string(),
            phase: Phase::Starting,
            supervisor_pid: std::process::id(),
            monitor_pid: None,
            cpus: vm.settings.cpus,
            memory_mib: vm.settings.memory.mib(),
            docker_socket: vm.paths.docker_socket().display().to_string(),
            started_unix_ms: crate::clock::unix_ms(),
            timeline: Timeline {
                supervisor_started_ns: Some(supervisor_started_ns),
                ..Timeline::default()
            },
            agent_version: None,
            steps: vec![],
            engine: None,
            engine_failures: 0,
            clock_offset_ns: None,
            boot_clock: None,
            memory: None,
            trouble: None,
            end: None,
        }))
    }

    /// Sees every change from now on.
    pub fn watch(&self) -> watch::Receiver<Status> {
        self.0.subscribe()
    }

    /// Where the VM is in its life.
    pub fn phase(&self) -> Phase {
        self.0.borrow().phase
    }

    /// Whether the agent has not greeted yet.
    pub fn before_the_agent(&self) -> bool {
        self.0.borrow().agent_version.is_none()
    }

    /// The monitor process was started.
    pub fn monitor_started(&self, pid: Option<u32>) {
        self.0.send_modify(|status| status.monitor_pid = pid);
    }

    /// The monitor reported something. Stops are handled by the caller.
    pub fn event(&self, kind: &EventKind, monotonic_ns: u64) {
        let stamp = Some(monotonic_ns);
        self.0.send_if_modified(|status| {
            match kind {
                EventKind::ProcessStarted => status.timeline.monitor_started_ns = stamp,
                EventKind::Ready => status.timeline.monitor_ready_ns = stamp,
                EventKind::GuestEntered => {
                    status.timeline.guest_entered_ns = stamp;
                    advance(status, Phase::Booting);
                }
                _ => return false,
            }
            true
        });
    }

    /// Something of the host's that the VM would use is missing or gone.
    pub fn trouble(&self, device: &str, reason: &str) {
        let trouble = Trouble {
            device: device.into(),
            reason: reason.into(),
            unix_ms: crate::clock::unix_ms(),
        };
        self.0.send_modify(|status| status.trouble = Some(trouble));
    }

    /// The agent greeted.
    pub fn agent_running(&self, version: &str) {
        self.0.send_modify(|status| {
            status.agent_version = Some(version.into());
            status
                .timeline
                .agent_running_ns
                .get_or_insert(crate::clock::monotonic_ns());
            advance(status, Phase::EngineStarting);
        });
    }

    /// The agent's start-up made a step.
    pub fn step(&self, step: Step) {
        self.0.send_if_modified(|status| {
            let room = status.steps.len() < MAX_STEPS;
            if room {
                status.steps.push(step);
            }
            room
        });
    }

    /// The guest's clocks were compared with the host's.
    pub fn clock(&self, offset_ns: i64, boot_clock: Option<BootClock>) {
        self.0.send_modify(|status| {
            status.clock_offset_ns = Some(offset_ns);
            let quickest = [status.boot_clock, boot_clock].into_iter().flatten();
            status.boot_clock = quickest.min_by_key(|clock| clock.round_trip_ns);
        });
    }

    /// The guest told of its memory.
    pub fn memory(&self, memory: GuestMemory) {
        self.0.send_modify(|status| status.memory = Some(memory));
    }

    /// The engine changed state.
    pub fn engine(&self, engine: EngineState) {
        self.0.send_modify(|status| {
            match engine {
                EngineState::Ready => {
                    status
                        .timeline
                        .engine_ready_ns
                        .get_or_insert(crate::clock::monotonic_ns());
                    advance(status, Phase::Ready);
                }
                EngineState::Failed { .. } => {
                    status.engine_failures = status.engine_failures.saturating_add(1);
                    engine_lost(status);
                }
                EngineState::Starting | EngineState::Stopped => engine_lost(status),
            }
            status.engine = Some(engine);
        });
    }

    /// The VM was asked to end.
    pub fn stopping(&self) {
        self.0.send_modify(|status| advance(status, Phase::Stopping));
    }

    /// The VM is over.
    pub fn ended(&self, end: End) {
        self.0.send_modify(|status| {
            status.phase = Phase::Ended;
            status.end = Some(end);
        });
    }
}

/// Phases only go forward, but for an engine that is lost.
fn advance(status: &mut Status, phase: Phase) {
    status.phase = status.phase.max(phase);
}

fn engine_lost(status: &mut Status) {
    if status.phase == Phase::Ready {
        status.phase = Phase::EngineStarting;
    }
}

/// Whether a client of the engine has to wait no longer.
pub fn engine_settled(status: &Status) -> bool {
    status.phase >= Phase::Ready || engine_given_up(status)
}

/// Whether the agent gave the engine up.
pub fn engine_given_up(status: &Status) -> bool {
    matches!(
        status.engine,
        Some(EngineState::Failed {
            retry_in_ms: None,
            ..
        })
    )
}
