//! Changes of `config.toml` that keep its comments, its order, and what is wrong with it: a change that would leave a file which is
//! not understood is not made.

use super::keys::{Key, Kind};
use super::{Config, ConfigError};
use crate::error::{Code, Error};
use crate::lock::{Lock, LockError};
use crate::mounts::Mount;
use crate::paths::{Paths, PathsError, create_private};
use crate::vm::{VmError, write_atomically};
use std::io;
use std::path::{Path, PathBuf};
use toml_edit::{Array, DocumentMut, Item, Table, TableLike, Value};

/// Why a key is as it was.
#[derive(Debug, thiserror::Error)]
pub enum EditError {
    /// The value is not of the key's kind.
    #[error("{key} takes {wanted}, not {given}")]
    Kind {
        /// The key.
        key: &'static str,
        /// What it takes.
        wanted: &'static str,
        /// What was given.
        given: String,
    },
    /// The file would not be understood.
    #[error("cannot change {key}, and have left the file as it was")]
    Refused {
        /// The key.
        key: &'static str,
        /// What would be wrong.
        #[source]
        source: Box<ConfigError>,
    },
    /// The file is there and cannot be read, or is no TOML.
    #[error("cannot use the configuration as it is")]
    Read(#[source] Box<ConfigError>),
    /// It is no TOML for whoever edits it.
    #[error("cannot use {}", .0.display())]
    NoToml(PathBuf, #[source] toml_edit::TomlError),
    /// The folder cannot be made.
    #[error("cannot make the configuration's folder")]
    Folder(#[from] PathsError),
    /// Others may be changing it.
    #[error("cannot wait for others who change the configuration")]
    Lock(#[from] LockError),
    /// It cannot be written.
    #[error("cannot change the configuration")]
    Write(#[from] VmError),
}

impl From<EditError> for Error {
    fn from(error: EditError) -> Self {
        match &error {
            EditError::Kind { .. } | EditError::Refused { .. } => {
                Self::of(Code::Usage, &error).hint("lighter config ls shows every key and its value")
            }
            EditError::Read(_) | EditError::NoToml(..) => {
                Self::of(Code::Usage, &error).hint("correct that file, or remove it to use the defaults")
            }
            EditError::Folder(_) | EditError::Lock(_) | EditError::Write(_) => {
                Self::of(Code::Failure, &error).hint("check the folder's permissions and the free space")
            }
        }
    }
}

/// Sets `key` to `values`.
///
/// # Errors
/// When they are none for it, or the file cannot be changed.
pub fn set(paths: &Paths, key: &Key, values: &[String]) -> Result<(), EditError> {
    let value = value_of(key, values)?;
    change(paths, key, |document| insert(document, key, value))
}

/// Sets `key` no more.
///
/// # Errors
/// When the file cannot be changed.
pub fn unset(paths: &Paths, key: &Key) -> Result<(), EditError> {
    change(paths, key, |document| remove(document, key))
}

fn change(paths: &Paths, key: &Key, edit: impl FnOnce(&mut DocumentMut)) -> Result<(), EditError> {
    paths.create_vms()?;
    let _lock = Lock::acquire(&paths.config_lock())?;
    // Where it is a link, its target is the file.
    let path = std::fs::canonicalize(&paths.config_file).unwrap_or_else(|_| paths.config_file.clone());
    let old = match super::text(&path) {
        Err(ConfigError::Read(_, error)) if error.kind() == io::ErrorKind::NotFound => String::new(),
        result => result.map_err(|error| EditError::Read(Box::new(error)))?,
    };
    let mut document: DocumentMut = old
        .parse()
        .map_err(|error| EditError::NoToml(path.clone(), error))?;
    edit(&mut document);
    let new = document.to_string();
    if new == old {
        return Ok(());
    }
    Config::parse(&new, &path).map_err(|source| EditError::Refused {
        key: key.name,
        source: Box::new(source),
    })?;
    if let Some(folder) = path.parent() {
        create_private(folder)?;
    }
    Ok(write_atomically(&path, new.as_bytes())?)
}

/// The value that `values` are of `key`.
fn value_of(key: &Key, values: &[String]) -> Result<Value, EditError> {
    let refused = |wanted| EditError::Kind {
        key: key.name,
        wanted,
        given: match values {
            [] => "nothing".into(),
            values => format!("{:?}", values.join(" ")),
        },
    };
    match (key.kind, values) {
        (Kind::Texts, values) => Ok(values.iter().collect::<Array>().into()),
        // Relative paths are the user's of now. One that is none is refused with the file.
        (Kind::Mounts, values) => {
            let absolute = |value: &String| {
                value
                    .parse()
                    .map_or(value.clone(), |mount: Mount| mount.to_string())
            };
            Ok(values.iter().map(absolute).collect::<Array>().into())
        }
        (Kind::File, [value]) => {
            let path = std::path::absolute(value).ok();
            let text = path.as_deref().and_then(Path::to_str).unwrap_or(value);
            Ok(text.into())
        }
        (Kind::Number, [value]) => {
            let number: Result<i64, _> = value.trim().parse();
            number.map(Value::from).map_err(|_| refused("a whole number"))
        }
        (Kind::Number, _) => Err(refused("a whole number")),
        (Kind::Truth, [value]) => {
            let truth: Result<bool, _> = value.trim().parse();
            truth.map(Value::from).map_err(|_| refused("true or false"))
        }
        (Kind::Truth, _) => Err(refused("true or false")),
        (Kind::Text, [value]) => Ok(value.as_str().into()),
        (Kind::Text | Kind::File, _) => Err(refused("one value")),
    }
}

/// Sets a key; what stands around its value stays.
fn insert(document: &mut DocumentMut, key: &Key, mut value: Value) {
    let (table, name) = key.path();
    let root = document.as_table_mut();
    let home: Option<&mut dyn TableLike> = match table {
        None => Some(root),
        Some(table) => root
            .entry(table)
            .or_insert_with(|| Item::Table(Table::new()))
            .as_table_like_mut(),
    };
    // Where the table's name has another value, the file is not understood, and that is said.
    let Some(home) = home else { return };
    match home.get_mut(name).and_then(Item::as_value_mut) {
        Some(old) => {
            *value.decor_mut() = old.decor().clone();
            *old = value;
        }
        None => drop(home.insert(name, Item::Value(value))),
    }
}

/// Takes a key away, and its table when that holds nothing else.
fn remove(document: &mut DocumentMut, key: &Key) {
    let (table, name) = key.path();
    let root = document.as_table_mut();
    let Some(table) = table else {
        root.remove(name);
        return;
    };
    if let Some(home) = root.get_mut(table).and_then(Item::as_table_like_mut) {
        home.remove(name);
        if home.is_empty() {
            root.remove(table);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lighter_protocol::causes::chain;
    use std::os::unix::fs::symlink;

    struct World {
        _folder: tempfile::TempDir,
        paths: Paths,
    }

    fn world(text: &str) -> World {
        let folder = tempfile::tempdir().unwrap();
        let paths = Paths::at(folder.path());
        std::fs::write(&paths.config_file, text).unwrap();
        World {
            _folder: folder,
            paths,
        }
    }

    impl World {
        fn set(&self, name: &str, values: &[&str]) -> Result<String, String> {
            let values: Vec<String> = values.iter().map(ToString::to_string).collect();
            set(&self.paths, Key::find(name).unwrap(), &values).map_err(|error| chain(&error))?;
            Ok(self.text())
        }

        fn unset(&self, name: &str) -> String {
            unset(&self.paths, Key::find(name).unwrap()).unwrap();
            self.text()
        }

        fn text(&self) -> String {
            std::fs::read_to_string(&self.paths.config_file).unwrap()
        }
    }

    #[test]
    fn comments_and_order_stay() {
        let world =
            world("# mine\ncpus = 2 # enough\n\n[ports]\n# not the network\ndefault-address = \"::1\"\n");
        assert_eq!(
            world.set("cpus", &["3"]).unwrap(),
            "# mine\ncpus = 3 # enough\n\n[ports]\n# not the network\ndefault-address = \"::1\"\n"
        );
        assert_eq!(
            world.set("memory", &["2g"]).unwrap(),
            "# mine\ncpus = 3 # enough\nmemory = \"2g\"\n\n[ports]\n# not the network\ndefault-address = \"::1\"\n"
        );
        let text = world.set("ports.default-address", &["127.0.0.1"]).unwrap();
        assert!(
            text.ends_with("# not the network\ndefault-address = \"127.0.0.1\"\n"),
            "{text}"
        );
        assert_eq!(
            world.unset("ports.default-address").trim_end(),
            "# mine\ncpus = 3 # enough\nmemory = \"2g\""
        );
        assert_eq!(world.unset("kernel"), world.text());
    }

    #[test]
    fn every_kind_of_value_can_be_set_where_there_is_no_file_yet() {
        let folder = tempfile::tempdir().unwrap();
        let paths = Paths::at(&folder.path().join("deep/er"));
        for (name, values) in [
            ("context", &["false"][..]),
            ("mounts", &["/srv", "/data:ro"]),
            ("registry-mirrors", &[]),
            ("ports.default-address", &["127.0.0.1"]),
            ("http-proxy", &[""]),
        ] {
            let values: Vec<String> = values.iter().map(ToString::to_string).collect();
            set(&paths, Key::find(name).unwrap(), &values).unwrap();
        }
        assert_eq!(
            std::fs::read_to_string(&paths.config_file).unwrap(),
            "context = false\nmounts = [\"/srv\", \"/data:ro\"]\nregistry-mirrors = []\nhttp-proxy = \"\"\n\n[ports]\n\
             default-address = \"127.0.0.1\"\n"
        );
        assert_eq!(
            Config::load(&paths.config_file).unwrap().http_proxy,
            Some(String::new())
        );
    }

    #[test]
    fn a_value_that_is_none_is_refused_and_the_file_untouched() {
        let text = "cpus = 2\n";
        let world = world(text);
        for (name, values, words) in [
            ("cpus", &["two"][..], "cpus takes a whole number, not \"two\""),
            ("cpus", &["0"], "out of range"),
            ("cpus", &["1", "2"], "not \"1 2\""),
            ("context", &["yes"], "true or false"),
            ("memory", &["lots"], "not a size"),
            ("memory", &[], "not nothing"),
            ("auto-suspend", &["soon"], "no time"),
            ("mounts", &["/a:b"], "colon"),
            ("ports.default-address", &["localhost"], "IP address"),
        ] {
            let error = world.set(name, values).unwrap_err();
            assert!(error.contains(words), "{name} {values:?}: {error}");
            assert_eq!(world.text(), text);
        }
    }

    #[test]
    fn a_file_that_is_not_understood_is_left_alone_unless_that_is_what_is_changed() {
        let world = world("cpus = \"many\"\nports = 1\n");
        assert!(
            world
                .set("memory", &["2g"])
                .unwrap_err()
                .contains("config.toml:1: ")
        );
        let error = world.set("ports.default-address", &["::1"]);
        assert!(error.is_err() || world.text() == "cpus = \"many\"\nports = 1\n");
        std::fs::write(&world.paths.config_file, "cpus = \"many\"\n").unwrap();
        assert_eq!(world.set("cpus", &["2"]).unwrap(), "cpus = 2\n");
        std::fs::write(&world.paths.config_file, "cpus = = 2\n").unwrap();
        assert!(world.set("cpus", &["2"]).unwrap_err().contains("config.toml"));
    }

    #[test]
    fn a_relative_path_is_that_of_who_sets_it() {
        let world = world("");
        world.set("kernel", &["vmlinux"]).unwrap();
        let text = world.set("mounts", &["src:ro"]).unwrap();
        let here = std::env::current_dir().unwrap();
        let here = here.display();
        assert_eq!(
            text,
            format!("kernel = \"{here}/vmlinux\"\nmounts = [\"{here}/src:ro\"]\n")
        );
    }

    #[test]
    fn a_link_to_the_file_stays_one() {
        let world = world("");
        let real = world.paths.vms.with_file_name("dotfiles.toml");
        std::fs::rename(&world.paths.config_file, &real).unwrap();
        symlink(&real, &world.paths.config_file).unwrap();
        world.set("cpus", &["1"]).unwrap();
        assert_eq!(std::fs::read_to_string(&real).unwrap(), "cpus = 1\n");
        assert!(world.paths.config_file.is_symlink());
    }
}
