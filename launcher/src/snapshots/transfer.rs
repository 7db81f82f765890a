//! A snapshot in one file, for another host or a shelf. It holds pages that have something in them, and is as long as those:
//!
//! ```text
//!   8 bytes  "LGHTEXPT"
//!   4        version of this format
//!   4        length of the manifest
//!   …        the manifest
//!            then for the state, the memory and the disk:
//!   8        number of a page
//!   4        how many bytes of the file follow from there: whole pages, but for the last of a file
//!   …        those
//!   …        and so on, to one of length 0
//! ```
//!
//! All numbers are little-endian. What an import has written is checked by the checksums of the manifest, all of it.

use super::base::Base;
use super::booted;
use super::copy::{Checksum, PAGE, Pages, checksum, each_page};
use super::create::write;
use super::error::SnapshotError;
use super::manifest::{Contents, Manifest};
use super::store::{Claim, FullName};
use crate::config::Config;
use crate::error::Result;
use crate::paths::Paths;
use lighter_protocol::supervisor::{MEMORY_FILE, STATE_FILE};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

const MAGIC: [u8; 8] = *b"LGHTEXPT";

/// Changes with everything that changes the format.
const VERSION: u32 = 1;

/// No manifest is longer, bytes.
const MOST_MANIFEST: u32 = 1 << 20;

/// The most in one piece, bytes.
const MOST_PIECE: usize = 256 * PAGE;

/// Writes the snapshot `base`.
///
/// # Errors
/// When it is damaged or cannot be read, or `out` cannot be written.
pub fn export(base: &Base, out: &mut impl Write) -> io::Result<()> {
    let disk = base.flat_disk().map_err(io::Error::other)?;
    let mut flat = base.manifest.clone();
    if let Pages::Disk(_) = &disk {
        // Several files become one, with a checksum of its own. Theirs are checked before, for nobody can afterwards.
        base.verify_disk().map_err(io::Error::other)?;
        flat.disk = vec![Contents {
            bytes: disk.length()?,
            checksum: Some(checksum(&disk)?),
        }];
    }
    let manifest = serde_json::to_vec(&flat)?;
    let length = u32::try_from(manifest.len()).map_err(io::Error::other)?;
    out.write_all(&MAGIC)?;
    out.write_all(&VERSION.to_le_bytes())?;
    out.write_all(&length.to_le_bytes())?;
    out.write_all(&manifest)?;
    let open = |name| Ok::<_, io::Error>(Pages::File(File::open(base.folder.join(name))?));
    let files = [open(STATE_FILE)?, open(MEMORY_FILE)?, disk];
    for ((name, contents), file) in flat.files().into_iter().zip(&files) {
        let path = base.folder.join(name);
        let sum = export_file(file, out)?;
        if contents.checksum.as_ref().is_some_and(|wanted| *wanted != sum) {
            return Err(io::Error::other(SnapshotError::Checksum(path)));
        }
    }
    out.flush()
}

/// Returns the checksum of what it wrote.
fn export_file(file: &Pages, out: &mut impl Write) -> io::Result<String> {
    let mut sum = Checksum::default();
    let mut first = 0;
    let mut piece = vec![];
    each_page(file, |number, page| {
        sum.page(number, page);
        let next = first + (piece.len() / PAGE) as u64;
        if !piece.is_empty() && (number != next || piece.len() >= MOST_PIECE) {
            write_piece(out, first, &piece)?;
            piece.clear();
        }
        if piece.is_empty() {
            first = number;
        }
        piece.extend_from_slice(page);
        Ok(())
    })?;
    if !piece.is_empty() {
        write_piece(out, first, &piece)?;
    }
    write_piece(out, 0, &[])?;
    Ok(sum.finish(file.length()?))
}

fn write_piece(out: &mut impl Write, first: u64, bytes: &[u8]) -> io::Result<()> {
    out.write_all(&first.to_le_bytes())?;
    // At most `MOST_PIECE`.
    out.write_all(&(bytes.len() as u32).to_le_bytes())?;
    out.write_all(bytes)
}

/// Reads an exported snapshot from `input`, which is called `path`, and keeps it, under `name` if that is given. Returns its name,
/// and what this host lacks to start it, if something.
///
/// # Errors
/// When it is not a whole one, or cannot be kept.
pub fn import(
    paths: &Paths,
    path: &Path,
    input: &mut impl Read,
    name: Option<FullName>,
) -> Result<(FullName, Option<SnapshotError>)> {
    let mut input = Input { path, input };
    let mut manifest = input.manifest()?;
    let name = name.unwrap_or_else(|| FullName {
        vm: manifest.vm.clone(),
        name: manifest.name.clone(),
    });
    if manifest.disk.len() != 1 {
        return Err(input.wrong("its data disk is not one file").into());
    }
    let claim = Claim::take(paths, &name.vm)?;
    let unfinished = claim.begin(&name.name)?;
    for (file, contents) in manifest.files() {
        if contents.checksum.is_none() {
            return Err(input.wrong(format!("its {file} has no checksum")).into());
        }
        input.file(&unfinished.folder.join(&file), contents)?;
    }
    manifest.vm = name.vm.clone();
    manifest.name = name.name.clone();
    let mut base = Base {
        folder: unfinished.folder.clone(),
        manifest,
    };
    base.verify()?;
    let lacks = match base.booted(paths, &Config::load(&paths.config_file)?) {
        Ok([kernel, image]) => {
            // From now on known without being read.
            for (booted, path) in [
                (&mut base.manifest.kernel, kernel),
                (&mut base.manifest.image, image),
            ] {
                let used = File::open(&path).and_then(|file| booted::used(&path, &file));
                booted.file = used.map_err(|error| SnapshotError::Read(path, error))?;
            }
            None
        }
        Err(error) => Some(error),
    };
    write(&unfinished.folder, &base.manifest)?;
    unfinished.finish()?;
    Ok((name, lacks))
}

struct Input<'a, R> {
    path: &'a Path,
    input: &'a mut R,
}

impl<R: Read> Input<'_, R> {
    fn wrong(&self, why: impl Into<String>) -> SnapshotError {
        SnapshotError::NotExported {
            path: self.path.into(),
            why: why.into(),
        }
    }

    fn read(&mut self, buffer: &mut [u8]) -> std::result::Result<(), SnapshotError> {
        self.input.read_exact(buffer).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => self.wrong("it ends early"),
            _ => SnapshotError::Read(self.path.into(), error),
        })
    }

    fn u32(&mut self) -> std::result::Result<u32, SnapshotError> {
        let mut bytes = [0; 4];
        self.read(&mut bytes)?;
        Ok(u32::from_le_bytes(bytes))
    }

    fn u64(&mut self) -> std::result::Result<u64, SnapshotError> {
        let mut bytes = [0; 8];
        self.read(&mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }

    fn manifest(&mut self) -> std::result::Result<Manifest, SnapshotError> {
        let mut magic = [0; 8];
        self.read(&mut magic)?;
        if magic != MAGIC {
            return Err(self.wrong("it begins otherwise"));
        }
        let version = self.u32()?;
        if version != VERSION {
            let why = format!("it has format {version}, and this Lighter reads format {VERSION}");
            return Err(self.wrong(why));
        }
        let length = self.u32()?;
        if length > MOST_MANIFEST {
            return Err(self.wrong(format!("its manifest would have {length} bytes")));
        }
        let mut bytes = vec![0; length as usize];
        self.read(&mut bytes)?;
        Manifest::parse(self.path.into(), &bytes)
    }

    /// Makes the file `to` of what comes.
    fn file(&mut self, to: &PathBuf, contents: &Contents) -> std::result::Result<(), SnapshotError> {
        let write = |error| SnapshotError::Write(to.clone(), error);
        let mut options = File::options();
        options.write(true).create_new(true).mode(0o600);
        let file = options.open(to).map_err(write)?;
        file.set_len(contents.bytes).map_err(write)?;
        let mut buffer = vec![0; MOST_PIECE];
        loop {
            let (first, length) = (self.u64()?, self.u32()? as usize);
            if length == 0 {
                return Ok(());
            }
            let start = first.checked_mul(PAGE as u64);
            let end = start.and_then(|start| start.checked_add(length as u64));
            let (Some(start), true) = (
                start,
                length <= MOST_PIECE && end.is_some_and(|end| end <= contents.bytes),
            ) else {
                return Err(self.wrong("a piece lies behind the end of its file"));
            };
            self.read(&mut buffer[..length])?;
            file.write_all_at(&buffer[..length], start).map_err(write)?;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::manifest::testing::manifest;
    use super::super::store;
    use super::*;
    use lighter_disk::Chain;
    use proptest::prelude::*;
    use std::sync::Arc;

    /// A snapshot in the folder, and what it is exported as.
    fn exported(folder: &Path) -> Vec<u8> {
        let mut manifest = manifest();
        for (name, length) in [("state", 100), ("memory", 4 << 20), ("disk", 8 << 20)] {
            let file = File::options()
                .read(true)
                .write(true)
                .create(true)
                .truncate(true)
                .open(folder.join(name))
                .unwrap();
            file.set_len(length).unwrap();
            file.write_all_at(name.as_bytes(), length - 50).unwrap();
            file.write_all_at(&[7; 9000], (length / 2) & !4095).unwrap_or(());
            file.set_len(length).unwrap();
            let contents = Contents {
                bytes: length,
                checksum: Some(checksum(&Pages::File(file)).unwrap()),
            };
            match name {
                "state" => manifest.state = contents,
                "memory" => manifest.memory = contents,
                _ => manifest.disk = vec![contents],
            }
        }
        let base = Base {
            folder: folder.into(),
            manifest,
        };
        base.verify().unwrap();
        let mut out = vec![];
        export(&base, &mut out).unwrap();
        out
    }

    fn import_bytes(paths: &Paths, mut bytes: &[u8]) -> Result<(FullName, Option<SnapshotError>)> {
        import(paths, Path::new("file"), &mut bytes, None)
    }

    #[test]
    fn what_is_damaged_is_not_exported() {
        let folder = tempfile::tempdir().unwrap();
        let paths = Paths::at(&folder.path().join("home"));
        let (name, _) = import_bytes(&paths, &exported(folder.path())).unwrap();
        let base = store::load(&paths, &name).unwrap();
        export(&base, &mut io::sink()).unwrap();
        let memory = File::options()
            .write(true)
            .open(base.folder.join("memory"))
            .unwrap();
        memory.write_all_at(&[1], 5).unwrap();
        let error = export(&base, &mut io::sink()).unwrap_err().to_string();
        assert!(error.contains("memory does not have the checksum"), "{error}");
    }

    #[test]
    fn a_disk_of_several_files_is_exported_as_one() {
        let folder = tempfile::tempdir().unwrap();
        exported(folder.path());
        let path = |name: &str| folder.path().join(name);
        let mut base = Base {
            folder: folder.path().into(),
            manifest: manifest(),
        };
        File::create_new(path("disk.1")).unwrap();
        let open = |name: &str| File::options().read(true).write(true).open(path(name)).unwrap();
        let layer = open("disk.1");
        lighter_disk::create(&layer, 8 << 20).unwrap();
        let below = Arc::new(File::open(path("disk")).unwrap());
        let mut chain = Chain::open(below, vec![Arc::new(layer)]).unwrap();
        chain.prepare_write(5000, 3).unwrap();
        let top = &chain.files()[1];
        top.write_all_at(b"new", chain.start() + 5000).unwrap();
        chain.flush().unwrap();
        let contents = |name: &str| {
            let file = Pages::File(File::open(path(name)).unwrap());
            Contents {
                bytes: file.length().unwrap(),
                checksum: Some(checksum(&file).unwrap()),
            }
        };
        base.manifest.state = contents("state");
        base.manifest.memory = contents("memory");
        base.manifest.disk = vec![contents("disk"), contents("disk.1")];
        base.verify().unwrap();
        let mut bytes = vec![];
        export(&base, &mut bytes).unwrap();
        let paths = Paths::at(&folder.path().join("home"));
        let (name, _) = import_bytes(&paths, &bytes).unwrap();
        let imported = store::load(&paths, &name).unwrap();
        assert_eq!(imported.manifest.disk.len(), 1);
        let flat = std::fs::read(imported.folder.join("disk")).unwrap();
        let mut wanted = std::fs::read(path("disk")).unwrap();
        wanted[5000..5003].copy_from_slice(b"new");
        assert!(flat == wanted);
        open("disk.1").write_all_at(&[2], 4096).unwrap();
        let error = export(&base, &mut io::sink()).unwrap_err().to_string();
        assert!(error.contains("disk.1 does not have the checksum"), "{error}");
    }

    #[test]
    fn what_is_exported_can_be_imported_once() {
        let folder = tempfile::tempdir().unwrap();
        let paths = Paths::at(&folder.path().join("home"));
        let bytes = exported(folder.path());
        assert!(bytes.len() < 100_000, "{} bytes", bytes.len());
        let (name, lacks) = import_bytes(&paths, &bytes).unwrap();
        assert_eq!(name.to_string(), "a/s");
        assert!(lacks.is_some(), "there is no kernel");
        let base = store::load(&paths, &name).unwrap();
        base.check().unwrap();
        base.verify().unwrap();
        assert_eq!(store::list(&paths).unwrap(), [name]);
        let again = import_bytes(&paths, &bytes).unwrap_err();
        assert!(again.message.contains("exists already"), "{again}");
        let other = FullName {
            vm: "b".parse().unwrap(),
            name: "t".parse().unwrap(),
        };
        let mut input = &bytes[..];
        let (name, _) = import(&paths, Path::new("file"), &mut input, Some(other.clone())).unwrap();
        assert_eq!(store::load(&paths, &name).unwrap().manifest.vm, other.vm);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn what_is_damaged_is_refused_and_leaves_nothing(place: proptest::sample::Index, bit in 0u8..8, cut: bool) {
            let folder = tempfile::tempdir().unwrap();
            let paths = Paths::at(&folder.path().join("home"));
            let good = exported(folder.path());
            let mut bytes = good.clone();
            let place = place.index(bytes.len());
            match cut {
                true => bytes.truncate(place),
                false => bytes[place] ^= 1 << bit,
            }
            match import_bytes(&paths, &bytes) {
                Err(_) => prop_assert!(store::list(&paths).unwrap().is_empty()),
                // A changed word of the manifest may be as good.
                Ok((name, _)) => store::load(&paths, &name).unwrap().verify().unwrap(),
            }
        }
    }
}
