//! `config.toml`: what a VM is made with when the command line does not say.
//!
//! - `keys`: its keys by name
//! - `edit`: changes that keep the rest as it is

pub mod edit;
pub mod keys;

use crate::auto_suspend::AutoSuspend;
use crate::error::{Code, Error};
use crate::mounts::Mount;
use crate::network::Network;
use crate::registry::{Mirror, Registry};
use crate::size::{Size, SizeError, check_cpus, check_disk, check_memory};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

/// Why a TOML file of ours cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// It is there and cannot be read.
    #[error("cannot read {}", .0.display())]
    Read(PathBuf, #[source] io::Error),
    /// It is not TOML, or has a key or a value that is not understood.
    #[error("{}:{line}: {message}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
        /// What is wrong.
        message: String,
    },
    /// A value is out of range.
    #[error("{}: {key}", path.display())]
    OutOfRange {
        /// The file.
        path: PathBuf,
        /// The key.
        key: &'static str,
        /// Why.
        #[source]
        source: SizeError,
    },
}

impl From<ConfigError> for Error {
    fn from(error: ConfigError) -> Self {
        let code = match error {
            ConfigError::Read(..) => Code::Failure,
            ConfigError::Malformed { .. } | ConfigError::OutOfRange { .. } => Code::Usage,
        };
        Self::of(code, &error).hint("correct that file, or remove it to use the defaults")
    }
}

/// Defaults for new VMs. Every key may be left out.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
    /// vCPUs.
    pub cpus: Option<i64>,
    /// Guest memory.
    pub memory: Option<Size>,
    /// The data disk.
    pub disk: Option<Size>,
    /// The guest's kernel.
    pub kernel: Option<PathBuf>,
    /// The guest's root file system.
    pub image: Option<PathBuf>,
    /// Whether starting a VM makes and selects a docker context.
    pub context: Option<bool>,
    /// Whether new VMs start from templates, and leave one behind where there is none.
    pub template: Option<bool>,
    /// Whether the VM `default` is to be what programs find at /var/run/docker.sock.
    pub default_socket: bool,
    /// How VMs reach the network.
    pub network: Network,
    /// Whether guests reach services on the host's loopback interface.
    pub host_access: Option<bool>,
    /// The proxy for HTTP of engines, builds and containers, in place of the environment's; empty is none.
    pub http_proxy: Option<String>,
    /// That for HTTPS.
    pub https_proxy: Option<String>,
    /// What is reached without a proxy.
    pub no_proxy: Option<String>,
    /// Mirrors of Docker's registry.
    pub registry_mirrors: Vec<Mirror>,
    /// Registries without TLS, or whose certificates are not checked.
    pub insecure_registries: Vec<Registry>,
    /// Host folders that the guest sees, instead of the user's home folder.
    pub mounts: Option<Vec<Mount>>,
    /// After how much idle time VMs suspend by themselves.
    pub auto_suspend: AutoSuspend,
    /// Whether VMs run with all layers of the monitor's cage, or not at all.
    pub strict: bool,
    /// Published ports.
    pub ports: PortSettings,
}

/// The table `[ports]`, of a VM's settings as well.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct PortSettings {
    /// Where ports are published that Docker would publish on all addresses.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub default_address: Option<IpAddr>,
}

impl PortSettings {
    /// Whether nothing is set.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

impl Config {
    /// Reads `path`; a file that is not there holds nothing.
    ///
    /// # Errors
    /// When it is there and cannot be used.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        match text(path) {
            Err(ConfigError::Read(_, error)) if error.kind() == io::ErrorKind::NotFound => {
                Ok(Self::default())
            }
            result => Self::parse(&result?, path),
        }
    }

    /// Understands `text`, which is in the file `path`.
    ///
    /// # Errors
    /// When it cannot be used.
    fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let config: Self = parse(text, path)?;
        let check = |key, result: Result<(), SizeError>| {
            result.map_err(|source| ConfigError::OutOfRange {
                path: path.into(),
                key,
                source,
            })
        };
        check("cpus", config.cpus.map_or(Ok(()), |n| check_cpus(n).map(drop)))?;
        check(
            "memory",
            config.memory.map_or(Ok(()), |n| check_memory(n).map(drop)),
        )?;
        check("disk", config.disk.map_or(Ok(()), |n| check_disk(n).map(drop)))?;
        Ok(config)
    }
}

/// Reads a TOML file, and says where it is wrong.
///
/// # Errors
/// When it cannot be read or is not a `T`.
pub fn read<T: DeserializeOwned>(path: &Path) -> Result<T, ConfigError> {
    parse(&text(path)?, path)
}

fn text(path: &Path) -> Result<String, ConfigError> {
    std::fs::read_to_string(path).map_err(|error| ConfigError::Read(path.into(), error))
}

fn parse<T: DeserializeOwned>(text: &str, path: &Path) -> Result<T, ConfigError> {
    toml::from_str(text).map_err(|error| {
        let before = &text.as_bytes()[..error.span().map_or(0, |span| span.start.min(text.len()))];
        ConfigError::Malformed {
            path: path.into(),
            line: 1 + before.iter().filter(|&&byte| byte == b'\n').count(),
            message: error.message().trim().replace('\n', " "),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use lighter_protocol::causes::chain;

    fn load(text: &str) -> Result<Config, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config.toml");
        std::fs::write(&path, text).unwrap();
        Config::load(&path).map_err(|error| chain(&error).replace(folder.path().to_str().unwrap(), ""))
    }

    #[test]
    fn sizes_are_text_with_a_unit_or_gib() {
        let config = load("cpus = 2\nmemory = \"512m\"\ndisk = 3\n").unwrap();
        assert_eq!(config.cpus, Some(2));
        assert_eq!(config.memory, Some(Size(512 << 20)));
        assert_eq!(config.disk, Some(Size(3 << 30)));
    }

    #[test]
    fn an_unknown_key_is_refused_with_its_line() {
        let error = load("cpus = 2\n\nmemroy = \"2g\"\n").unwrap_err();
        assert!(
            error.starts_with("/config.toml:3: unknown field `memroy`"),
            "{error}"
        );
    }

    #[test]
    fn published_ports_have_a_default_address_or_none() {
        let config = load("cpus = 1\n[ports]\ndefault-address = \"127.0.0.1\"\n").unwrap();
        assert_eq!(config.ports.default_address.unwrap().to_string(), "127.0.0.1");
        assert!(load("cpus = 1").unwrap().ports.is_empty());
        let error = load("[ports]\ndefault-address = \"localhost\"\n").unwrap_err();
        assert!(error.starts_with("/config.toml:2: "), "{error}");
    }

    #[test]
    fn a_network_is_one_of_those_there_are() {
        let config = load("network = \"tap:tap0,address=10.0.0.2/8\"\n").unwrap();
        assert!(matches!(config.network, Network::Tap(_)));
        assert!(load("").unwrap().network.is_default());
        let error = load("cpus = 1\nnetwork = \"bridge\"\n").unwrap_err();
        assert!(
            error.starts_with("/config.toml:2: \"bridge\" is no network"),
            "{error}"
        );
    }

    #[test]
    fn a_vm_suspends_after_a_time_or_never() {
        let config = load("auto-suspend = \"10m\"\n").unwrap();
        assert_eq!(config.auto_suspend.to_string(), "10m");
        assert!(load("").unwrap().auto_suspend.is_off());
        let error = load("cpus = 1\nauto-suspend = \"soon\"\n").unwrap_err();
        assert!(
            error.starts_with("/config.toml:2: \"soon\" is no time"),
            "{error}"
        );
    }

    #[test]
    fn a_value_out_of_range_names_its_key() {
        let error = load("cpus = 0\n").unwrap_err();
        assert!(error.starts_with("/config.toml: cpus: "), "{error}");
        assert!(load("disk = -1").is_err());
    }

    #[test]
    fn a_file_that_is_not_there_holds_nothing() {
        assert_eq!(
            Config::load(Path::new("/nonexistent/config.toml")).unwrap(),
            Config::default()
        );
    }
}
