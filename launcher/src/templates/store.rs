//! Where templates are: `templates/TEMPLATE/`, named by a key and when they were made. A name is never given twice: memory and
//! disk that are read one after the other are of one template.

use super::key::Key;
use crate::error::{Error, Result};
use crate::lock::Lock;
use crate::name::Name;
use crate::paths::{Paths, create_private};
use crate::snapshots::base::Base;
use crate::snapshots::booted::is_there;
use crate::snapshots::error::SnapshotError;
use crate::snapshots::store::{discard, given_up, names, publish};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// The most that are kept.
pub const MOST: usize = 4;

/// All templates, sorted.
///
/// # Errors
/// When the folder cannot be read.
pub fn list(paths: &Paths) -> std::result::Result<Vec<Name>, SnapshotError> {
    let mut found = names(&paths.templates)?;
    found.sort();
    Ok(found)
}

/// Where the template `name` is.
pub fn folder(paths: &Paths, name: &Name) -> PathBuf {
    paths.templates.join(name.as_str())
}

/// The name of the template that is in `folder`, if one is.
pub fn name_of(paths: &Paths, folder: &Path) -> Option<String> {
    let name = folder.strip_prefix(&paths.templates).ok()?;
    Some(name.display().to_string())
}

/// The template for `key`.
pub fn find(paths: &Paths, key: &Key) -> Option<Name> {
    // The last is the newest.
    list(paths).ok()?.into_iter().rfind(|name| is_for(name, key))
}

fn is_for(name: &Name, key: &Key) -> bool {
    name.as_str()
        .split_once('-')
        .is_some_and(|(of, _)| of == key.to_string())
}

/// When a VM was last started from the template in `folder`, or it was made: milliseconds since 1970.
pub fn used_unix_ms(folder: &Path) -> u64 {
    let modified = std::fs::metadata(folder).and_then(|metadata| metadata.modified());
    let since = modified
        .ok()
        .and_then(|time| time.duration_since(UNIX_EPOCH).ok());
    since.map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

/// Notes that a VM starts from the template in `folder`.
pub fn touch(folder: &Path) {
    // It is a hint for whom to remove.
    let _ = File::open(folder).and_then(|folder| folder.set_modified(SystemTime::now()));
}

/// Removes the template `name`. VMs that run from it go on.
///
/// # Errors
/// When it cannot be removed.
pub fn remove(paths: &Paths, name: &Name) -> std::result::Result<(), SnapshotError> {
    discard(&paths.templates, name)
}

/// A template that is being made. What there is of it is removed when this is dropped.
#[derive(Debug)]
pub struct Making {
    paths: Paths,
    // Held for as long as it is made.
    _lock: Lock,
    /// What it is to be called.
    pub name: Name,
    /// The empty folder for it.
    pub folder: PathBuf,
}

impl Making {
    /// Begins a template for `key`, and removes what others have left of theirs; `None` when there is one by now, or another
    /// process is making one.
    ///
    /// # Errors
    /// When the folder cannot be made.
    pub fn begin(paths: &Paths, key: &Key) -> Result<Option<Self>> {
        create_private(&paths.templates)?;
        let Some(lock) = Lock::try_acquire(&paths.templates.join(".lock"))? else {
            return Ok(None);
        };
        for folder in given_up(&paths.templates).filter(|path| path.is_dir()) {
            // What cannot be removed now is by the next.
            let _ = std::fs::remove_dir_all(folder);
        }
        if find(paths, key).is_some() {
            return Ok(None);
        }
        let name = format!("{key}-{}", crate::clock::unix_ms());
        let name: Name = name
            .parse()
            .map_err(|error| Error::of(crate::error::Code::Failure, &error))?;
        let folder = paths.templates.join(format!(".{name}.partial"));
        create_private(&folder)?;
        Ok(Some(Self {
            paths: paths.clone(),
            _lock: lock,
            name,
            folder,
        }))
    }

    /// Gives it its name, when all of it is on the disk, and makes room: others go.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn finish(self) -> std::result::Result<Name, SnapshotError> {
        publish(&self.folder, &folder(&self.paths, &self.name))?;
        for name in surplus(&self.paths, MOST) {
            // It is of no harm but its size.
            let _ = remove(&self.paths, &name);
        }
        Ok(self.name.clone())
    }
}

impl Drop for Making {
    fn drop(&mut self) {
        // It has another name when it is finished; what cannot be removed now is by the next.
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

/// The templates that are too many when `most` are kept: those that nothing can be started from any more, then the ones
/// that were not used for longest.
fn surplus(paths: &Paths, most: usize) -> Vec<Name> {
    let mut ranked: Vec<(bool, u64, Name)> = list(paths)
        .unwrap_or_default()
        .into_iter()
        .map(|name| {
            let folder = folder(paths, &name);
            let current = Base::load(&folder).is_ok_and(|base| is_current(&base));
            (current, used_unix_ms(&folder), name)
        })
        .collect();
    ranked.sort();
    let too_many = ranked.len().saturating_sub(most);
    ranked.truncate(too_many);
    ranked.into_iter().map(|(_, _, name)| name).collect()
}

/// Whether the kernel and the image that it was booted from are there still.
pub fn is_current(base: &Base) -> bool {
    is_there(&base.manifest.kernel.file) && is_there(&base.manifest.image.file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshots::booted;
    use crate::snapshots::create::write;
    use crate::snapshots::manifest::testing::manifest;
    use std::time::Duration;

    fn key(text: &str) -> Key {
        super::super::key::testing::key(text)
    }

    /// Makes a template, last used `age` seconds ago, of a kernel that is there or is not.
    fn make(paths: &Paths, of: &str, age: u64, current: bool) -> Name {
        let making = Making::begin(paths, &key(of)).unwrap().unwrap();
        let mut manifest = manifest();
        if current {
            let file = std::env::current_exe().unwrap();
            let used = booted::used(&file, &File::open(&file).unwrap()).unwrap();
            manifest.kernel.file = used.clone();
            manifest.image.file = used;
        }
        write(&making.folder, &manifest).unwrap();
        let name = making.finish().unwrap();
        let then = SystemTime::now() - Duration::from_secs(age);
        File::open(folder(paths, &name))
            .unwrap()
            .set_modified(then)
            .unwrap();
        name
    }

    #[test]
    fn a_template_is_found_by_its_key_and_made_by_one_at_a_time() {
        let root = tempfile::tempdir().unwrap();
        let paths = Paths::at(root.path());
        assert_eq!(find(&paths, &key("aa")), None);
        let making = Making::begin(&paths, &key("aa")).unwrap().unwrap();
        assert!(Making::begin(&paths, &key("bb")).unwrap().is_none());
        let left = making.folder.clone();
        drop(making);
        assert!(!left.exists());
        let name = make(&paths, "aa", 0, true);
        assert_eq!(find(&paths, &key("aa")), Some(name.clone()));
        assert_eq!(find(&paths, &key("a")), None);
        assert_eq!(name_of(&paths, &folder(&paths, &name)), Some(name.to_string()));
        assert_eq!(name_of(&paths, root.path()), None);
        assert!(Making::begin(&paths, &key("aa")).unwrap().is_none());
        remove(&paths, &name).unwrap();
        // As a process leaves it that was killed.
        std::fs::create_dir(&left).unwrap();
        assert_eq!(list(&paths).unwrap(), []);
        drop(Making::begin(&paths, &key("bb")).unwrap().unwrap());
        assert!(!left.exists());
    }

    #[test]
    fn room_is_made_of_what_is_of_no_use_and_then_of_what_was_not_used_for_long() {
        let root = tempfile::tempdir().unwrap();
        let paths = Paths::at(root.path());
        let old = make(&paths, "aa", 500, true);
        let unused = make(&paths, "bb", 400, true);
        let of_another_kernel = make(&paths, "cc", 1, false);
        let kept = make(&paths, "dd", 2, true);
        assert_eq!(
            surplus(&paths, 1),
            [&of_another_kernel, &old, &unused].map(Clone::clone)
        );
        touch(&folder(&paths, &old));
        let new = make(&paths, "ee", 0, true);
        let newest = make(&paths, "ff", 0, true);
        let mut left = vec![old, kept, new, newest];
        left.sort();
        assert_eq!(list(&paths).unwrap(), left);
    }
}
