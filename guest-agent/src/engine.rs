//! The engine: containerd and dockerd, started side by side (dockerd waits for containerd's socket by itself).
//!
//! When containerd dies, containers and dockerd go on; a new containerd finds its containers again and dockerd
//! connects to it by itself. When dockerd dies, a new one ends the containers that were left and starts those whose
//! restart policy says so (Docker's own behaviour without `live-restore`, which stays off since with it containers
//! would outlive an orderly stop).

use std::{
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use lighter_protocol::{
    agent::{AgentMessage, EngineSettings, EngineState, LogSource},
    causes::chain,
    network::GATEWAY,
};
use tokio::{sync::watch, task::JoinHandle, time::sleep};

use crate::{
    cgroup,
    daemon::{Spec, supervise},
    docker_port::ENGINE_SOCKET,
    log::Log,
    network,
    outbox::Outbox,
    proxy,
    random_ports::{self, Given},
    shares,
};

const CONTAINERD_SOCKET: &str = "/run/containerd/containerd.sock";
const CONTAINERD_CONFIG: &str = "/run/lighter/containerd.toml";

/// Whom the host trusts.
const CERTIFICATES: &str = "/run/lighter/certificates.pem";

/// dockerd gives containers their time to stop at first, each its own; this bounds the whole of it.
const DOCKERD_STOP_S: u64 = 120;

/// What dockerd does not use of containerd is not started.
const CONTAINERD_TOML: &str = r#"version = 2
root = "/var/lib/containerd"
state = "/run/containerd"
disabled_plugins = [
  "io.containerd.grpc.v1.cri",
  "io.containerd.internal.v1.opt",
  "io.containerd.internal.v1.restart",
  "io.containerd.internal.v1.tracing",
  "io.containerd.tracing.processor.v1.otlp",
  "io.containerd.nri.v1.nri",
  "io.containerd.snapshotter.v1.aufs",
  "io.containerd.snapshotter.v1.blockfile",
  "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper",
  "io.containerd.snapshotter.v1.native",
  "io.containerd.snapshotter.v1.zfs",
]
[grpc]
  address = "/run/containerd/containerd.sock"
"#;

/// The engine's state, told to the supervisor when it changes; clones share it.
#[derive(Clone, Debug)]
pub struct State {
    sender: watch::Sender<EngineState>,
    outbox: Outbox,
}

impl State {
    /// An engine about to start.
    pub fn new(outbox: Outbox) -> Self {
        Self {
            sender: watch::Sender::new(EngineState::Starting),
            outbox,
        }
    }

    /// Changes it.
    pub fn set(&self, state: EngineState) {
        let changed = self.sender.send_if_modified(|current| {
            let changed = *current != state;
            current.clone_from(&state);
            changed
        });
        if changed {
            self.outbox.push(AgentMessage::Engine(state));
        }
    }

    /// To see it change.
    pub fn subscribe(&self) -> watch::Receiver<EngineState> {
        self.sender.subscribe()
    }
}

/// The running engine.
#[derive(Debug)]
pub struct Engine {
    containerd: (watch::Sender<bool>, JoinHandle<()>),
    dockerd: (watch::Sender<bool>, JoinHandle<()>),
}

impl Engine {
    /// Starts both daemons and keeps them running.
    pub fn start(
        log: &Log,
        outbox: &Outbox,
        state: &State,
        settings: &EngineSettings,
        random_ports: &Given,
    ) -> Self {
        for (path, text) in [
            (CONTAINERD_CONFIG, CONTAINERD_TOML),
            (CERTIFICATES, &settings.certificates),
        ] {
            if let Err(error) = std::fs::write(path, text) {
                log.error(format!("cannot write {path}: {error}"));
            }
        }
        let both = Arc::new(Mutex::new([EngineState::Starting, EngineState::Starting]));
        let ports = random_ports.file().unwrap_or_else(|error| {
            log.error(chain(&error));
            None
        });
        let start = |index: usize, spec: Spec| {
            let (stop, stop_receiver) = watch::channel(false);
            let (both, state) = (both.clone(), state.clone());
            let report = move |reported| {
                let mut both = both.lock().unwrap_or_else(PoisonError::into_inner);
                both[index] = reported;
                let [containerd, dockerd] = &*both;
                state.set(combine(containerd, dockerd));
            };
            let task = tokio::spawn(supervise(
                spec,
                log.clone(),
                outbox.clone(),
                stop_receiver,
                report,
            ));
            (stop, task)
        };
        Self {
            containerd: start(0, containerd()),
            dockerd: start(1, dockerd(settings, ports)),
        }
    }

    /// Stops containers, then dockerd, then containerd. dockerd lets every container have its own time to stop;
    /// after `grace` those that are left are killed.
    pub async fn stop(self, log: &Log, grace: Option<Duration>) {
        let (stop, task) = self.dockerd;
        stop.send_replace(true);
        let stopping = async { task.await.is_ok() };
        tokio::pin!(stopping);
        let limit = async {
            match grace {
                Some(grace) => sleep(grace).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            _ = &mut stopping => {}
            () = limit => {
                if let Err(error) = cgroup::kill_containers() {
                    log.error(format!("cannot kill the containers that did not stop in time: {error}"));
                }
                stopping.await;
            }
        }
        let (stop, task) = self.containerd;
        stop.send_replace(true);
        if task.await.is_err() {
            log.error("the supervision of containerd failed");
        }
    }
}

/// The engine's state from its daemons': what is worst, dockerd's first.
fn combine(containerd: &EngineState, dockerd: &EngineState) -> EngineState {
    let failed = |state: &&EngineState| matches!(state, EngineState::Failed { .. });
    let states = [dockerd, containerd];
    if let Some(state) = states.into_iter().find(failed) {
        return state.clone();
    }
    for state in [EngineState::Stopped, EngineState::Starting] {
        if states.contains(&&state) {
            return state;
        }
    }
    EngineState::Ready
}

fn containerd() -> Spec {
    Spec {
        name: "containerd",
        source: LogSource::Containerd,
        program: "/usr/bin/containerd",
        cannot_write: vec![],
        sees: None,
        arguments: vec!["--config".into(), CONTAINERD_CONFIG.into()],
        environment: vec![],
        notify_path: Path::new("/run/lighter/notify-containerd").into(),
        stop_limit: Duration::from_secs(60),
    }
}

fn dockerd(settings: &EngineSettings, random_ports: Option<&Path>) -> Spec {
    // What is wrong with the command line was told when the network was set up.
    let host = network::described()
        .ok()
        .flatten()
        .and_then(|network| network.host);
    let mut arguments = vec![
        format!("--host=unix://{ENGINE_SOCKET}"),
        format!("--containerd={CONTAINERD_SOCKET}"),
        // There is no systemd to ask.
        "--exec-opt=native.cgroupdriver=cgroupfs".into(),
        "--storage-driver=overlay2".into(),
        // Publishes ports on the host.
        format!("--userland-proxy-path=/usr/bin/{}", proxy::NAME),
        format!("--shutdown-timeout={DOCKERD_STOP_S}"),
        // The socket is root's: the only user of the guest.
        "--group=0".into(),
        // For containers that ask for `host-gateway`; without it, dockerd would take the guest for the host.
        format!("--host-gateway-ip={}", host.unwrap_or(GATEWAY)),
    ];
    let mirrors = settings.registry_mirrors.iter();
    arguments.extend(mirrors.map(|url| format!("--registry-mirror={url}")));
    let insecure = settings.insecure_registries.iter();
    arguments.extend(insecure.map(|registry| format!("--insecure-registry={registry}")));
    let mut environment: Vec<_> = settings.proxies.clone().into_iter().collect();
    if !settings.certificates.is_empty() {
        // Go's library reads it instead of the image's bundle.
        environment.push(("SSL_CERT_FILE".into(), CERTIFICATES.into()));
    }
    Spec {
        name: "dockerd",
        source: LogSource::Dockerd,
        program: "/usr/sbin/dockerd",
        arguments,
        environment,
        cannot_write: shares::not_the_hosts(),
        sees: random_ports.map(|file| (file.into(), random_ports::KERNELS.into())),
        notify_path: Path::new("/run/lighter/notify-dockerd").into(),
        stop_limit: Duration::from_secs(DOCKERD_STOP_S + 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failed(reason: &str) -> EngineState {
        EngineState::Failed {
            reason: reason.into(),
            last_lines: vec![],
            retry_in_ms: None,
        }
    }

    #[test]
    fn the_engine_is_ready_when_both_daemons_are() {
        use EngineState::{Ready, Starting, Stopped};
        assert_eq!(combine(&Ready, &Ready), Ready);
        assert_eq!(combine(&Starting, &Ready), Starting);
        assert_eq!(combine(&Ready, &Starting), Starting);
        assert_eq!(combine(&Ready, &Stopped), Stopped);
        assert_eq!(combine(&failed("c"), &Starting), failed("c"));
        assert_eq!(combine(&failed("c"), &failed("d")), failed("d"));
    }

    #[test]
    fn only_changes_are_told() {
        let outbox = Outbox::new();
        let state = State::new(outbox.clone());
        state.set(EngineState::Starting);
        assert_eq!(outbox.take(), None);
        state.set(EngineState::Ready);
        assert_eq!(outbox.take(), Some(AgentMessage::Engine(EngineState::Ready)));
        assert_eq!(*state.subscribe().borrow(), EngineState::Ready);
    }
}
