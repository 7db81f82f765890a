//! What of the host is in the guest ([`lighter_protocol::shares`]): shared folders, each at its own path, and the engine's
//! socket where the host has it.

use std::{
    fs, io,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use lighter_protocol::shares::{GuestShare, ShareError, find_socket};
use nix::mount::{MsFlags, mount};

use crate::{docker_port::ENGINE_SOCKET, mounts, root, system};

/// Where the engine's socket lies alone, to be mounted where the host has it.
const SOCKET_FOLDER: &str = "/run/lighter/host-socket";

/// What the host cannot be given.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// What to mount is not known.
    #[error("cannot read the kernel's command line")]
    CommandLine(#[source] io::Error),
    /// The supervisor's words.
    #[error(transparent)]
    Word(#[from] ShareError),
    /// A mount or its folder.
    #[error(transparent)]
    Mount(#[from] mounts::Error),
}

/// Mounts everything, then makes the root read-only. What fails is returned, and the rest mounted.
pub fn mount_all() -> Vec<Error> {
    let mut errors = match command_line() {
        Ok(line) => mount_what_is_told(&line),
        Err(error) => vec![error],
    };
    errors.extend(root::make_read_only().err().map(Error::from));
    errors
}

fn mount_what_is_told(command_line: &str) -> Vec<Error> {
    let mut errors = vec![];
    match GuestShare::find_all(command_line) {
        Ok(shares) => errors.extend(shares.iter().filter_map(|share| mount_share(share).err())),
        Err(error) => errors.push(error.into()),
    }
    match find_socket(command_line) {
        Ok(Some(path)) => errors.extend(mount_socket(&path).err()),
        Ok(None) => {}
        Err(error) => errors.push(error.into()),
    }
    errors
}

fn command_line() -> Result<String, Error> {
    fs::read_to_string("/proc/cmdline").map_err(Error::CommandLine)
}

fn mount_share(share: &GuestShare) -> Result<(), Error> {
    mounts::create_folder(&share.path)?;
    let mut flags = MsFlags::MS_NODEV;
    flags.set(MsFlags::MS_RDONLY, share.read_only);
    let kind = "virtiofs";
    let mounted = mount(
        Some(share.tag.as_str()),
        &share.path,
        Some(kind),
        flags,
        None::<&str>,
    );
    mounted.map_err(|source| {
        // A folder that is not the host's would be taken for it.
        let _ = fs::remove_dir(&share.path);
        let target = share.path.clone();
        mounts::Error::Mount { kind, target, source }.into()
    })
}

/// Has the engine's socket at `path`. Its whole folder is mounted: where that is a shared one, the host's socket is there,
/// which nobody in the guest can connect to, and which must not be touched.
fn mount_socket(path: &Path) -> Result<(), Error> {
    let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else {
        return Ok(());
    };
    mounts::create_folder(Path::new(SOCKET_FOLDER))?;
    let link = Path::new(SOCKET_FOLDER).join(name);
    match symlink(ENGINE_SOCKET, &link) {
        // It has one path already.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        made => made.map_err(|source| mounts::Error::Create { path: link, source })?,
    }
    mounts::create_folder(folder)?;
    let none = None::<&str>;
    mount(Some(SOCKET_FOLDER), folder, none, MsFlags::MS_BIND, none).map_err(|source| {
        let target = folder.to_owned();
        mounts::Error::Mount {
            kind: "(bind)",
            target,
            source,
        }
        .into()
    })
}

/// Has the engine's socket where `words` say, for a fork: beside where it was before, which containers may ask for that were
/// made then.
///
/// # Errors
/// When it cannot.
pub fn add_socket(words: &str) -> Result<(), Error> {
    let Some(path) = find_socket(words)? else {
        return Ok(());
    };
    if fs::read_link(&path).is_ok_and(|target| target == Path::new(ENGINE_SOCKET)) {
        return Ok(());
    }
    // For the agent alone: dockerd's root stays as it is.
    root::make_writable_again()?;
    let mounted = mount_socket(&path);
    root::make_read_only()?;
    mounted
}

/// Folders of the guest's own, writable ones, where a path of the host's could lie that is not shared: dockerd must not
/// make it there.
pub fn not_the_hosts() -> Vec<PathBuf> {
    // What is wrong with them was said when they were mounted.
    let line = command_line().unwrap_or_default();
    let shares = GuestShare::find_all(&line).unwrap_or_default();
    let is_shared = |folder: &&Path| shares.iter().any(|share| share.path == **folder);
    let folders = ["/etc", "/root", "/run/user", "/tmp"].map(Path::new);
    let own = folders.into_iter().filter(|folder| !is_shared(folder));
    own.map(Path::to_owned).collect()
}

/// Lets the kernel forget names and files that nobody uses. It has no way to do so with shared folders alone that would not
/// write out the host's file system as well (a remount does).
///
/// # Errors
/// When the kernel refuses.
pub fn forget_files() -> io::Result<()> {
    system::drop_caches("2")
}
