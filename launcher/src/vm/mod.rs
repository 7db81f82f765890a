//! A VM on disk: its settings, its data disk, and how it last ended.

mod folder;
mod settings;

pub use settings::Settings;

use crate::autostart::Autostart;
use crate::config::{self, ConfigError};
use crate::disk::files::DiskFiles;
use crate::disk::{self, DiskSource};
use crate::error::{Code, Error};
use crate::lock;
use crate::name::Name;
use crate::paths::{Paths, VmPaths};
use crate::size::Size;
use lighter_disk::LayerError;
use lighter_protocol::supervisor::End;
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// Why a VM on disk cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// No settings under that name.
    #[error("there is no VM named {0}")]
    NoSuchVm(Name),
    /// Settings under that name.
    #[error("a VM named {0} exists already")]
    Exists(Name),
    /// The settings cannot be used.
    #[error("cannot read the settings of VM {0}")]
    Settings(Name, #[source] Box<ConfigError>),
    /// A file of the VM cannot be written.
    #[error("cannot write {}", .0.display())]
    Write(PathBuf, #[source] io::Error),
    /// The VM's folder cannot be read.
    #[error("cannot read {}", .0.display())]
    Read(PathBuf, #[source] io::Error),
    /// A layer of the data disk cannot be made or used.
    #[error("cannot use {} as a layer of a data disk", .0.display())]
    Layer(PathBuf, #[source] LayerError),
    /// Attempts to take snapshots that failed have left layers.
    #[error("the data disk {} has too many layers", .0.display())]
    TooManyLayers(PathBuf),
    /// A data disk lies where a new VM's would.
    #[error("{} is there already, with data and without a VM", .0.display())]
    StrayDisk(PathBuf),
    /// The data disk is gone.
    #[error("the data disk {} of VM {name} is missing", path.display())]
    DiskMissing {
        /// The VM.
        name: Name,
        /// The disk.
        path: PathBuf,
    },
    /// The data disk is shorter than it was made.
    #[error("the data disk {} is truncated: it has {actual} bytes of {wanted}", path.display())]
    DiskTruncated {
        /// The disk.
        path: PathBuf,
        /// Its length.
        actual: u64,
        /// What it should be.
        wanted: u64,
    },
    /// A smaller disk was asked for.
    #[error("the data disk of VM {name} has {} and cannot shrink to {}", now.human(), wanted.human())]
    Shrink {
        /// The VM.
        name: Name,
        /// Its disk.
        now: Size,
        /// What was asked for.
        wanted: Size,
    },
}

impl From<VmError> for Error {
    fn from(error: VmError) -> Self {
        let plain = Self::of(Code::Failure, &error);
        match &error {
            VmError::NoSuchVm(name) => Self::of(Code::NoSuchVm, &error).hint(format!(
                "lighter ls shows the VMs there are; lighter start {name} makes this one"
            )),
            VmError::Exists(name) => plain.hint(format!("choose another name, or lighter rm {name}")),
            VmError::Settings(..) => plain.hint("correct that file"),
            VmError::Write(..) | VmError::Read(..) => {
                plain.hint("check the folder's permissions and the free space")
            }
            VmError::Layer(..) => plain.hint(
                "check the free space; a file that is damaged has to come from a backup, with all others of that disk",
            ),
            VmError::TooManyLayers(_) => plain.hint("restart the VM: they become one when the next snapshot is taken"),
            VmError::StrayDisk(_) => {
                plain.hint("move that file away if its data matters, remove it otherwise")
            }
            VmError::DiskMissing { name, .. } => plain.hint(format!(
                "put the file back; or give up its data: lighter rm --force {name}, then start anew"
            )),
            VmError::DiskTruncated { .. } => {
                plain.hint("restore the file from a backup; nothing was changed in it")
            }
            VmError::Shrink { .. } => Self::of(Code::Usage, &error)
                .hint("a data disk only grows; make another VM for a smaller one"),
        }
    }
}

/// A VM that exists.
#[derive(Clone, Debug)]
pub struct Vm {
    /// Its name.
    pub name: Name,
    /// Its files.
    pub paths: VmPaths,
    /// What it is made of.
    pub settings: Settings,
}

impl Vm {
    /// Reads the VM `name`.
    ///
    /// # Errors
    /// When there is none, or its settings are not understood.
    pub fn load(paths: &Paths, name: &Name) -> Result<Self, VmError> {
        let files = paths.vm(name);
        let settings = match config::read(&files.settings()) {
            Err(ConfigError::Read(_, error)) if error.kind() == io::ErrorKind::NotFound => {
                return Err(VmError::NoSuchVm(name.clone()));
            }
            result => result.map_err(|error| VmError::Settings(name.clone(), Box::new(error)))?,
        };
        Ok(Self {
            name: name.clone(),
            paths: files,
            settings,
        })
    }

    /// Makes a VM. The caller holds its edit lock.
    ///
    /// # Errors
    /// When it exists, or a file cannot be made.
    pub fn create(
        paths: &Paths,
        name: &Name,
        settings: Settings,
        disk: DiskSource<'_>,
    ) -> Result<Self, VmError> {
        let files = paths.vm(name);
        if files.settings().exists() {
            return Err(VmError::Exists(name.clone()));
        }
        disk::refuse_stray(&files.disk())?;
        folder::sweep(paths);
        let begun = Self {
            name: name.clone(),
            paths: folder::begin(&files)?,
            settings,
        };
        let made = disk::make(&begun.paths.disk(), begun.settings.disk, disk)
            .and_then(|()| begun.save())
            .and_then(|()| folder::finish(&begun.paths, &files));
        made.inspect_err(|_| folder::give_up(&begun.paths))?;
        Ok(Self {
            paths: files,
            ..begun
        })
    }

    /// Changes the settings; a larger disk is grown first. The caller holds the edit lock, and the VM is stopped.
    ///
    /// # Errors
    /// When the disk would shrink, or a file cannot be written.
    pub fn change(&mut self, settings: Settings) -> Result<(), VmError> {
        if settings.disk < self.settings.disk {
            return Err(VmError::Shrink {
                name: self.name.clone(),
                now: self.settings.disk,
                wanted: settings.disk,
            });
        }
        if settings.disk > self.settings.disk {
            self.open_disk()?;
            self.disk()?.grow(settings.disk.0)?;
        }
        if settings != self.settings {
            self.settings = settings;
            self.save()?;
        }
        Ok(())
    }

    /// Whether nothing was ever written to its data disk.
    pub fn is_new(&self) -> bool {
        self.disk_used() == Some(Size(0))
    }

    /// Makes the data disk anew; what was in it is lost. The caller holds the edit lock, and the VM is stopped.
    ///
    /// # Errors
    /// When the file cannot be made; there is none then.
    pub fn renew_disk(&self, source: DiskSource<'_>) -> Result<(), VmError> {
        self.disk()?.remove();
        disk::make(&self.paths.disk(), self.settings.disk, source)
    }

    /// The files of the data disk.
    ///
    /// # Errors
    /// When the list of them cannot be read.
    pub fn disk(&self) -> Result<DiskFiles, VmError> {
        DiskFiles::of(&self.paths.disk())
    }

    /// Opens the files of the data disk, after checking that it is whole. Only the last can be written.
    ///
    /// # Errors
    /// When one is missing, the disk is shorter than it was made, or one cannot be opened.
    pub fn open_disk(&self) -> Result<Vec<File>, VmError> {
        self.disk()?.open(&self.name, self.settings.disk.0)
    }

    /// Bytes that the data disk takes on the host; what it has in common with others counts for each.
    pub fn disk_used(&self) -> Option<Size> {
        self.disk().ok()?.used().map(Size)
    }

    /// How the VM last ended, if it ever ran.
    pub fn last_end(&self) -> Option<End> {
        serde_json::from_slice(&std::fs::read(self.paths.end()).ok()?).ok()
    }

    /// Whether the VM's last life is over and nobody noted how: its supervisor was killed, or the host went down.
    pub fn vanished(&self) -> bool {
        let is_over = || !lock::is_held(&self.paths.life_lock());
        let blank = |text: Vec<u8>| !text.is_empty() && text.iter().all(|&byte| byte == b' ');
        // Asked twice: a life that is over before has said how, and none began since.
        is_over() && std::fs::read(self.paths.end()).is_ok_and(blank) && is_over()
    }

    /// Forgets how the VM ended before, and keeps room to say how this life ends: a full disk is a reason for an end.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn forget_end(&self) -> Result<(), VmError> {
        let path = self.paths.end();
        std::fs::write(&path, [b' '; END_ROOM]).map_err(|error| VmError::Write(path, error))
    }

    /// Notes how the VM ended.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn save_end(&self, end: &End) -> Result<(), VmError> {
        let path = self.paths.end();
        let json = serde_json::to_vec_pretty(end).map_err(|e| VmError::Write(path.clone(), e.into()))?;
        write_atomically(&path, &json).or_else(|error| overwrite(&path, &json).map_err(|_| error))
    }

    /// Removes its sockets, unless the engine's is systemd's. The caller knows that no supervisor runs, or is it.
    pub fn remove_runtime(&self) {
        self.paths.remove_runtime(!Autostart::on_demand(&self.paths));
    }

    /// Removes everything of the VM but its edit lock. The caller holds that, and the VM is stopped.
    ///
    /// # Errors
    /// When a file cannot be removed.
    pub fn remove(self) -> Result<(), VmError> {
        self.remove_runtime();
        folder::take_away(&self.paths)
    }

    fn save(&self) -> Result<(), VmError> {
        let path = self.paths.settings();
        let text = toml::to_string(&self.settings)
            .map_err(|error| VmError::Write(path.clone(), io::Error::other(error)))?;
        write_atomically(&path, text.as_bytes())
    }
}

/// The names of all VMs, sorted.
///
/// # Errors
/// When the folder is there and cannot be read.
pub fn list(paths: &Paths) -> Result<Vec<Name>, VmError> {
    let read = |error| VmError::Read(paths.vms.clone(), error);
    let entries = match std::fs::read_dir(&paths.vms) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(vec![]),
        result => result.map_err(read)?,
    };
    let mut names = vec![];
    for entry in entries {
        let file_name = entry.map_err(read)?.file_name();
        if let Some(Ok(name)) = file_name.to_str().map(str::parse::<Name>)
            && paths.vm(&name).settings().exists()
        {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

/// How a VM ended that has vanished.
pub const VANISHED: &str = "its supervisor ended without a word: it was killed, perhaps by the host's kernel for want of memory, \
                            of which the kernel's log tells, it could not write, or the host went down";

/// Room for an [`End`] with its last lines, bytes.
const END_ROOM: usize = 16 << 10;

/// Writes JSON over spaces. What does not fit is no JSON, and nobody is misled.
fn overwrite(path: &Path, json: &[u8]) -> io::Result<()> {
    File::options().write(true).open(path)?.write_all(json)
}

/// Writes a file that is there as a whole, or not at all.
///
/// # Errors
/// When it cannot be written.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> Result<(), VmError> {
    let write = || -> io::Result<()> {
        let folder = path.parent().unwrap_or(Path::new("/"));
        let mut file = tempfile::NamedTempFile::new_in(folder)?;
        file.write_all(bytes)?;
        file.as_file().sync_all()?;
        file.persist(path)?;
        Ok(())
    };
    write().map_err(|error| VmError::Write(path.into(), error))
}

#[cfg(test)]
pub mod testing {
    use super::*;

    /// A small VM's, with a data disk of `disk` bytes.
    pub fn settings(disk: u64) -> Settings {
        Settings {
            cpus: 1,
            memory: Size(512 << 20),
            disk: Size(disk),
            kernel: None,
            image: None,
            mounts: None,
            network: crate::network::Network::default(),
            host_access: true,
            registry_mirrors: vec![],
            insecure_registries: vec![],
            throw_away: false,
            announce: false,
            strict: false,
            auto_suspend: crate::auto_suspend::AutoSuspend::default(),
            ports: crate::config::PortSettings::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::testing::settings;
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn a_vm_is_read_as_it_was_made_and_its_disk_takes_no_space() {
        let root = tempfile::tempdir().unwrap();
        let paths = Paths::at(root.path());
        let name: Name = "a".parse().unwrap();
        assert!(matches!(Vm::load(&paths, &name), Err(VmError::NoSuchVm(_))));
        Vm::create(&paths, &name, settings(8 * MIB), DiskSource::New).unwrap();
        let vm = Vm::load(&paths, &name).unwrap();
        assert_eq!(vm.settings, settings(8 * MIB));
        assert_eq!(vm.open_disk().unwrap()[0].metadata().unwrap().len(), 8 * MIB);
        assert_eq!(vm.disk_used(), Some(Size(0)));
        assert!(matches!(
            Vm::create(&paths, &name, settings(MIB), DiskSource::New),
            Err(VmError::Exists(_))
        ));
        assert_eq!(list(&paths).unwrap(), [name]);
        vm.remove().unwrap();
        assert_eq!(list(&paths).unwrap(), []);
    }

    #[test]
    fn a_disk_grows_and_never_shrinks() {
        let root = tempfile::tempdir().unwrap();
        let mut vm = Vm::create(
            &Paths::at(root.path()),
            &"a".parse().unwrap(),
            settings(8 * MIB),
            DiskSource::New,
        )
        .unwrap();
        vm.change(settings(16 * MIB)).unwrap();
        assert_eq!(vm.open_disk().unwrap()[0].metadata().unwrap().len(), 16 * MIB);
        assert!(matches!(
            vm.change(settings(8 * MIB)),
            Err(VmError::Shrink { .. })
        ));
        assert_eq!(vm.open_disk().unwrap()[0].metadata().unwrap().len(), 16 * MIB);
        // With layers, too.
        vm.disk().unwrap().add_layer(16 * MIB, true).unwrap();
        vm.change(settings(32 * MIB)).unwrap();
        let files = vm.open_disk().unwrap();
        assert_eq!(files.len(), 3);
        assert_eq!(lighter_disk::size(&files[2]).unwrap(), 32 * MIB);
        let shorter = Vm {
            settings: settings(64 * MIB),
            ..vm.clone()
        };
        assert!(matches!(
            shorter.open_disk(),
            Err(VmError::DiskTruncated { actual, .. }) if actual == 32 * MIB
        ));
        std::fs::remove_file(&vm.disk().unwrap().paths()[1]).unwrap();
        assert!(matches!(vm.open_disk(), Err(VmError::DiskMissing { .. })));
    }

    #[test]
    fn a_missing_or_truncated_disk_is_named_and_not_replaced() {
        let root = tempfile::tempdir().unwrap();
        let vm = Vm::create(
            &Paths::at(root.path()),
            &"a".parse().unwrap(),
            settings(8 * MIB),
            DiskSource::New,
        )
        .unwrap();
        File::create(vm.paths.disk()).unwrap().set_len(MIB).unwrap();
        assert!(matches!(
            vm.open_disk(),
            Err(VmError::DiskTruncated { actual: MIB, .. })
        ));
        std::fs::remove_file(vm.paths.disk()).unwrap();
        assert!(matches!(vm.open_disk(), Err(VmError::DiskMissing { .. })));
        assert!(!vm.paths.disk().exists());
    }

    #[test]
    fn data_without_settings_is_never_overwritten() {
        let root = tempfile::tempdir().unwrap();
        let paths = Paths::at(root.path());
        let name: Name = "a".parse().unwrap();
        let vm = Vm::create(&paths, &name, settings(8 * MIB), DiskSource::New).unwrap();
        std::fs::remove_file(vm.paths.settings()).unwrap();
        // As a `create` that was cut short leaves it.
        let vm = Vm::create(&paths, &name, settings(8 * MIB), DiskSource::New).unwrap();
        std::fs::remove_file(vm.paths.settings()).unwrap();
        std::fs::write(vm.paths.disk(), vec![1; 4096]).unwrap();
        assert!(matches!(
            Vm::create(&paths, &name, settings(8 * MIB), DiskSource::New),
            Err(VmError::StrayDisk(_))
        ));
    }

    #[test]
    fn an_end_is_forgotten_and_can_be_told_in_the_room_kept_for_it() {
        let root = tempfile::tempdir().unwrap();
        let vm = Vm::create(
            &Paths::at(root.path()),
            &"a".parse().unwrap(),
            settings(MIB),
            DiskSource::New,
        )
        .unwrap();
        let end = End {
            reason: lighter_protocol::monitor::StopReason::PowerOff,
            requested: true,
            unix_ms: 7,
            hint: None,
            last_lines: vec!["a line".into(); 20],
        };
        vm.save_end(&end).unwrap();
        assert_eq!(vm.last_end(), Some(end.clone()));
        assert!(!vm.vanished());
        vm.forget_end().unwrap();
        assert_eq!(vm.last_end(), None);
        let life = lock::Lock::acquire(&vm.paths.life_lock()).unwrap();
        assert!(!vm.vanished(), "it runs");
        drop(life);
        assert!(vm.vanished());
        overwrite(&vm.paths.end(), &serde_json::to_vec(&end).unwrap()).unwrap();
        assert_eq!(vm.last_end(), Some(end));
    }
}
