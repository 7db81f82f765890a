//! Options that say what a VM is made of.

use crate::auto_suspend::AutoSuspend;
use crate::config::{Config, PortSettings};
use crate::error::{Code, Context, Error, Result};
use crate::mounts::{self, Mount};
use crate::network::Network;
use crate::registry::{Mirror, Registry};
use crate::size::{self, Size};
use crate::vm::Settings;
use clap::Args;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// What a VM is made of.
#[derive(Clone, Debug, Default, Args)]
pub struct MachineOptions {
    /// vCPUs [default: the host's CPUs, at most 4]
    #[arg(short, long, value_name = "N", value_parser = size::cpus, allow_negative_numbers = true)]
    pub cpus: Option<u16>,
    /// Guest memory, such as 512m or 2g; a bare number is GiB [default: 2g, at most a quarter of the host's]
    #[arg(short, long, value_name = "SIZE", value_parser = size::memory, allow_hyphen_values = true)]
    pub memory: Option<Size>,
    /// Data disk, such as 20g; it takes space only as it fills, and can grow later [default: 20g]
    #[arg(short, long, value_name = "SIZE", value_parser = size::disk, allow_hyphen_values = true)]
    pub disk: Option<Size>,
    /// Boot this kernel (an ELF vmlinux or a bzImage) instead of the installed one
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// Boot this root file system (erofs) instead of the installed one
    #[arg(long, value_name = "FILE")]
    pub image: Option<PathBuf>,
    /// How the guest reaches the network: passt, none, or by an interface of the host's, such as
    /// tap:tap0,address=192.168.50.2/24,gateway=192.168.50.1 [default: passt]
    #[arg(long, value_name = "NETWORK")]
    pub network: Option<Network>,
    /// Do not let the guest reach services on the host's loopback interface (host.docker.internal)
    #[arg(long, overrides_with = "host_access")]
    pub no_host_access: bool,
    /// Let it reach them after all [default]
    #[arg(long, hide_short_help = true)]
    pub host_access: bool,
    /// Pull from this mirror of Docker's registry first; may be repeated
    #[arg(long = "registry-mirror", value_name = "URL")]
    pub registry_mirrors: Vec<Mirror>,
    /// Speak to this registry without TLS, or without checking its certificate; may be repeated
    #[arg(long = "insecure-registry", value_name = "HOST[:PORT]")]
    pub insecure_registries: Vec<Registry>,
    /// Share this folder of the host at the same path in the guest, :ro for reading only; may be repeated [default: the home
    /// folder]
    #[arg(long = "mount", value_name = "PATH[:ro]")]
    pub mounts: Vec<String>,
    /// Share no folder
    #[arg(long, conflicts_with = "mounts")]
    pub no_mounts: bool,
    /// Suspend by itself when it has been idle for that long, such as 10m, and go on when its socket or a published port is used
    /// [default: off]
    #[arg(long, value_name = "TIME|off")]
    pub auto_suspend: Option<AutoSuspend>,
    /// Run with all layers that keep a hostile guest from the host, or not at all; `lighter doctor` says which there are
    #[arg(long, overrides_with = "no_strict")]
    pub strict: bool,
    /// Run with those that this host has [default]
    #[arg(long, hide_short_help = true)]
    pub no_strict: bool,
}

impl MachineOptions {
    /// Whether nothing was given.
    pub fn is_empty(&self) -> bool {
        self.arguments().is_empty()
    }

    /// As they were given, for a process that is to get the same.
    pub fn arguments(&self) -> Vec<OsString> {
        let Self {
            cpus,
            memory,
            disk,
            kernel,
            image,
            network,
            no_host_access,
            host_access,
            registry_mirrors,
            insecure_registries,
            mounts,
            no_mounts,
            auto_suspend,
            strict,
            no_strict,
        } = self;
        let mut arguments: Vec<OsString> = vec![];
        let mut add = |name: &str, value: OsString| arguments.extend([name.into(), value]);
        let mut texts = |name: &str, value: Option<String>| {
            if let Some(value) = value {
                add(name, value.into());
            }
        };
        texts("--cpus", cpus.map(|cpus| cpus.to_string()));
        texts("--memory", memory.map(|size| size.to_string()));
        texts("--disk", disk.map(|size| size.to_string()));
        texts("--auto-suspend", auto_suspend.map(|time| time.to_string()));
        texts("--network", network.as_ref().map(ToString::to_string));
        for mirror in registry_mirrors {
            texts("--registry-mirror", Some(mirror.to_string()));
        }
        for registry in insecure_registries {
            texts("--insecure-registry", Some(registry.to_string()));
        }
        for mount in mounts {
            texts("--mount", Some(mount.clone()));
        }
        for (name, path) in [("--kernel", kernel), ("--image", image)] {
            if let Some(path) = path {
                add(name, path.into());
            }
        }
        let switches = [
            ("--no-host-access", *no_host_access),
            ("--host-access", *host_access),
            ("--no-mounts", *no_mounts),
            ("--strict", *strict),
            ("--no-strict", *no_strict),
        ];
        let given = switches.into_iter().filter(|(_, given)| *given);
        arguments.extend(given.map(|(name, _)| name.into()));
        arguments
    }

    /// The folders to share, if any were chosen; each must be there.
    fn mounts(&self) -> Result<Option<Vec<Mount>>> {
        if self.mounts.is_empty() {
            return Ok(self.no_mounts.then(Vec::new));
        }
        let mounts: std::result::Result<Vec<Mount>, _> =
            self.mounts.iter().map(|text| text.parse()).collect();
        let mounts = mounts::checked(mounts?)?;
        for mount in &mounts {
            mount.open().map_err(|error| Error {
                code: Code::Usage,
                ..error
            })?;
        }
        Ok(Some(mounts))
    }

    /// The settings of a new VM: the options, else the configuration, else the defaults.
    ///
    /// # Errors
    /// When a path cannot be made absolute, or a folder cannot be shared.
    pub fn settings(&self, config: &Config) -> Result<Settings> {
        let configured_cpus = config.cpus.and_then(|n| u16::try_from(n).ok());
        Ok(Settings {
            cpus: self.cpus.or(configured_cpus).unwrap_or_else(size::default_cpus),
            memory: self.memory.or(config.memory).unwrap_or_else(size::default_memory),
            disk: self.disk.or(config.disk).unwrap_or_else(size::default_disk),
            kernel: self.kernel.as_deref().map(absolute).transpose()?,
            image: self.image.as_deref().map(absolute).transpose()?,
            network: self.network.clone().unwrap_or_else(|| config.network.clone()),
            host_access: chosen(self.host_access, self.no_host_access)
                .or(config.host_access)
                .unwrap_or(true),
            registry_mirrors: given(&self.registry_mirrors, &config.registry_mirrors),
            insecure_registries: given(&self.insecure_registries, &config.insecure_registries),
            mounts: match (self.mounts()?, &config.mounts) {
                (None, Some(mounts)) => Some(mounts::checked(mounts.clone())?),
                (mounts, _) => mounts,
            },
            throw_away: false,
            announce: false,
            strict: chosen(self.strict, self.no_strict).unwrap_or(config.strict),
            auto_suspend: self.auto_suspend.unwrap_or(config.auto_suspend),
            ports: PortSettings::default(),
        })
    }

    /// The settings of a VM that exists, changed by the options.
    ///
    /// # Errors
    /// When a path cannot be made absolute, or a folder cannot be shared.
    pub fn change(&self, old: &Settings) -> Result<Settings> {
        let path = |new: &Option<PathBuf>, old: &Option<PathBuf>| match new {
            Some(path) => absolute(path).map(Some),
            None => Ok(old.clone()),
        };
        Ok(Settings {
            cpus: self.cpus.unwrap_or(old.cpus),
            memory: self.memory.unwrap_or(old.memory),
            disk: self.disk.unwrap_or(old.disk),
            kernel: path(&self.kernel, &old.kernel)?,
            image: path(&self.image, &old.image)?,
            network: self.network.clone().unwrap_or_else(|| old.network.clone()),
            host_access: chosen(self.host_access, self.no_host_access).unwrap_or(old.host_access),
            registry_mirrors: given(&self.registry_mirrors, &old.registry_mirrors),
            insecure_registries: given(&self.insecure_registries, &old.insecure_registries),
            mounts: self.mounts()?.or_else(|| old.mounts.clone()),
            throw_away: old.throw_away,
            announce: old.announce,
            strict: chosen(self.strict, self.no_strict).unwrap_or(old.strict),
            auto_suspend: self.auto_suspend.unwrap_or(old.auto_suspend),
            ports: old.ports.clone(),
        })
    }
}

/// What was chosen by an option and its opposite, if anything.
fn chosen(yes: bool, no: bool) -> Option<bool> {
    (yes || no).then_some(!no)
}

/// What was given, or what holds when nothing was.
fn given<T: Clone>(given: &[T], otherwise: &[T]) -> Vec<T> {
    match given {
        [] => otherwise.to_vec(),
        given => given.to_vec(),
    }
}

fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path).context(|| format!("cannot use the path {}", path.display()))
}
