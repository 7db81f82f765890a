//! Host folders that the guest sees, each at the same path.

use crate::error::{self, Code, Error};
use rustix::fs::{CWD, Mode, OFlags, openat};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Component, Path, PathBuf};
use std::str::FromStr;

/// Most folders of a VM: each is a device with an interrupt line of its own.
pub const MOST: usize = 8;

/// Where the guest's own system is; nothing of the host can be there, nor below.
const GUEST_SYSTEM: [&str; 14] = [
    "/bin", "/boot", "/dev", "/etc", "/lib", "/lib64", "/mnt", "/proc", "/run", "/sbin", "/sys", "/usr",
    "/var/lib", "/var/run",
];

/// Folders of the guest's that hold others: these can be shared, they themselves cannot.
const GUEST_FOLDERS: [&str; 3] = ["/", "/tmp", "/var"];

/// Why a folder cannot be shared.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MountError {
    /// Nothing that a path can be made of.
    #[error("no folder is named")]
    Empty,
    /// Docker takes what is behind a colon for something else.
    #[error("the path {0} has a colon, which docker -v cannot take")]
    Colon(String),
    /// The working directory is gone.
    #[error("the path {path} cannot be made absolute: {reason}")]
    Absolute {
        /// As it was given.
        path: String,
        /// The system's reason.
        reason: String,
    },
    /// The guest has something else there.
    #[error("the folder {0} cannot be shared: the guest has its own system in {1}")]
    System(String, &'static str),
    /// More than once.
    #[error("the folder {0} is given twice")]
    Twice(String),
    /// Too many.
    #[error("a VM has at most {MOST} shared folders, not {0}")]
    TooMany(usize),
}

impl From<MountError> for Error {
    fn from(error: MountError) -> Self {
        Self::of(Code::Usage, &error)
            .hint("--mount takes the path of a folder, with :ro behind it if the guest must not change it")
    }
}

/// A shared folder.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Mount {
    /// Absolute.
    pub path: PathBuf,
    /// Whether the guest cannot change it.
    pub read_only: bool,
}

impl FromStr for Mount {
    type Err = MountError;

    /// `PATH`, `PATH:ro` or `PATH:rw`; a relative path is taken from the working directory.
    fn from_str(text: &str) -> Result<Self, MountError> {
        let (path, read_only) = match text.rsplit_once(':') {
            Some((path, "ro")) => (path, true),
            Some((path, "rw")) => (path, false),
            _ => (text, false),
        };
        if path.is_empty() {
            return Err(MountError::Empty);
        }
        if path.contains(':') {
            return Err(MountError::Colon(path.into()));
        }
        let absolute = |reason: io::Error| MountError::Absolute {
            path: path.into(),
            reason: reason.to_string(),
        };
        let mut whole = std::path::absolute(path).map_err(absolute)?;
        // Only the file system knows what is above a link.
        if whole.components().any(|part| part == Component::ParentDir) {
            whole = std::fs::canonicalize(&whole).map_err(absolute)?;
        }
        // Without a slash at its end.
        let path: PathBuf = whole.components().collect();
        check_place(&path)?;
        Ok(Self { path, read_only })
    }
}

fn check_place(path: &Path) -> Result<(), MountError> {
    let system = |place| Err(MountError::System(path.display().to_string(), place));
    if let Some(place) = GUEST_SYSTEM.into_iter().find(|place| path.starts_with(place)) {
        return system(place);
    }
    match GUEST_FOLDERS.into_iter().find(|place| path == Path::new(place)) {
        Some(place) => system(place),
        None => Ok(()),
    }
}

impl TryFrom<String> for Mount {
    type Error = MountError;

    fn try_from(text: String) -> Result<Self, MountError> {
        text.parse()
    }
}

impl From<Mount> for String {
    fn from(mount: Mount) -> Self {
        mount.to_string()
    }
}

impl fmt::Display for Mount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mode = if self.read_only { ":ro" } else { "" };
        write!(f, "{}{mode}", self.path.display())
    }
}

impl Mount {
    /// Opens the folder.
    ///
    /// # Errors
    /// When it is not there, or no folder.
    pub fn open(&self) -> error::Result<OwnedFd> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        openat(CWD, &self.path, flags, Mode::empty()).map_err(|errno| {
            let why = match errno {
                rustix::io::Errno::NOENT => "it does not exist".to_owned(),
                rustix::io::Errno::NOTDIR => "it is not a folder".to_owned(),
                errno => errno.to_string(),
            };
            Error::failure(format!("cannot share the folder {}: {why}", self.path.display()))
                .hint("make the folder, or choose others with --mount, or none with --no-mounts")
        })
    }
}

/// Puts mounts in the order in which they are made, a folder before those in it, and checks them together.
///
/// # Errors
/// When one is given twice, or there are too many.
pub fn checked(mut mounts: Vec<Mount>) -> Result<Vec<Mount>, MountError> {
    mounts.sort();
    if let Some(pair) = mounts.windows(2).find(|pair| pair[0].path == pair[1].path) {
        return Err(MountError::Twice(pair[0].path.display().to_string()));
    }
    if mounts.len() > MOST {
        return Err(MountError::TooMany(mounts.len()));
    }
    Ok(mounts)
}

/// The user's home folder, which is shared when nothing else is said; `None` if there is none that could be.
pub fn home() -> Option<Mount> {
    let home = std::env::var("HOME").ok()?;
    let mount = home.parse::<Mount>().ok().filter(|mount| !mount.read_only)?;
    (Path::new(&home).is_absolute() && mount.path.is_dir()).then_some(mount)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<String, MountError> {
        text.parse::<Mount>().map(|mount| mount.to_string())
    }

    #[test]
    fn paths_are_made_absolute_and_may_be_read_only() {
        assert_eq!(parse("/srv/data/").unwrap(), "/srv/data");
        assert_eq!(parse("/srv//data/.:rw").unwrap(), "/srv/data");
        assert_eq!(parse("/srv/data:ro").unwrap(), "/srv/data:ro");
        assert_eq!(parse("/root").unwrap(), "/root");
        assert_eq!(parse("/tmp/x").unwrap(), "/tmp/x");
        assert_eq!(parse("/var/www").unwrap(), "/var/www");
        let here = std::env::current_dir().unwrap().canonicalize().unwrap();
        assert_eq!(parse("src/..").unwrap(), here.display().to_string());
    }

    #[test]
    fn places_of_the_guests_own_system_are_refused() {
        for path in [
            "/",
            "//",
            "/usr",
            "/usr/src/",
            "/proc",
            "/proc/1",
            "/var",
            "/var/lib",
            "/var/lib/docker",
            "/tmp",
            "/dev/shm",
            "/run/user/1000",
            "/etc/ssl:ro",
            "/usr/../etc",
            "/mnt",
        ] {
            let error = parse(path).unwrap_err();
            assert!(matches!(error, MountError::System(..)), "{path}: {error}");
        }
        // Names that only begin alike.
        for path in ["/user", "/devel", "/library", "/varnish", "/mnt2"] {
            assert_eq!(parse(path).unwrap(), path);
        }
        assert_eq!(parse(""), Err(MountError::Empty));
        assert_eq!(parse(":ro"), Err(MountError::Empty));
        assert!(matches!(parse("/a:b"), Err(MountError::Colon(_))));
        assert!(matches!(
            parse("/nowhere/at/all/.."),
            Err(MountError::Absolute { .. })
        ));
    }

    #[test]
    fn folders_come_before_those_in_them_and_each_once() {
        let mounts = |paths: &[&str]| paths.iter().map(|path| path.parse().unwrap()).collect();
        let sorted = checked(mounts(&["/b", "/a/c:ro", "/a"])).unwrap();
        let sorted: Vec<String> = sorted.into_iter().map(String::from).collect();
        assert_eq!(sorted, ["/a", "/a/c:ro", "/b"]);
        assert!(matches!(
            checked(mounts(&["/a", "/b", "/a:ro"])),
            Err(MountError::Twice(_))
        ));
        let many: Vec<String> = (0..9).map(|n| format!("/m{n}")).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        assert_eq!(checked(mounts(&many)), Err(MountError::TooMany(9)));
    }

    #[test]
    fn what_is_no_folder_is_told() {
        let mount = |path: &str| path.parse::<Mount>().unwrap().open().unwrap_err().message;
        assert!(mount("/nowhere").contains("/nowhere: it does not exist"));
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(mount(file.path().to_str().unwrap()).contains("it is not a folder"));
    }
}
