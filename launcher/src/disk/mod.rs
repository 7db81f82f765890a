//! The data disk of a new VM: a file with holes, or what other disks are made of, and a layer above that.

pub mod files;

use crate::size::Size;
use crate::vm::VmError;
use files::DiskFiles;
use std::fs::OpenOptions;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Where the data disk of a new VM comes from.
#[derive(Clone, Copy, Debug)]
pub enum DiskSource<'a> {
    /// It is empty.
    New,
    /// It goes on from the disk that is made of these files, the base first, which do not change any more.
    Frozen(&'a [PathBuf]),
}

/// Makes the data disk at `path`, of `size`. Nothing is there yet.
///
/// # Errors
/// When the file cannot be made.
pub fn make(path: &Path, size: Size, source: DiskSource<'_>) -> Result<(), VmError> {
    match source {
        DiskSource::New => create(path, size),
        DiskSource::Frozen(files) => DiskFiles::of_frozen(path, files, size.0).map(drop),
    }
}

fn create(path: &Path, size: Size) -> Result<(), VmError> {
    let write = |error| VmError::Write(path.into(), error);
    let mut options = OpenOptions::new();
    options.write(true).create_new(true).mode(0o600);
    let file = options.open(path);
    file.and_then(|file| file.set_len(size.0)).map_err(write)
}

/// Sees to it that no disk with data is at `path`, where no VM is.
///
/// # Errors
/// When there is one.
pub fn refuse_stray(path: &Path) -> Result<(), VmError> {
    match std::fs::metadata(path) {
        Ok(metadata) if metadata.blocks() > 0 => Err(VmError::StrayDisk(path.into())),
        Ok(_) => std::fs::remove_file(path).map_err(|error| VmError::Write(path.into(), error)),
        Err(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::unix::fs::FileExt;
    use std::sync::Arc;

    fn list(folder: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(folder).unwrap();
        let mut names: Vec<_> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    fn chain(base: &Path) -> lighter_disk::Chain {
        let open = |path: &PathBuf| Arc::new(File::options().read(true).write(true).open(path).unwrap());
        let paths = DiskFiles::of(base).unwrap().paths();
        lighter_disk::Chain::open(open(&paths[0]), paths[1..].iter().map(open).collect()).unwrap()
    }

    fn write(base: &Path, at: u64, byte: u8) {
        let mut chain = chain(base);
        chain.make_writable().unwrap();
        chain.prepare_write(at, 512).unwrap();
        let top = &chain.files()[chain.top()];
        top.write_all_at(&[byte; 512], chain.start() + at).unwrap();
        chain.flush().unwrap();
    }

    fn byte(base: &Path, at: u64) -> u8 {
        let mut byte = [0];
        chain(base).read_at(&mut byte, at).unwrap();
        byte[0]
    }

    const SIZE: u64 = 1 << 20;

    #[test]
    fn a_disk_goes_on_from_files_that_others_have_and_none_with_data_is_replaced() {
        let root = tempfile::tempdir().unwrap();
        let folder = |name| {
            let folder = root.path().join(name);
            std::fs::create_dir(&folder).unwrap();
            folder
        };
        let (first, second) = (folder("first"), folder("second"));
        let [one, two] = [&first, &second].map(|folder| folder.join("data.img"));
        make(&one, Size(SIZE), DiskSource::New).unwrap();
        std::fs::write(&one, vec![7; SIZE as usize]).unwrap();
        assert!(!DiskFiles::of(&one).unwrap().has_layers());
        let added = DiskFiles::of(&one).unwrap().add_layer(SIZE, true).unwrap();
        assert_eq!(DiskFiles::of(&one).unwrap(), added.files);
        files::protect(&added.files.frozen());
        make(&two, Size(SIZE), DiskSource::New).unwrap();
        // Nothing was written to it.
        refuse_stray(&two).unwrap();
        let frozen = added.files.frozen();
        make(&two, Size(SIZE), DiskSource::Frozen(&frozen)).unwrap();
        assert_eq!(list(&second), ["data.img", "data.img.1", "disk.json"]);
        assert_eq!(std::fs::metadata(&two).unwrap().nlink(), 2);
        write(&one, 0, 1);
        write(&two, 0, 2);
        std::fs::remove_dir_all(&first).unwrap();
        assert_eq!([byte(&two, 0), byte(&two, 512)], [2, 7]);
        let stray = refuse_stray(&two);
        assert!(matches!(stray, Err(VmError::StrayDisk(_))), "{stray:?}");
        let third = folder("third");
        let missing = make(&third.join("data.img"), Size(SIZE), DiskSource::Frozen(&frozen));
        assert!(matches!(missing, Err(VmError::Read(..))), "{missing:?}");
        assert!(list(&third).is_empty());
    }

    #[test]
    fn a_disk_that_is_forked_again_and_again_has_few_files_and_all_of_its_data() {
        let mut other = vec![];
        let root = tempfile::tempdir().unwrap();
        let base = root.path().join("data.img");
        make(&base, Size(SIZE), DiskSource::New).unwrap();
        std::fs::write(&base, vec![9; SIZE as usize]).unwrap();
        let mut most = 0;
        for round in 0..20u8 {
            if round == 10 {
                // Somebody else has the base from here on.
                std::fs::hard_link(&base, root.path().join("other")).unwrap();
                other = std::fs::read(&base).unwrap();
            }
            let files = DiskFiles::of(&base).unwrap();
            let added = files.add_layer(SIZE, true).unwrap();
            most = most.max(added.files.paths().len());
            added.files.sweep();
            write(&base, u64::from(round) * 40_000, round);
        }
        assert!(most <= 8, "{most}");
        // The list, too.
        assert!(list(root.path()).len() <= most + 2);
        // Until then what was written went to the base in the end.
        assert_eq!([other[0], other[40_000]], [0, 1]);
        assert!(std::fs::read(root.path().join("other")).unwrap() == other);
        assert!((0..20).all(|round| byte(&base, u64::from(round) * 40_000) == round));
        assert_eq!(byte(&base, SIZE - 1), 9);
    }

    #[test]
    fn a_layer_that_cannot_be_made_changes_nothing_and_what_is_left_over_is_swept() {
        let root = tempfile::tempdir().unwrap();
        let base = root.path().join("data.img");
        make(&base, Size(SIZE), DiskSource::New).unwrap();
        let files = DiskFiles::of(&base).unwrap();
        let added = files.add_layer(100, true);
        assert!(matches!(added, Err(VmError::Layer(..))), "{added:?}");
        assert_eq!(list(root.path()), ["data.img"]);
        // As one that was cut short leaves it.
        std::fs::write(root.path().join("data.img.5"), "").unwrap();
        std::fs::write(root.path().join("data.img.old"), "").unwrap();
        let added = files.add_layer(SIZE, true).unwrap();
        assert!(added.files.top().ends_with("data.img.6"));
        added.files.sweep();
        assert_eq!(
            list(root.path()),
            ["data.img", "data.img.6", "data.img.old", "disk.json"]
        );
        std::fs::write(root.path().join("disk.json"), "{").unwrap();
        assert!(matches!(DiskFiles::of(&base), Err(VmError::Read(..))));
    }
}
