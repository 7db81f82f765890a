//! What the supervisor knows about its VM: one [`Status`] that tasks change and clients watch.

use crate::vm::Vm;
use lighter_protocol::agent::{EngineState, GuestMemory, Step};
use lighter_protocol::monitor::EventKind;
use lighter_protocol::supervisor::{
    BootClock, End, IdentityState, MAX_STEPS, Origin, Phase, Status, TemplateState, Timeline, Trouble,
};
use tokio::sync::watch;

/// What troubles with a guest's identity are told as.
const IDENTITY: &str = "identity";

/// What a failure to go on is told as.
const WAKE: &str = "wake";

/// The shared status.
#[derive(Clone, Debug)]
pub struct State(watch::Sender<Status>);

impl State {
    /// The status of a VM whose supervisor has just started.
    pub fn new(vm: &Vm, supervisor_started_ns: u64) -> Self {
        Self(watch::Sender::new(status(vm, supervisor_started_ns)))
    }

    /// The VM is suspended, and goes on when it is used; `failure` says why it has not when it was.
    pub fn stands_by(&self, vm: &Vm, failure: Option<&str>) {
        self.begin(vm, Phase::StandingBy, |status| {
            if let Some(failure) = failure {
                status.wake_failures = status.wake_failures.saturating_add(1);
                status.trouble = Some(trouble(WAKE, failure));
            }
        });
    }

    /// It is used.
    pub fn wakes(&self, vm: &Vm) {
        self.begin(vm, Phase::Starting, |_| {});
    }

    /// Nothing is as it was with the last monitor.
    fn begin(&self, vm: &Vm, phase: Phase, change: impl FnOnce(&mut Status)) {
        self.0.send_modify(|now| {
            *now = Status {
                phase,
                wake_failures: now.wake_failures,
                ..status(vm, crate::clock::monotonic_ns())
            };
            change(now);
        });
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
    pub fn monitor_started(&self, pid: u32) {
        self.0.send_modify(|status| status.monitor_pid = Some(pid));
    }

    /// passt was started, or has ended.
    pub fn network(&self, pid: Option<u32>) {
        self.0.send_modify(|status| status.network_pid = pid);
    }

    /// The monitor reported something. Stops are handled by the caller.
    pub fn event(&self, kind: &EventKind, monotonic_ns: u64) {
        let stamp = Some(monotonic_ns);
        self.0.send_if_modified(|status| {
            match kind {
                EventKind::ProcessStarted => status.timeline.monitor_started_ns = stamp,
                EventKind::Caged { cage } => status.cage = Some(cage.clone()),
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
        self.0
            .send_modify(|status| status.trouble = Some(trouble(device, reason)));
    }

    /// What was told of `device` is over, if it was the last trouble.
    pub fn trouble_is_over(&self, device: &str) {
        self.0.send_if_modified(|status| {
            status
                .trouble
                .take_if(|trouble| trouble.device == device)
                .is_some()
        });
    }

    /// The guest is that of a snapshot, and serves nobody until it is itself.
    pub fn identity_awaited(&self) {
        self.0
            .send_modify(|status| status.identity = Some(IdentityState::Pending));
    }

    /// The guest says that it is itself, but for `troubles`, which may be empty. One whose random numbers are not its own is
    /// refused. A guest that was not asked says nothing.
    pub fn identity_taken(&self, seeded: bool, troubles: &str) {
        self.0.send_if_modified(|status| {
            let asked = status.identity.is_some();
            if asked && seeded {
                status.identity = Some(IdentityState::Taken);
                engine_may_serve(status);
            } else if asked {
                status.identity = Some(IdentityState::Refused);
            }
            if asked && !troubles.is_empty() {
                status.trouble = Some(trouble(IDENTITY, troubles));
            }
            asked
        });
    }

    /// The guest has had time enough to be itself.
    pub fn identity_overdue(&self, reason: &str) {
        self.0.send_if_modified(|status| {
            let overdue = status.identity == Some(IdentityState::Pending);
            if overdue {
                status.identity = Some(IdentityState::Refused);
                status.trouble = Some(trouble(IDENTITY, reason));
            }
            overdue
        });
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
            status.clock_awaited = false;
            let quickest = [status.boot_clock, boot_clock].into_iter().flatten();
            status.boot_clock = quickest.min_by_key(|clock| clock.round_trip_ns);
        });
    }

    /// The host's clock has jumped, and the agent was told to compare the guest's; or it has had time enough for that.
    pub fn clock_awaited(&self, awaited: bool) {
        self.0
            .send_if_modified(|status| std::mem::replace(&mut status.clock_awaited, awaited) != awaited);
    }

    /// The guest told of its memory.
    pub fn memory(&self, memory: GuestMemory) {
        self.0.send_modify(|status| status.memory = Some(memory));
    }

    /// The engine changed state.
    pub fn engine(&self, engine: EngineState) {
        self.0.send_modify(|status| {
            if matches!(engine, EngineState::Failed { .. }) {
                status.engine_failures = status.engine_failures.saturating_add(1);
            }
            status.engine = Some(engine);
            match status.engine {
                Some(EngineState::Ready) => engine_may_serve(status),
                _ => engine_lost(status),
            }
        });
    }

    /// What the VM begins with.
    pub fn origin(&self, origin: Origin) {
        self.0.send_modify(|status| status.origin = origin);
    }

    /// How far the template of it is, if one is made. As long as that is [`TemplateState::Awaited`], its engine serves nobody.
    pub fn template(&self, template: Option<TemplateState>) {
        self.0.send_modify(|status| {
            status.template = template;
            engine_may_serve(status);
        });
    }

    /// Waits while a template of it is being written.
    pub async fn template_written(&self) {
        let mut watch = self.watch();
        // The sender is this.
        let _ = watch
            .wait_for(|status| {
                status.template != Some(TemplateState::Writing) || status.phase == Phase::Ended
            })
            .await;
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

/// The status of a VM of which nothing runs but the supervisor.
fn status(vm: &Vm, started_ns: u64) -> Status {
    Status {
        name: vm.name.to_string(),
        phase: Phase::Starting,
        supervisor_pid: std::process::id(),
        monitor_pid: None,
        network_pid: None,
        cpus: vm.settings.cpus,
        memory_mib: vm.settings.memory.mib(),
        docker_socket: vm.paths.docker_socket().display().to_string(),
        started_unix_ms: crate::clock::unix_ms(),
        timeline: Timeline {
            supervisor_started_ns: Some(started_ns),
            ..Timeline::default()
        },
        agent_version: None,
        steps: vec![],
        engine: None,
        engine_failures: 0,
        clock_offset_ns: None,
        clock_awaited: false,
        boot_clock: None,
        memory: None,
        identity: None,
        cage: None,
        origin: Origin::default(),
        template: None,
        trouble: None,
        wake_failures: 0,
        activity: None,
        end: None,
    }
}

fn trouble(device: &str, reason: &str) -> Trouble {
    Trouble {
        device: device.into(),
        reason: reason.into(),
        unix_ms: crate::clock::unix_ms(),
    }
}

/// Whether the guest was booted, or has an identity of its own.
fn is_itself(status: &Status) -> bool {
    matches!(status.identity, None | Some(IdentityState::Taken))
}

/// The engine is ready, or what kept it from serving is over.
fn engine_may_serve(status: &mut Status) {
    let ready = status.engine == Some(EngineState::Ready);
    if !ready || !is_itself(status) || status.template == Some(TemplateState::Awaited) {
        return;
    }
    status
        .timeline
        .engine_ready_ns
        .get_or_insert(crate::clock::monotonic_ns());
    advance(status, Phase::Ready);
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
    status.phase >= Phase::Ready || engine_given_up(status) || status.identity == Some(IdentityState::Refused)
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

#[cfg(test)]
pub mod testing {
    use super::*;
    use crate::paths::Paths;
    use crate::vm::testing::settings;
    use std::path::Path;

    /// A VM that is nowhere, and its state.
    pub fn vm_and_state() -> (Vm, State) {
        let root = Path::new("/nonexistent");
        let paths = Paths {
            config_file: root.join("config.toml"),
            vms: root.join("vms"),
            artifacts: root.join("artifacts"),
            runtime: root.join("run"),
            snapshots: root.join("snapshots"),
            templates: root.join("templates"),
        };
        let name = "a".parse().unwrap();
        let vm = Vm {
            paths: paths.vm(&name),
            name,
            settings: settings(1 << 20),
        };
        let state = State::new(&vm, 0);
        (vm, state)
    }
}

#[cfg(test)]
mod tests {
    use super::testing::vm_and_state;
    use super::*;

    fn state() -> State {
        vm_and_state().1
    }

    #[tokio::test]
    async fn an_engine_of_a_snapshot_is_ready_when_the_guest_is_itself() {
        let state = state();
        state.identity_awaited();
        state.engine(EngineState::Ready);
        assert!(!engine_settled(&state.watch().borrow()));
        state.identity_taken(true, "one; another");
        let status = state.watch().borrow().clone();
        assert_eq!(
            (status.phase, status.identity),
            (Phase::Ready, Some(IdentityState::Taken))
        );
        let trouble = status.trouble.unwrap();
        assert_eq!(
            (trouble.device.as_str(), trouble.reason.as_str()),
            ("identity", "one; another")
        );
        // The engine may come later, too.
        let state = self::state();
        state.identity_awaited();
        state.identity_taken(true, "");
        assert_eq!(state.watch().borrow().trouble, None);
        state.engine(EngineState::Ready);
        assert_eq!(state.phase(), Phase::Ready);
    }

    #[tokio::test]
    async fn an_engine_that_becomes_a_template_serves_nobody_before_it_is_saved() {
        let state = state();
        state.template(Some(TemplateState::Awaited));
        state.engine(EngineState::Ready);
        assert!(!engine_settled(&state.watch().borrow()));
        state.template(Some(TemplateState::Writing));
        assert_eq!(state.phase(), Phase::Ready);
        let waiting = tokio::spawn({
            let state = state.clone();
            async move { state.template_written().await }
        });
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        state.template(Some(TemplateState::Made));
        waiting.await.unwrap();
        // One that cannot be made keeps nobody waiting, and makes no engine ready.
        let state = self::state();
        state.template(Some(TemplateState::Awaited));
        state.template(None);
        assert!(state.phase() < Phase::Ready);
        state.engine(EngineState::Ready);
        assert_eq!(state.phase(), Phase::Ready);
    }

    #[tokio::test]
    async fn a_guest_without_random_numbers_of_its_own_or_without_an_answer_is_refused() {
        for refuse in [
            |state: &State| state.identity_taken(false, "no seed"),
            |state: &State| state.identity_overdue("too late"),
        ] {
            let state = state();
            state.identity_awaited();
            refuse(&state);
            state.engine(EngineState::Ready);
            let status = state.watch().borrow().clone();
            assert!(engine_settled(&status));
            assert!(status.phase < Phase::Ready);
            assert!(status.trouble.is_some());
        }
        // Nobody has asked one that was booted, and one that has answered is not late.
        let state = state();
        state.identity_taken(false, "x");
        state.identity_overdue("x");
        assert_eq!(state.watch().borrow().identity, None);
    }
}
