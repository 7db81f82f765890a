//! What processes and folders take.

use super::world::Home;
use rustix::process::Pid;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

/// What marks guest memory among the mappings of a monitor: it alone is left out of core dumps.
const GUEST_FLAG: &str = "dd";

/// What a process takes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cost {
    pub descriptors: usize,
    pub threads: usize,
    /// Memory of its own: no file's, so not the program, which all of its kind share, and not the guest's.
    pub own_kib: u64,
    /// Guest memory that it has, and no file.
    pub guest_kib: u64,
}

impl Cost {
    #[track_caller]
    pub fn of(pid: Pid) -> Self {
        Self::try_of(pid).unwrap_or_else(|error| panic!("what process {pid:?} takes: {error}"))
    }

    /// The same of one that may end meanwhile, or forbid it.
    pub fn try_of(pid: Pid) -> io::Result<Self> {
        let process = PathBuf::from(format!("/proc/{}", pid.as_raw_nonzero()));
        let count = |folder: &str| std::fs::read_dir(process.join(folder)).map(Iterator::count);
        let (own_kib, guest_kib) = anonymous(&std::fs::read_to_string(process.join("smaps"))?);
        Ok(Self {
            descriptors: count("fd")?,
            threads: count("task")?,
            own_kib,
            guest_kib,
        })
    }

    #[track_caller]
    pub fn assert_flat(self, first: Self, growth_kib: u64, more_descriptors: usize) {
        let descriptors_are_flat = self.descriptors <= first.descriptors + more_descriptors;
        assert!(descriptors_are_flat, "{first:?}, then {self:?}");
        let memory_is_flat = self.own_kib + self.guest_kib <= first.own_kib + first.guest_kib + growth_kib;
        assert!(memory_is_flat, "{first:?}, then {self:?}");
    }
}

/// Memory that is no file's, KiB, by `smaps`: the process's own, and the guest's.
fn anonymous(smaps: &str) -> (u64, u64) {
    let (mut own, mut guest, mut here) = (0, 0, 0);
    for line in smaps.lines() {
        if let Some(size) = line.strip_prefix("Anonymous:") {
            let size = size.trim().trim_end_matches(" kB").parse::<u64>();
            here = size.unwrap_or_else(|error| panic!("{line:?}: {error}"));
        } else if let Some(flags) = line.strip_prefix("VmFlags:") {
            // The last line of a mapping.
            match flags.split_whitespace().any(|flag| flag == GUEST_FLAG) {
                true => guest += here,
                false => own += here,
            }
            here = 0;
        }
    }
    (own, guest)
}

/// The files of a home but logs and the layers of disks, and the KiB that all of them take.
pub fn disk(home: &Home) -> (Vec<PathBuf>, u64) {
    let (mut files, mut blocks) = (vec![], 0);
    let mut folders = vec![home.path().to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).expect("a folder") {
            let path = entry.expect("an entry").path();
            let metadata = path.symlink_metadata().expect("a file");
            if metadata.is_dir() {
                folders.push(path.clone());
            }
            let name = path.to_string_lossy();
            if name.contains(".log") {
                continue;
            }
            blocks += metadata.blocks();
            // Each snapshot leaves a layer, until they are merged.
            if !name.contains("/data.img.") && !name.ends_with("/disk.json") {
                files.push(path);
            }
        }
    }
    files.sort();
    (files, blocks / 2)
}
