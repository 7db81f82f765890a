//! The guest's file systems other than the data disk.
//!
//! The root is a read-only erofs ([`crate::root`]). What must be writable is a tmpfs, and forgotten at power-off: /run, /tmp,
//! /root and, as an overlay on the image's files, /etc.

use std::{
    fs, io,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    mount::{MsFlags, mount},
};

use crate::root;

/// A mount that failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The mount itself.
    #[error("cannot mount {kind} on {}", target.display())]
    Mount {
        /// File system type.
        kind: &'static str,
        /// Mount point.
        target: PathBuf,
        /// Why.
        #[source]
        source: Errno,
    },
    /// A folder or link it needs.
    #[error("cannot create {}", path.display())]
    Create {
        /// What was to be created.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

struct Mount {
    kind: &'static str,
    target: &'static str,
    flags: MsFlags,
    options: &'static str,
}

const NO_SUID: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV);
const NO_EXEC: MsFlags = NO_SUID.union(MsFlags::MS_NOEXEC);

/// In the order of mounting: a mount point may lie on an earlier mount.
///
/// cgroup2's `favordynmods` moves processes between groups without waiting for an RCU grace period each time, which
/// every start of a container would pay.
const MOUNTS: &[Mount] = &[
    Mount {
        kind: "devtmpfs",
        target: "/dev",
        flags: MsFlags::MS_NOSUID,
        options: "mode=755",
    },
    Mount {
        kind: "proc",
        target: "/proc",
        flags: NO_EXEC,
        options: "",
    },
    Mount {
        kind: "sysfs",
        target: "/sys",
        flags: NO_EXEC,
        options: "",
    },
    Mount {
        kind: "devpts",
        target: "/dev/pts",
        flags: MsFlags::MS_NOSUID.union(MsFlags::MS_NOEXEC),
        options: "gid=5,mode=620,ptmxmode=666",
    },
    Mount {
        kind: "tmpfs",
        target: "/dev/shm",
        flags: NO_SUID,
        options: "mode=1777",
    },
    Mount {
        kind: "mqueue",
        target: "/dev/mqueue",
        flags: NO_EXEC,
        options: "",
    },
    Mount {
        kind: "tmpfs",
        target: "/run",
        flags: NO_SUID,
        options: "mode=755",
    },
    // Sockets of the host's sessions would be here, which containers may ask for.
    Mount {
        kind: "tmpfs",
        target: "/run/user",
        flags: NO_SUID,
        options: "mode=755",
    },
    Mount {
        kind: "tmpfs",
        target: "/tmp",
        flags: NO_SUID,
        options: "mode=1777",
    },
    Mount {
        kind: "tmpfs",
        target: "/root",
        flags: NO_SUID,
        options: "mode=700",
    },
    Mount {
        kind: "cgroup2",
        target: "/sys/fs/cgroup",
        flags: NO_EXEC,
        options: "nsdelegate,favordynmods",
    },
    Mount {
        kind: "bpf",
        target: "/sys/fs/bpf",
        flags: NO_EXEC,
        options: "mode=700",
    },
    Mount {
        kind: "overlay",
        target: "/etc",
        flags: MsFlags::empty(),
        options: "lowerdir=/etc,upperdir=/run/lighter/etc/upper,workdir=/run/lighter/etc/work",
    },
];

/// Links that programs expect in /dev and devtmpfs does not have.
const DEV_LINKS: &[(&str, &str)] = &[
    ("/proc/self/fd", "/dev/fd"),
    ("/proc/self/fd/0", "/dev/stdin"),
    ("/proc/self/fd/1", "/dev/stdout"),
    ("/proc/self/fd/2", "/dev/stderr"),
];

/// Mounts everything. What fails is returned and the rest mounted: which of it is fatal shows soon enough, and an
/// agent that goes on can tell.
pub fn all() -> Vec<Error> {
    let mut errors: Vec<_> = root::make_writable().err().into_iter().collect();
    errors.extend(MOUNTS.iter().filter_map(|mount| mount.perform().err()));
    for (source, path) in DEV_LINKS {
        if let Err(source) = symlink(source, path)
            && source.kind() != io::ErrorKind::AlreadyExists
        {
            errors.push(Error::Create {
                path: path.into(),
                source,
            });
        }
    }
    // Docker passes mounts on into containers that ask for it (`-v …:rshared`) only from a shared mount.
    if let Err(source) = mount(
        None::<&str>,
        "/",
        None::<&str>,
        MsFlags::MS_REC | MsFlags::MS_SHARED,
        None::<&str>,
    ) {
        errors.push(Error::Mount {
            kind: "(shared)",
            target: "/".into(),
            source,
        });
    }
    errors
}

impl Mount {
    fn perform(&self) -> Result<(), Error> {
        match self.kind {
            "overlay" => {
                for folder in ["/run/lighter/etc/upper", "/run/lighter/etc/work"] {
                    create_folder(Path::new(folder))?;
                }
            }
            // On file systems of the kernel's: the image need not have them.
            _ if self.target.starts_with("/dev/") || self.target == "/run/user" => {
                create_folder(Path::new(self.target))?
            }
            _ => {}
        }
        match mount(
            Some(self.kind),
            self.target,
            Some(self.kind),
            self.flags,
            Some(self.options),
        ) {
            // The kernel itself mounted it (CONFIG_DEVTMPFS_MOUNT).
            Ok(()) | Err(Errno::EBUSY) => Ok(()),
            Err(source) => Err(Error::Mount {
                kind: self.kind,
                target: self.target.into(),
                source,
            }),
        }
    }
}

/// Makes a folder, and those above it.
pub fn create_folder(path: &Path) -> Result<(), Error> {
    fs::create_dir_all(path).map_err(|source| Error::Create {
        path: path.into(),
        source,
    })
}

/// The mount points at and below `root`, deepest first, from the text of /proc/self/mountinfo (proc(5)).
pub fn mount_points_below(mountinfo: &str, root: &str) -> Vec<PathBuf> {
    let mut points: Vec<PathBuf> = mountinfo
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(unescape)
        .filter(|point| Path::new(point).starts_with(root))
        .map(PathBuf::from)
        .collect();
    // The file lists mounts in the order they were made: a later one may lie on an earlier one.
    points.reverse();
    points
}

/// Undoes the octal escapes of mountinfo: space, tab, line break and backslash.
fn unescape(field: &str) -> String {
    let mut text = field.to_owned();
    // The backslash last, since its replacement would look like the beginning of another escape.
    for (escape, character) in [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")] {
        text = text.replace(escape, character);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_come_deepest_first_and_unescaped() {
        let mountinfo = "\
22 1 254:0 / / ro,relatime shared:1 - erofs /dev/root ro
40 22 254:16 / /var/lib rw,noatime shared:9 - ext4 /dev/vdb rw,discard
41 40 0:50 / /var/lib/docker/overlay2/a\\040b/merged rw shared:10 - overlay overlay rw
42 22 0:51 / /var/library rw - tmpfs tmpfs rw
broken line
";
        assert_eq!(
            mount_points_below(mountinfo, "/var/lib"),
            [
                PathBuf::from("/var/lib/docker/overlay2/a b/merged"),
                PathBuf::from("/var/lib")
            ]
        );
    }
}
