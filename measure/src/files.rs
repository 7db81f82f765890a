//! What `lighter bench fs` does in a folder: what compilers, package managers and version control do all day.
//!
//! Small files are in folders of [`PER_FOLDER`]. Everything is made in a folder of its own and removed again.

use crate::work::{Work, since};
use serde::{Deserialize, Serialize};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Small files in each folder.
const PER_FOLDER: u32 = 50;

/// Bytes moved by one sequential read or write.
const PIECE: usize = 1 << 20;

/// Bytes of one random read.
const BLOCK: usize = 4 << 10;

/// What Git's index has of each file, bytes: its attributes and a short name.
const INDEX_ENTRY: usize = 72;

/// What drops the file cache of the kernel that this runs on.
const DROP_CACHES: &str = "/proc/sys/vm/drop_caches";

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// Is made, and removed at the end.
    pub folder: PathBuf,
    /// Small files.
    pub files: u32,
    /// Bytes of each.
    pub file_bytes: u32,
    /// Size of the large file, MiB; not zero.
    pub large_mib: u32,
    /// Random reads of it.
    pub reads: u32,
    /// Drop this kernel's file cache before whatever reads; needs root.
    pub drop_caches: bool,
}

/// What was measured. Counts are of files, but bytes of the large file, and random reads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Samples {
    /// Small files made and written.
    pub create: Work,
    /// Every folder listed, and every file's attributes asked for.
    pub walk: Work,
    /// The same again at once.
    pub walk_again: Work,
    /// What `git status` does: an index read, the attributes of all files asked for by their names in it, every folder listed.
    pub status: Work,
    /// Small files opened and read.
    pub read: Work,
    /// A large file written, with fsync.
    pub write: Work,
    /// And read.
    pub sequential: Work,
    /// And read here and there.
    pub random: Work,
    /// All small files removed.
    pub remove: Work,
}

/// Why nothing could be measured.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file or folder.
    #[error("cannot {what} {}", path.display())]
    At {
        /// What was to be done.
        what: &'static str,
        /// With what.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// It is not what was written.
    #[error("{} has {found} bytes and not the {written} that were written", path.display())]
    Length {
        /// The file.
        path: PathBuf,
        /// What was read.
        found: u64,
        /// What it has to be.
        written: u64,
    },
}

fn failed(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::At { what, path, source }
}

/// Does what `plan` says.
///
/// # Errors
/// When something fails; what was made by then stays.
pub fn measure(plan: &Plan) -> Result<Samples, Error> {
    let tree = Tree::new(plan);
    fs::create_dir(&plan.folder).map_err(failed("make", &plan.folder))?;
    let drop_caches = || match plan.drop_caches {
        true => fs::write(DROP_CACHES, "3").map_err(failed("write", Path::new(DROP_CACHES))),
        false => Ok(()),
    };
    let files = u64::from(plan.files);
    let timed = |amount: u64, work: &mut dyn FnMut() -> Result<(), Error>| {
        let began = Instant::now();
        work()?;
        Ok(Work {
            amount,
            ns: since(began),
        })
    };
    let create = timed(files, &mut || tree.create())?;
    tree.write_index()?;
    drop_caches()?;
    let walk = timed(files, &mut || tree.walk())?;
    let walk_again = timed(files, &mut || tree.walk())?;
    let status = timed(files, &mut || tree.status())?;
    drop_caches()?;
    let read = timed(files, &mut || tree.read())?;
    let large = Large {
        path: plan.folder.join("large"),
        length: u64::from(plan.large_mib) << 20,
    };
    let write = timed(large.length, &mut || large.write())?;
    drop_caches()?;
    let sequential = timed(large.length, &mut || large.read())?;
    drop_caches()?;
    let random = timed(plan.reads.into(), &mut || large.read_here_and_there(plan.reads))?;
    let remove = timed(files, &mut || tree.remove())?;
    fs::remove_dir_all(&plan.folder).map_err(failed("remove", &plan.folder))?;
    Ok(Samples {
        create,
        walk,
        walk_again,
        status,
        read,
        write,
        sequential,
        random,
        remove,
    })
}

/// The small files.
struct Tree {
    folders: Vec<PathBuf>,
    files: Vec<PathBuf>,
    content: Vec<u8>,
    index: PathBuf,
}

impl Tree {
    fn new(plan: &Plan) -> Self {
        let folder = |number: u32| plan.folder.join(format!("folder{number}"));
        let file = |number: u32| folder(number / PER_FOLDER).join(format!("file{number}.rs"));
        Self {
            folders: (0..plan.files.div_ceil(PER_FOLDER)).map(folder).collect(),
            files: (0..plan.files).map(file).collect(),
            content: content(plan.file_bytes as usize),
            index: plan.folder.join("index"),
        }
    }

    fn create(&self) -> Result<(), Error> {
        for folder in &self.folders {
            fs::create_dir(folder).map_err(failed("make", folder))?;
        }
        for file in &self.files {
            let new = OpenOptions::new().write(true).create_new(true).open(file);
            new.and_then(|mut new| new.write_all(&self.content))
                .map_err(failed("write", file))?;
        }
        Ok(())
    }

    fn write_index(&self) -> Result<(), Error> {
        let index = content(self.files.len() * INDEX_ENTRY);
        fs::write(&self.index, index).map_err(failed("write", &self.index))
    }

    /// Lists every folder; returns how many entries there are.
    fn list(&self, mut each: impl FnMut(&fs::DirEntry) -> io::Result<()>) -> Result<usize, Error> {
        let mut count = 0;
        for folder in &self.folders {
            let entries = fs::read_dir(folder).and_then(|entries| {
                for entry in entries {
                    each(&entry?)?;
                    count += 1;
                }
                Ok(())
            });
            entries.map_err(failed("list", folder))?;
        }
        Ok(count)
    }

    fn walk(&self) -> Result<(), Error> {
        self.list(|entry| entry.metadata().map(drop)).map(drop)
    }

    fn status(&self) -> Result<(), Error> {
        fs::read(&self.index).map_err(failed("read", &self.index))?;
        for file in &self.files {
            fs::symlink_metadata(file).map_err(failed("look at", file))?;
        }
        self.list(|_| Ok(())).map(drop)
    }

    fn read(&self) -> Result<(), Error> {
        let written = self.content.len() as u64;
        let mut bytes = vec![];
        for file in &self.files {
            bytes.clear();
            let read = File::open(file).and_then(|mut file| file.read_to_end(&mut bytes));
            let found = read.map_err(failed("read", file))? as u64;
            check(file, found, written)?;
        }
        Ok(())
    }

    fn remove(&self) -> Result<(), Error> {
        for file in &self.files {
            fs::remove_file(file).map_err(failed("remove", file))?;
        }
        for folder in &self.folders {
            fs::remove_dir(folder).map_err(failed("remove", folder))?;
        }
        Ok(())
    }
}

fn check(path: &Path, found: u64, written: u64) -> Result<(), Error> {
    match found == written {
        true => Ok(()),
        false => Err(Error::Length {
            path: path.to_owned(),
            found,
            written,
        }),
    }
}

/// The large file.
struct Large {
    path: PathBuf,
    length: u64,
}

impl Large {
    fn write(&self) -> Result<(), Error> {
        let piece = content(PIECE);
        let write = || {
            let mut file = File::create(&self.path)?;
            for _ in 0..self.length / PIECE as u64 {
                file.write_all(&piece)?;
            }
            file.sync_all()
        };
        write().map_err(failed("write", &self.path))
    }

    fn read(&self) -> Result<(), Error> {
        let mut piece = vec![0; PIECE];
        let mut read = || {
            let mut file = File::open(&self.path)?;
            let mut found = 0;
            loop {
                match file.read(&mut piece)? {
                    0 => return Ok(found),
                    count => found += count as u64,
                }
            }
        };
        let found = read().map_err(failed("read", &self.path))?;
        check(&self.path, found, self.length)
    }

    fn read_here_and_there(&self, reads: u32) -> Result<(), Error> {
        let blocks = self.length / BLOCK as u64;
        let mut block = [0; BLOCK];
        let mut read = || {
            let file = File::open(&self.path)?;
            for place in places().take(reads as usize) {
                file.read_exact_at(&mut block, place % blocks * BLOCK as u64)?;
            }
            Ok(())
        };
        read().map_err(failed("read", &self.path))
    }
}

/// Numbers that nobody reads ahead: Marsaglia's xorshift, the same in every run.
fn places() -> impl Iterator<Item = u64> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    std::iter::repeat_with(move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    })
}

fn content(length: usize) -> Vec<u8> {
    places().flat_map(u64::to_le_bytes).take(length).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(folder: PathBuf) -> Plan {
        Plan {
            folder,
            files: 120,
            file_bytes: 3000,
            large_mib: 2,
            reads: 30,
            drop_caches: false,
        }
    }

    #[test]
    fn everything_is_measured_and_nothing_is_left() {
        let root = tempfile::tempdir().unwrap();
        let samples = measure(&plan(root.path().join("x"))).unwrap();
        let of_files = [
            samples.create,
            samples.walk,
            samples.walk_again,
            samples.status,
            samples.read,
            samples.remove,
        ];
        assert!(of_files.iter().all(|work| work.amount == 120 && work.ns > 0));
        assert!(
            [samples.write, samples.sequential]
                .iter()
                .all(|work| work.amount == 2 << 20)
        );
        assert_eq!(samples.random.amount, 30);
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
    }

    #[test]
    fn the_tree_is_what_was_planned() {
        let root = tempfile::tempdir().unwrap();
        let plan = plan(root.path().to_owned());
        let tree = Tree::new(&plan);
        tree.create().unwrap();
        assert_eq!(tree.folders.len(), 3);
        assert_eq!(tree.list(|_| Ok(())).unwrap(), 120);
        fs::write(&tree.files[7], "short").unwrap();
        let error = tree.read().unwrap_err();
        assert!(
            matches!(
                &error,
                Error::Length {
                    found: 5,
                    written: 3000,
                    ..
                }
            ),
            "{error}"
        );
    }

    #[test]
    fn what_fails_is_told_with_its_path() {
        let root = tempfile::tempdir().unwrap();
        let error = measure(&plan(root.path().to_owned())).unwrap_err();
        assert!(error.to_string().starts_with("cannot make /"), "{error}");
    }
}
