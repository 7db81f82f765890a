//! The folder of a VM comes and goes as a whole: while it is made, or removed, it has a name that is no VM's, and whoever is
//! killed meanwhile leaves nothing that looks like one.

use super::VmError;
use crate::lock::Lock;
use crate::name::Name;
use crate::paths::{Paths, VmPaths};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

/// Ends the name of a folder that is not whole.
const PARTIAL: &str = ".partial";

/// The files of a VM that is made where nobody looks for one. The folder is there and empty. The caller holds the edit lock.
///
/// # Errors
/// When it cannot be made.
pub fn begin(files: &VmPaths) -> Result<VmPaths, VmError> {
    let data = partial(&files.data);
    remove(&data)?;
    let made = std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&data);
    made.map_err(|error| VmError::Write(data.clone(), error))?;
    Ok(VmPaths {
        data,
        ..files.clone()
    })
}

/// Gives a folder that was begun its name. What has that name, and is no VM, is replaced.
///
/// # Errors
/// When it cannot be renamed.
pub fn finish(begun: &VmPaths, files: &VmPaths) -> Result<(), VmError> {
    remove(&files.data)?;
    rename(&begun.data, &files.data)
}

/// Removes a folder that was begun.
pub fn give_up(begun: &VmPaths) {
    // What cannot be removed is by the next.
    let _ = remove(&begun.data);
}

/// Removes the folder of a VM, which is none from the first moment on. The caller holds the edit lock.
///
/// # Errors
/// When a file cannot be removed.
pub fn take_away(files: &VmPaths) -> Result<(), VmError> {
    let data = partial(&files.data);
    remove(&data)?;
    rename(&files.data, &data)?;
    remove(&data)
}

/// Removes what those left behind who were killed.
pub fn sweep(paths: &Paths) {
    for entry in std::fs::read_dir(&paths.vms).into_iter().flatten().flatten() {
        let file_name = entry.file_name();
        let name = file_name
            .to_str()
            .and_then(|name| name.strip_prefix('.')?.strip_suffix(PARTIAL));
        let Some(Ok(name)) = name.map(str::parse::<Name>) else {
            continue;
        };
        let files = paths.vm(&name);
        // Whoever holds it is at work.
        if let Ok(Some(edit)) = Lock::try_acquire(&files.edit_lock) {
            // What cannot be removed now is by the next.
            let _ = remove(&entry.path());
            if !files.data.exists() {
                edit.remove();
            }
        }
    }
}

fn partial(folder: &Path) -> PathBuf {
    let name = folder.file_name().unwrap_or_default().to_string_lossy();
    // Names never begin with a dot.
    folder.with_file_name(format!(".{name}{PARTIAL}"))
}

fn rename(from: &Path, to: &Path) -> Result<(), VmError> {
    std::fs::rename(from, to).map_err(|error| VmError::Write(to.into(), error))
}

fn remove(folder: &Path) -> Result<(), VmError> {
    match std::fs::remove_dir_all(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(VmError::Write(folder.into(), error)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_whole_is_no_vm_and_is_swept_unless_somebody_is_at_work() {
        let root = tempfile::tempdir().unwrap();
        let paths = Paths::at(root.path());
        let [one, two] = ["one", "two"].map(|name| paths.vm(&name.parse().unwrap()));
        let begun = [&one, &two].map(|files| begin(files).unwrap());
        for begun in &begun {
            std::fs::write(begun.settings(), "").unwrap();
        }
        assert!(crate::vm::list(&paths).unwrap().is_empty());
        let edit = Lock::acquire(&two.edit_lock).unwrap();
        sweep(&paths);
        assert!(!begun[0].data.exists() && begun[1].data.exists());
        assert!(!one.edit_lock.exists());
        // Logs of one that is no VM any more.
        std::fs::create_dir(&two.data).unwrap();
        std::fs::write(two.data.join("console.log"), "").unwrap();
        finish(&begun[1], &two).unwrap();
        assert!(two.settings().exists() && !two.data.join("console.log").exists());
        // One that was killed while it removed a VM of that name.
        begin(&two).unwrap();
        take_away(&two).unwrap();
        drop(edit);
        sweep(&paths);
        let left = std::fs::read_dir(&paths.vms).unwrap().count();
        assert_eq!(left, 1, "the lock");
    }
}
