//! Where everything lies.
//!
//! | what | where | with `LIGHTER_HOME` |
//! |---|---|---|
//! | configuration | `$XDG_CONFIG_HOME/lighter/config.toml` | `$LIGHTER_HOME/config.toml` |
//! | VMs | `$XDG_DATA_HOME/lighter/vms/NAME/` | `$LIGHTER_HOME/vms/NAME/` |
//! | snapshots | `$XDG_DATA_HOME/lighter/snapshots/VM/SNAPSHOT/` | `$LIGHTER_HOME/snapshots/VM/SNAPSHOT/` |
//! | templates | `$XDG_DATA_HOME/lighter/templates/TEMPLATE/` | `$LIGHTER_HOME/templates/TEMPLATE/` |
//! | kernel and image | `$XDG_DATA_HOME/lighter/artifacts/` | `$LIGHTER_HOME/artifacts/` |
//! | sockets | `$XDG_RUNTIME_DIR/lighter/NAME/` | `$LIGHTER_HOME/run/NAME/` |

use crate::error::{Code, Error};
use crate::name::Name;
use rustix::fs::{Mode, Stat};
use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};

/// The longest path that fits into a Unix socket's address, bytes.
const MAX_SOCKET_PATH: usize = 107;

/// Why the folders cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PathsError {
    /// Neither `LIGHTER_HOME` nor `HOME` says where data goes.
    #[error("neither HOME nor LIGHTER_HOME is set to an absolute path")]
    NoHome,
    /// A path from the environment is relative.
    #[error("{variable} is {}, which is not an absolute path", path.display())]
    Relative {
        /// The environment variable.
        variable: &'static str,
        /// Its value.
        path: PathBuf,
    },
    /// A folder for sockets is somebody else's, or others may write to it.
    #[error("{} is not a folder of this user alone", .0.display())]
    NotOurs(PathBuf),
    /// A folder cannot be made.
    #[error("cannot make the folder {}", .0.display())]
    Create(PathBuf, #[source] io::Error),
    /// A socket's path is too long for the kernel.
    #[error("the socket path {} has {} bytes, and the kernel takes at most {MAX_SOCKET_PATH}", .0.display(), .0.as_os_str().len())]
    SocketPath(PathBuf),
}

impl From<PathsError> for Error {
    fn from(error: PathsError) -> Self {
        let plain = Self::of(Code::Failure, &error);
        match error {
            PathsError::NoHome => plain.hint("set LIGHTER_HOME to the folder that is to hold everything"),
            PathsError::Relative { variable, .. } => {
                Self::of(Code::Usage, &error).hint(format!("give {variable} a path that starts with /"))
            }
            PathsError::NotOurs(_) => plain.hint(
                "set XDG_RUNTIME_DIR or LIGHTER_HOME to a folder that belongs to you and that nobody else can write to",
            ),
            PathsError::Create(..) => plain.hint("set LIGHTER_HOME to a folder that you can write to"),
            PathsError::SocketPath(_) => Self::of(Code::Usage, &error)
                .hint("use a shorter VM name, or set XDG_RUNTIME_DIR or LIGHTER_HOME to a shorter path"),
        }
    }
}

/// The roots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Paths {
    /// `config.toml`.
    pub config_file: PathBuf,
    /// A folder for each VM.
    pub vms: PathBuf,
    /// A folder of snapshots for each VM that has some.
    pub snapshots: PathBuf,
    /// What new VMs start from.
    pub templates: PathBuf,
    /// `vmlinux` and `rootfs.erofs`.
    pub artifacts: PathBuf,
    /// A folder of sockets for each VM.
    pub runtime: PathBuf,
}

impl Paths {
    /// From the environment.
    ///
    /// # Errors
    /// When it does not say where data goes, or says it by a relative path.
    pub fn from_environment() -> Result<Self, PathsError> {
        Self::from_variables(|name| std::env::var_os(name), rustix::process::getuid().as_raw())
    }

    fn from_variables(get: impl Fn(&str) -> Option<OsString>, uid: u32) -> Result<Self, PathsError> {
        let absolute = |variable: &'static str| match get(variable).filter(|v| !v.is_empty()) {
            None => Ok(None),
            Some(value) => match PathBuf::from(value) {
                path if path.is_absolute() => Ok(Some(path)),
                path => Err(PathsError::Relative { variable, path }),
            },
        };
        if let Some(home) = absolute("LIGHTER_HOME")? {
            return Ok(Self::at(&home));
        }
        let below_home = |variable, below: &str| match absolute(variable)? {
            Some(path) => Ok(path),
            None => Ok(absolute("HOME")?.ok_or(PathsError::NoHome)?.join(below)),
        };
        let data = below_home("XDG_DATA_HOME", ".local/share")?.join("lighter");
        let runtime = match absolute("XDG_RUNTIME_DIR")? {
            Some(path) => path.join("lighter"),
            None => match PathBuf::from(format!("/run/user/{uid}")) {
                path if is_private(&path, uid) => path.join("lighter"),
                _ => PathBuf::from(format!("/tmp/lighter-{uid}")),
            },
        };
        Ok(Self {
            config_file: below_home("XDG_CONFIG_HOME", ".config")?.join("lighter/config.toml"),
            vms: data.join("vms"),
            snapshots: data.join("snapshots"),
            templates: data.join("templates"),
            artifacts: data.join("artifacts"),
            runtime,
        })
    }

    /// Everything below one folder.
    pub fn at(home: &Path) -> Self {
        Self {
            config_file: home.join("config.toml"),
            vms: home.join("vms"),
            snapshots: home.join("snapshots"),
            templates: home.join("templates"),
            artifacts: home.join("artifacts"),
            runtime: home.join("run"),
        }
    }

    /// The files of one VM.
    pub fn vm(&self, name: &Name) -> VmPaths {
        VmPaths {
            data: self.vms.join(name.as_str()),
            // Names never begin with a dot, so this is no VM's folder.
            edit_lock: self.vms.join(format!(".{name}.lock")),
            runtime: self.runtime.join(name.as_str()),
        }
    }

    /// The installed kernel.
    pub fn kernel(&self) -> PathBuf {
        self.artifacts.join("vmlinux")
    }

    /// The installed root file system.
    pub fn image(&self) -> PathBuf {
        self.artifacts.join("rootfs.erofs")
    }

    /// Held while `config.toml` is changed.
    pub fn config_lock(&self) -> PathBuf {
        // Names never begin with a dot, so this is no VM's.
        self.vms.join(".config.lock")
    }

    /// Held while the docker CLI's files are changed.
    pub fn contexts_lock(&self) -> PathBuf {
        // Names never begin with a dot, so this is no VM's.
        self.vms.join(".docker-contexts.lock")
    }

    /// Makes the folder that holds the VMs' folders.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn create_vms(&self) -> Result<(), PathsError> {
        create_private(&self.vms)
    }

    /// Makes the folder for the sockets of `vm`, and checks that it belongs to this user alone and that the sockets' paths
    /// are short enough.
    ///
    /// # Errors
    /// When one of that is not so.
    pub fn create_runtime(&self, vm: &VmPaths) -> Result<(), PathsError> {
        vm.check_socket_paths()?;
        self.check_runtime()?;
        create_own(&vm.runtime)
    }

    /// Makes the folder that holds the folders of sockets, and checks that it belongs to this user alone.
    ///
    /// # Errors
    /// When one of that is not so.
    pub fn check_runtime(&self) -> Result<(), PathsError> {
        create_own(&self.runtime)
    }
}

/// The files of one VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmPaths {
    /// The VM's folder: what survives a reboot.
    pub data: PathBuf,
    /// Held while a VM is made, started or removed; outside of the folder, so that it outlives it.
    pub edit_lock: PathBuf,
    /// The VM's sockets.
    pub runtime: PathBuf,
}

impl VmPaths {
    /// Its settings; a VM without it does not exist.
    pub fn settings(&self) -> PathBuf {
        self.data.join("vm.toml")
    }
    /// Held by the supervisor for its life.
    pub fn life_lock(&self) -> PathBuf {
        self.data.join("lock")
    }
    /// The guest's /dev/vdb.
    pub fn disk(&self) -> PathBuf {
        self.data.join("data.img")
    }
    /// How the VM last ended.
    pub fn end(&self) -> PathBuf {
        self.data.join("end.json")
    }
    /// What a suspended VM goes on from: a folder as a snapshot's.
    pub fn suspended(&self) -> PathBuf {
        self.data.join("suspended")
    }
    /// The same while it is being made: it may not be whole.
    pub fn suspending(&self) -> PathBuf {
        self.data.join(".suspending")
    }
    /// The same while a VM is made of it: the disk may have changed since.
    pub fn resuming(&self) -> PathBuf {
        self.data.join(".resuming")
    }
    /// That systemd starts the VM.
    pub fn autostart(&self) -> PathBuf {
        self.data.join("autostart.json")
    }
    /// The docker context that was selected before this VM's.
    pub fn previous_context(&self) -> PathBuf {
        self.data.join("previous-context")
    }
    /// A log.
    pub fn log(&self, source: crate::logs::Source) -> PathBuf {
        self.data.join(source.file_name())
    }
    /// The engine's API.
    pub fn docker_socket(&self) -> PathBuf {
        self.runtime.join("docker.sock")
    }
    /// The same, as `DOCKER_HOST` and docker's contexts name it.
    pub fn docker_host(&self) -> String {
        format!("unix://{}", self.docker_socket().display())
    }
    /// The supervisor's control socket.
    pub fn control_socket(&self) -> PathBuf {
        self.runtime.join("control.sock")
    }
    /// Where a supervisor that systemd starts meets the command that has asked for it.
    pub fn starter_socket(&self) -> PathBuf {
        self.runtime.join("starter.sock")
    }
    /// The monitor's control socket.
    pub fn monitor_socket(&self) -> PathBuf {
        self.runtime.join("monitor.sock")
    }
    /// The monitor's vsock muxer: host to guest.
    pub fn vsock_socket(&self) -> PathBuf {
        self.runtime.join("vsock.sock")
    }

    /// Checks that every socket's path fits into an address.
    ///
    /// # Errors
    /// The first that does not.
    pub fn check_socket_paths(&self) -> Result<(), PathsError> {
        let mut sockets = [self.docker_socket()]
            .into_iter()
            .chain(self.sockets_of_processes());
        match sockets.find(|p| p.as_os_str().len() > MAX_SOCKET_PATH) {
            Some(path) => Err(PathsError::SocketPath(path)),
            None => Ok(()),
        }
    }

    /// All but the engine's.
    fn sockets_of_processes(&self) -> [PathBuf; 4] {
        [
            self.control_socket(),
            self.monitor_socket(),
            self.vsock_socket(),
            self.starter_socket(),
        ]
    }

    /// Removes the sockets, but the engine's only if `engine`, and their folder if nothing is left in it. What is not there is no
    /// error.
    pub fn remove_runtime(&self, engine: bool) {
        let engine = engine.then(|| self.docker_socket());
        for socket in self.sockets_of_processes().into_iter().chain(engine) {
            let _ = std::fs::remove_file(socket);
        }
        let _ = std::fs::remove_dir(&self.runtime);
    }
}

/// Makes a folder, and those above it, that nobody else may look into.
///
/// # Errors
/// When it cannot be made.
pub fn create_private(folder: &Path) -> Result<(), PathsError> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(folder)
        .map_err(|error| PathsError::Create(folder.into(), error))
}

fn create_own(folder: &Path) -> Result<(), PathsError> {
    create_private(folder)?;
    if is_private(folder, rustix::process::getuid().as_raw()) {
        Ok(())
    } else {
        Err(PathsError::NotOurs(folder.into()))
    }
}

/// Whether `folder` is a folder (not a link to one) of this user that nobody else may write to.
fn is_private(folder: &Path, uid: u32) -> bool {
    let others = Mode::WGRP | Mode::WOTH;
    rustix::fs::lstat(folder).is_ok_and(|stat: Stat| {
        rustix::fs::FileType::from_raw_mode(stat.st_mode).is_dir()
            && stat.st_uid == uid
            && !Mode::from_raw_mode(stat.st_mode).intersects(others)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn paths(variables: &[(&str, &str)]) -> Result<Paths, PathsError> {
        let get = |name: &str| {
            let found = variables.iter().find(|(key, _)| *key == name);
            found.map(|(_, value)| OsString::from(value))
        };
        // No user has this id, so that /run/user/UID is not there.
        Paths::from_variables(get, 3_999_999)
    }

    #[test]
    fn lighter_home_holds_everything() {
        let paths = paths(&[("LIGHTER_HOME", "/x"), ("HOME", "/h"), ("XDG_RUNTIME_DIR", "/r")]).unwrap();
        let vm = paths.vm(&"a".parse().unwrap());
        assert_eq!(paths.config_file, Path::new("/x/config.toml"));
        assert_eq!(vm.disk(), Path::new("/x/vms/a/data.img"));
        assert_eq!(vm.docker_socket(), Path::new("/x/run/a/docker.sock"));
    }

    #[test]
    fn the_xdg_folders_have_their_usual_defaults() {
        let paths = paths(&[("HOME", "/h"), ("XDG_DATA_HOME", "")]).unwrap();
        assert_eq!(paths.config_file, Path::new("/h/.config/lighter/config.toml"));
        assert_eq!(paths.vms, Path::new("/h/.local/share/lighter/vms"));
        assert_eq!(paths.runtime, Path::new("/tmp/lighter-3999999"));
    }

    #[test]
    fn relative_and_missing_roots_are_refused() {
        assert!(matches!(paths(&[]), Err(PathsError::NoHome)));
        assert!(matches!(
            paths(&[("LIGHTER_HOME", "here")]),
            Err(PathsError::Relative {
                variable: "LIGHTER_HOME",
                ..
            })
        ));
    }

    #[test]
    fn a_folder_that_others_may_write_to_is_refused() {
        use std::os::unix::fs::PermissionsExt;
        let root = tempfile::tempdir().unwrap();
        let runtime = root.path().join("run");
        std::fs::create_dir(&runtime).unwrap();
        std::fs::set_permissions(&runtime, std::fs::Permissions::from_mode(0o777)).unwrap();
        let paths = Paths {
            runtime,
            ..paths(&[("HOME", "/h")]).unwrap()
        };
        let refused = paths.create_runtime(&paths.vm(&"a".parse().unwrap()));
        assert!(matches!(refused, Err(PathsError::NotOurs(_))), "{refused:?}");
    }

    #[test]
    fn a_socket_path_of_108_bytes_is_refused_and_one_of_107_is_not() {
        let at = |length: usize| {
            let fixed = "/".len() + "/run/a/control.sock".len();
            let home = format!("/{}", "h".repeat(length - fixed));
            let paths = paths(&[("LIGHTER_HOME", &home)]).unwrap();
            paths.vm(&"a".parse().unwrap()).check_socket_paths()
        };
        assert!(at(107).is_ok());
        assert!(matches!(at(108), Err(PathsError::SocketPath(_))));
    }
}
