//! Which VMs a template is good for: those that would boot as its own did.

use crate::config::Config;
use crate::error::{Context, Result};
use crate::mounts::Mount;
use crate::network::Network;
use crate::paths::Paths;
use crate::size::Size;
use crate::snapshots::{booted, manifest};
use crate::supervisor::machine::artifact_paths;
use crate::supervisor::{engine_settings, monitor, network};
use crate::vm::Settings;
use lighter_protocol::agent::EngineSettings;
use lighter_protocol::supervisor::UsedFile;
use serde::Serialize;
use sha2::{Digest, Sha256};
use std::fmt;
use std::fs::File;
use std::path::Path;

/// Bytes of the checksum that make a key.
const BYTES: usize = 8;

/// A checksum, in hexadecimal, of everything that shapes a guest before it serves. What is not in it is told anew to each guest
/// of a template, as to that of any snapshot: its name, its random ports, the path of its socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Key(String);

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What a VM boots with beside its settings.
#[derive(Clone, Debug, Serialize)]
pub struct Surroundings {
    /// Of the same version, and built anew, it may have devices that it had not.
    monitor: UsedFile,
    /// Kernel and image. Reading them at each start would take longer than the start.
    booted_from: [UsedFile; 2],
    /// Whether it has a network device.
    network: bool,
    /// Its shared folders.
    mounts: Vec<Mount>,
    /// What its engine is started with, and never told again.
    engine: EngineSettings,
}

impl Surroundings {
    /// Those that a VM of `settings` would have if it was booted now.
    ///
    /// # Errors
    /// When it could not be booted.
    pub fn of(paths: &Paths, settings: &Settings) -> Result<Self> {
        let config = Config::load(&paths.config_file)?;
        let [kernel, image] = artifact_paths(paths, &settings.kernel, &settings.image, &config);
        let has_network = settings.network != Network::None;
        let engine = engine_settings::of(settings, network::host_of(settings).is_some());
        let booted_from = [used(&kernel)?, used(&image)?];
        Self::new(booted_from, has_network, settings.mounts(), engine)
    }

    /// Those that a VM has, of this host's monitor.
    ///
    /// # Errors
    /// When there is no monitor.
    pub fn new(
        booted_from: [UsedFile; 2],
        network: bool,
        mounts: Vec<Mount>,
        engine: EngineSettings,
    ) -> Result<Self> {
        Ok(Self {
            monitor: used(&monitor::program()?)?,
            booted_from,
            network,
            mounts,
            engine,
        })
    }
}

fn used(path: &Path) -> Result<UsedFile> {
    let used = File::open(path).and_then(|file| booted::used(path, &file));
    used.context(|| format!("cannot read {}", path.display()))
}

impl Key {
    /// For VMs of `settings` and `surroundings`.
    ///
    /// # Errors
    /// When a path is no text.
    pub fn of(settings: &Settings, surroundings: &Surroundings) -> Result<Self> {
        #[derive(Serialize)]
        struct Everything<'a> {
            format: u64,
            lighter: &'a str,
            cpus: u16,
            memory: Size,
            disk: Size,
            network: &'a Network,
            host_access: bool,
            surroundings: &'a Surroundings,
        }
        let everything = Everything {
            format: manifest::FORMAT,
            lighter: env!("CARGO_PKG_VERSION"),
            cpus: settings.cpus,
            memory: settings.memory,
            disk: settings.disk,
            network: &settings.network,
            host_access: settings.host_access,
            surroundings,
        };
        let json = serde_json::to_vec(&everything).context(|| "cannot name a template".into())?;
        let sum = Sha256::digest(json);
        Ok(Self(
            sum[..BYTES].iter().map(|byte| format!("{byte:02x}")).collect(),
        ))
    }
}

#[cfg(test)]
pub mod testing {
    /// A key of that text.
    pub fn key(text: &str) -> super::Key {
        super::Key(text.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::testing::settings;

    fn surroundings() -> Surroundings {
        let file = |inode| UsedFile {
            path: "/nowhere".into(),
            inode,
            bytes: 3,
            modified_ns: 4,
        };
        Surroundings {
            monitor: file(0),
            booted_from: [file(1), file(2)],
            network: true,
            mounts: vec!["/srv/a".parse().unwrap()],
            engine: EngineSettings::default(),
        }
    }

    #[test]
    fn whatever_shapes_a_guest_is_in_the_key_and_nothing_else() {
        let key = |settings: &Settings, surroundings: &Surroundings| {
            Key::of(settings, surroundings).unwrap().to_string()
        };
        let (plain, around) = (settings(1 << 30), surroundings());
        let wanted = key(&plain, &around);
        assert_eq!(wanted.len(), 2 * BYTES);
        let mut other = plain.clone();
        other.throw_away = true;
        other.ports.default_address = Some("127.0.0.1".parse().unwrap());
        assert_eq!(key(&other, &around), wanted);
        let changes: [fn(&mut Settings); 5] = [
            |settings| settings.cpus += 1,
            |settings| settings.memory.0 += 1 << 20,
            |settings| settings.disk.0 += 1 << 20,
            |settings| settings.host_access ^= true,
            |settings| settings.network = Network::None,
        ];
        let mut keys = vec![wanted];
        for change in changes {
            let mut other = plain.clone();
            change(&mut other);
            keys.push(key(&other, &around));
        }
        let changes: [fn(&mut Surroundings); 9] = [
            |around| around.monitor.bytes += 1,
            |around| around.booted_from[0].modified_ns += 1,
            |around| around.booted_from[1].inode += 1,
            |around| around.network ^= true,
            |around| around.mounts[0].read_only ^= true,
            |around| around.mounts.clear(),
            |around| around.engine.certificates.push('x'),
            |around| around.engine.registry_mirrors.push("x".into()),
            |around| drop(around.engine.proxies.insert("HTTP_PROXY".into(), "x".into())),
        ];
        for change in changes {
            let mut other = around.clone();
            change(&mut other);
            keys.push(key(&plain, &other));
        }
        let number = keys.len();
        keys.sort();
        keys.dedup();
        assert_eq!(keys.len(), number);
    }
}
