//! What a VM is made of, as `vm.toml` has it.

use crate::auto_suspend::AutoSuspend;
use crate::config::PortSettings;
use crate::mounts::{self, Mount};
use crate::network::Network;
use crate::registry::{Mirror, Registry};
use crate::size::Size;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::time::Duration;

/// What a VM is made of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// vCPUs.
    pub cpus: u16,
    /// Guest memory.
    pub memory: Size,
    /// The data disk's length.
    pub disk: Size,
    /// The guest's kernel, if not the installed one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kernel: Option<PathBuf>,
    /// The guest's root file system, if not the installed one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image: Option<PathBuf>,
    /// How it reaches the network.
    #[serde(default, skip_serializing_if = "Network::is_default")]
    pub network: Network,
    /// Whether the guest reaches services on the host's loopback interface.
    #[serde(default = "yes", skip_serializing_if = "is_yes")]
    pub host_access: bool,
    /// Mirrors of Docker's registry.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub registry_mirrors: Vec<Mirror>,
    /// Registries without TLS, or whose certificates are not checked.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub insecure_registries: Vec<Registry>,
    /// Host folders that the guest sees; `None` is the home folder of whoever starts the VM.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mounts: Option<Vec<Mount>>,
    /// Lives as long as the process that started it, and leaves nothing.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub throw_away: bool,
    /// The agent announces its milestones on the console.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub announce: bool,
    /// After how much idle time it suspends by itself.
    #[serde(default, skip_serializing_if = "AutoSuspend::is_off")]
    pub auto_suspend: AutoSuspend,
    /// It runs with all layers of the monitor's cage, or not at all.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub strict: bool,
    /// Published ports.
    #[serde(default, skip_serializing_if = "PortSettings::is_empty")]
    pub ports: PortSettings,
}

fn yes() -> bool {
    true
}

fn is_yes(value: &bool) -> bool {
    *value
}

impl Settings {
    /// After how much idle time it suspends by itself; one that lives only as long as a command does not.
    pub fn suspends_after(&self) -> Option<Duration> {
        self.auto_suspend.0.filter(|_| !self.throw_away)
    }

    /// The host folders that the guest sees.
    pub fn mounts(&self) -> Vec<Mount> {
        let home = || mounts::home().into_iter().collect();
        self.mounts.clone().unwrap_or_else(home)
    }
}
