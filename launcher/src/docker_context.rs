//! The docker CLI's context of a VM: made and selected when the VM starts, so that `docker ps` needs no words more.
//!
//! The files are the docker CLI's own: `contexts/meta/<SHA-256 of the name>/meta.json`, and `config.json` with
//! `currentContext` (absent for its default) and `proxies` by engine. What is in them besides is left as it is.

use crate::lock::{Lock, LockError};
use crate::name::Name;
use crate::paths::Paths;
use crate::vm::Vm;
use lighter_protocol::causes::chain;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// How the contexts of ours begin to describe themselves.
const DESCRIPTION: &str = "Lighter VM";

/// The key of `config.json` with the selected context's name.
const CURRENT: &str = "currentContext";

/// The key of `config.json` with proxies for builds and containers, by engine.
const PROXIES: &str = "proxies";

/// Why the docker CLI's files were left alone.
#[derive(Debug, thiserror::Error)]
pub enum ContextError {
    /// Neither `DOCKER_CONFIG` nor `HOME` says where they are.
    #[error("neither DOCKER_CONFIG nor HOME is set")]
    NoHome,
    /// One cannot be read.
    #[error("cannot read {}", .0.display())]
    Read(PathBuf, #[source] io::Error),
    /// One cannot be written.
    #[error("cannot write {}", .0.display())]
    Write(PathBuf, #[source] io::Error),
    /// One is not what the docker CLI writes.
    #[error("{} is not understood", .0.display())]
    Malformed(PathBuf, #[source] serde_json::Error),
    /// There is a context of that name, and it is not ours.
    #[error("there is a docker context named {0} already, and it is none of Lighter's")]
    Taken(String),
    /// Another process may be writing.
    #[error("cannot wait for other processes")]
    Lock(#[from] LockError),
}

/// Changes this user's docker CLI's files, all at once; a failure is to be told, and no more.
///
/// # Errors
/// The sentence to tell.
pub fn change(
    paths: &Paths,
    change: impl FnOnce(&Contexts, &Path) -> Result<(), ContextError>,
) -> Result<(), String> {
    Contexts::from_environment()
        .and_then(|contexts| change(&contexts, &paths.contexts_lock()))
        .map_err(|error| format!("docker's context is left as it was: {}", chain(&error)))
}

/// The docker CLI's files.
#[derive(Debug)]
pub struct Contexts {
    folder: PathBuf,
}

/// The context of VM `name`.
pub fn context_name(name: &Name) -> String {
    match name.as_str() {
        "default" => "lighter".into(),
        name => format!("lighter-{name}"),
    }
}

impl Contexts {
    /// Where this user's docker CLI looks.
    ///
    /// # Errors
    /// When the environment does not say where.
    fn from_environment() -> Result<Self, ContextError> {
        let variable = |name| {
            std::env::var_os(name)
                .filter(|value| !value.is_empty())
                .map(PathBuf::from)
        };
        let folder = variable("DOCKER_CONFIG").or_else(|| Some(variable("HOME")?.join(".docker")));
        Ok(Self {
            folder: folder.ok_or(ContextError::NoHome)?,
        })
    }

    /// Makes the context of `vm` and selects it, and notes which one was selected before. `proxies` are given to builds and
    /// containers. `lock` is a file on which all that write here wait for each other.
    ///
    /// # Errors
    /// When the files cannot be used; what was there is there still.
    pub fn select(
        &self,
        vm: &Vm,
        proxies: &BTreeMap<String, String>,
        lock: &Path,
    ) -> Result<(), ContextError> {
        let _lock = Lock::acquire(lock)?;
        let name = context_name(&vm.name);
        let config = self.config()?;
        self.write_context(vm, &name)?;
        let current = config.get(CURRENT).and_then(Value::as_str).unwrap_or_default();
        if current != name {
            let previous = vm.paths.previous_context();
            std::fs::write(&previous, current).map_err(|error| ContextError::Write(previous, error))?;
        }
        let mut wanted = config.clone();
        wanted.insert(CURRENT.into(), name.into());
        set_proxies(&mut wanted, &vm.paths.docker_host(), proxies);
        self.change_config(&config, wanted)
    }

    /// Makes the context of `vm`, and leaves the one selected that is.
    ///
    /// # Errors
    /// When the files cannot be used; what was there is there still.
    pub fn add(&self, vm: &Vm, proxies: &BTreeMap<String, String>, lock: &Path) -> Result<(), ContextError> {
        let _lock = Lock::acquire(lock)?;
        let config = self.config()?;
        self.write_context(vm, &context_name(&vm.name))?;
        self.change_proxies(&config, vm, proxies)
    }

    fn change_proxies(
        &self,
        config: &Map<String, Value>,
        vm: &Vm,
        proxies: &BTreeMap<String, String>,
    ) -> Result<(), ContextError> {
        let mut wanted = config.clone();
        set_proxies(&mut wanted, &vm.paths.docker_host(), proxies);
        self.change_config(config, wanted)
    }

    /// Selects the context that was selected before the one of `vm`, if that one still is, and takes the proxies back.
    ///
    /// # Errors
    /// When the files cannot be used.
    pub fn deselect(&self, vm: &Vm, lock: &Path) -> Result<(), ContextError> {
        let note = vm.paths.previous_context();
        let Ok(previous) = std::fs::read_to_string(&note) else {
            return Ok(());
        };
        let _lock = Lock::acquire(lock)?;
        let config = self.config()?;
        let mut wanted = config.clone();
        if config.get(CURRENT).and_then(Value::as_str) == Some(&context_name(&vm.name)) {
            // It may have been removed since.
            if !previous.is_empty() && self.meta(&previous).exists() {
                wanted.insert(CURRENT.into(), previous.into());
            } else {
                wanted.shift_remove(CURRENT);
            }
        }
        set_proxies(&mut wanted, &vm.paths.docker_host(), &BTreeMap::new());
        self.change_config(&config, wanted)?;
        std::fs::remove_file(&note).map_err(|error| ContextError::Write(note, error))
    }

    /// Removes the context of `vm`, if it is ours.
    ///
    /// # Errors
    /// When the files cannot be used.
    pub fn remove(&self, vm: &Vm, lock: &Path) -> Result<(), ContextError> {
        self.deselect(vm, lock)?;
        let meta = self.meta(&context_name(&vm.name));
        match self.endpoint(&meta)? {
            Some(endpoint) if endpoint == vm.paths.docker_host() => {
                let _lock = Lock::acquire(lock)?;
                self.change_proxies(&self.config()?, vm, &BTreeMap::new())?;
                let folder = meta.parent().unwrap_or(&meta);
                std::fs::remove_dir_all(folder).map_err(|error| ContextError::Write(folder.into(), error))
            }
            _ => Ok(()),
        }
    }

    fn meta(&self, name: &str) -> PathBuf {
        let digest: String = Sha256::digest(name)
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        self.folder.join("contexts/meta").join(digest).join("meta.json")
    }

    /// The engine of our context at `meta`; `None` when there is none, or it is another's.
    fn endpoint(&self, meta: &Path) -> Result<Option<String>, ContextError> {
        let context = read_json(meta)?;
        let text = |pointer| {
            let value = context.as_ref().and_then(|context| context.pointer(pointer));
            value.and_then(Value::as_str)
        };
        let is_ours = text("/Metadata/Description").is_some_and(|text| text.starts_with(DESCRIPTION));
        Ok(text("/Endpoints/docker/Host").filter(|_| is_ours).map(Into::into))
    }

    fn write_context(&self, vm: &Vm, name: &str) -> Result<(), ContextError> {
        let meta = self.meta(name);
        match self.endpoint(&meta)? {
            Some(endpoint) if endpoint == vm.paths.docker_host() => return Ok(()),
            // Of a VM whose home was another.
            Some(_) => {}
            None if meta.exists() => return Err(ContextError::Taken(name.into())),
            None => {}
        }
        let context = json!({
            "Name": name,
            "Metadata": { "Description": format!("{DESCRIPTION} {}", vm.name) },
            "Endpoints": { "docker": { "Host": vm.paths.docker_host(), "SkipTLSVerify": false } },
        });
        let folder = meta.parent().unwrap_or(&meta);
        std::fs::create_dir_all(folder).map_err(|error| ContextError::Write(folder.into(), error))?;
        write_json(&meta, &context)
    }

    fn config(&self) -> Result<Map<String, Value>, ContextError> {
        let path = self.folder.join("config.json");
        match read_json(&path)? {
            None => Ok(Map::new()),
            Some(Value::Object(config)) => Ok(config),
            Some(_) => {
                let error = serde::de::Error::custom("it is no object");
                Err(ContextError::Malformed(path, error))
            }
        }
    }

    /// Leaves a file that is as it is `wanted` alone.
    fn change_config(
        &self,
        config: &Map<String, Value>,
        wanted: Map<String, Value>,
    ) -> Result<(), ContextError> {
        if wanted == *config {
            return Ok(());
        }
        let path = self.folder.join("config.json");
        // Some people have a link there, to a file that they keep elsewhere.
        let path = std::fs::canonicalize(&path).unwrap_or(path);
        std::fs::create_dir_all(&self.folder)
            .map_err(|error| ContextError::Write(self.folder.clone(), error))?;
        write_json(&path, &Value::Object(wanted))
    }
}

/// Sets the proxies for builds and containers of the engine `host`, or removes them when there are none.
fn set_proxies(config: &mut Map<String, Value>, host: &str, proxies: &BTreeMap<String, String>) {
    let keys = [
        ("HTTP_PROXY", "httpProxy"),
        ("HTTPS_PROXY", "httpsProxy"),
        ("NO_PROXY", "noProxy"),
    ];
    let ours: Map<String, Value> = keys
        .iter()
        .filter_map(|(variable, key)| Some(((*key).into(), proxies.get(*variable)?.as_str().into())))
        .collect();
    if !ours.is_empty() {
        let all = config.entry(PROXIES).or_insert_with(|| json!({}));
        if let Some(all) = all.as_object_mut() {
            all.insert(host.into(), ours.into());
        }
    } else if let Some(all) = config.get_mut(PROXIES).and_then(Value::as_object_mut) {
        all.shift_remove(host);
        if all.is_empty() {
            config.shift_remove(PROXIES);
        }
    }
}

fn read_json(path: &Path) -> Result<Option<Value>, ContextError> {
    let bytes = match std::fs::read(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        result => result.map_err(|error| ContextError::Read(path.into(), error))?,
    };
    // The docker CLI takes an empty file for none.
    if bytes.is_empty() {
        return Ok(None);
    }
    let value = serde_json::from_slice(&bytes);
    value
        .map(Some)
        .map_err(|error| ContextError::Malformed(path.into(), error))
}

/// Writes as the docker CLI does, in the place of what is there, with its permissions.
fn write_json(path: &Path, value: &Value) -> Result<(), ContextError> {
    let write = || -> io::Result<()> {
        let mut text = vec![];
        let format = serde_json::ser::PrettyFormatter::with_indent(b"\t");
        let mut serializer = serde_json::Serializer::with_formatter(&mut text, format);
        serde::Serialize::serialize(value, &mut serializer)?;
        // Readable by the user alone, which is right for a file that may hold credentials.
        let mut file = tempfile::NamedTempFile::new_in(path.parent().unwrap_or(Path::new("/")))?;
        if let Ok(metadata) = std::fs::metadata(path) {
            file.as_file().set_permissions(metadata.permissions())?;
        }
        file.write_all(&text)?;
        file.as_file().sync_all()?;
        file.persist(path)?;
        Ok(())
    };
    write().map_err(|error| ContextError::Write(path.into(), error))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::DiskSource;
    use crate::vm::testing::settings;

    struct World {
        root: tempfile::TempDir,
        contexts: Contexts,
    }

    impl World {
        fn new() -> Self {
            let root = tempfile::tempdir().unwrap();
            let contexts = Contexts {
                folder: root.path().join("docker"),
            };
            Self { root, contexts }
        }

        fn vm(&self, name: &str) -> Vm {
            let paths = Paths::at(self.root.path());
            Vm::create(&paths, &name.parse().unwrap(), settings(1 << 20), DiskSource::New).unwrap()
        }

        fn select(&self, vm: &Vm) {
            self.contexts.select(vm, &BTreeMap::new(), &self.lock()).unwrap();
        }

        fn lock(&self) -> PathBuf {
            self.root.path().join("lock")
        }

        fn config(&self) -> PathBuf {
            self.contexts.folder.join("config.json")
        }

        fn current(&self) -> Option<String> {
            let config = self.contexts.config().unwrap();
            Some(config.get(CURRENT)?.as_str().unwrap().into())
        }
    }

    #[test]
    fn a_start_selects_and_a_stop_goes_back() {
        let world = World::new();
        let (first, second) = (world.vm("default"), world.vm("other"));
        world.select(&first);
        assert_eq!(world.current().unwrap(), "lighter");
        world.select(&second);
        // A second start of the same VM forgets nothing.
        world.select(&second);
        assert_eq!(world.current().unwrap(), "lighter-other");
        world.contexts.deselect(&second, &world.lock()).unwrap();
        assert_eq!(world.current().unwrap(), "lighter");
        world.contexts.deselect(&first, &world.lock()).unwrap();
        assert_eq!(world.current(), None);
        world.contexts.remove(&first, &world.lock()).unwrap();
        world.contexts.remove(&second, &world.lock()).unwrap();
        let metas = std::fs::read_dir(world.contexts.folder.join("contexts/meta")).unwrap();
        assert_eq!(metas.count(), 0);
    }

    #[test]
    fn a_context_that_is_only_added_is_not_selected_and_leaves_nothing() {
        let world = World::new();
        let (selected, added) = (world.vm("default"), world.vm("other"));
        world.select(&selected);
        let before = world.contexts.config().unwrap();
        let proxies = BTreeMap::from([("HTTP_PROXY".to_owned(), "http://q".to_owned())]);
        world.contexts.add(&added, &proxies, &world.lock()).unwrap();
        assert_eq!(world.current().unwrap(), "lighter");
        assert!(world.contexts.meta("lighter-other").exists());
        assert_ne!(world.contexts.config().unwrap(), before);
        world.contexts.remove(&added, &world.lock()).unwrap();
        assert!(!world.contexts.meta("lighter-other").exists());
        assert_eq!(world.contexts.config().unwrap(), before);
    }

    #[test]
    fn what_the_user_selected_since_stays() {
        let world = World::new();
        let vm = world.vm("default");
        world.select(&vm);
        std::fs::write(world.config(), r#"{"currentContext": "mine"}"#).unwrap();
        world.contexts.deselect(&vm, &world.lock()).unwrap();
        assert_eq!(world.current().unwrap(), "mine");
    }

    #[test]
    fn the_rest_of_the_users_file_is_left_as_it_is() {
        use std::os::unix::fs::PermissionsExt;
        let world = World::new();
        let vm = world.vm("default");
        let text =
            r#"{"zeta": 1, "auths": {"r": {"auth": "x"}}, "proxies": {"default": {"httpProxy": "p"}}}"#;
        std::fs::create_dir_all(&world.contexts.folder).unwrap();
        let real = world.root.path().join("real.json");
        std::fs::write(&real, text).unwrap();
        std::fs::set_permissions(&real, std::fs::Permissions::from_mode(0o640)).unwrap();
        std::os::unix::fs::symlink(&real, world.config()).unwrap();
        let proxies = BTreeMap::from([("HTTP_PROXY".to_owned(), "http://q".to_owned())]);
        world.contexts.select(&vm, &proxies, &world.lock()).unwrap();
        let written: Value = serde_json::from_slice(&std::fs::read(&real).unwrap()).unwrap();
        assert_eq!(
            written["proxies"][vm.paths.docker_host()]["httpProxy"],
            "http://q"
        );
        world.contexts.deselect(&vm, &world.lock()).unwrap();
        let written = std::fs::read_to_string(&real).unwrap();
        assert_eq!(
            written.split_whitespace().collect::<String>(),
            text.split_whitespace().collect::<String>()
        );
        assert_eq!(
            std::fs::metadata(&real).unwrap().permissions().mode() & 0o777,
            0o640
        );
    }

    #[test]
    fn what_is_not_ours_is_not_touched() {
        let world = World::new();
        let vm = world.vm("default");
        std::fs::create_dir_all(&world.contexts.folder).unwrap();
        std::fs::write(world.config(), "{ no json").unwrap();
        let select = || world.contexts.select(&vm, &BTreeMap::new(), &world.lock());
        assert!(matches!(select(), Err(ContextError::Malformed(..))));
        assert_eq!(std::fs::read_to_string(world.config()).unwrap(), "{ no json");
        std::fs::remove_file(world.config()).unwrap();
        let meta = world.contexts.meta("lighter");
        std::fs::create_dir_all(meta.parent().unwrap()).unwrap();
        std::fs::write(
            &meta,
            r#"{"Name": "lighter", "Endpoints": {"docker": {"Host": "tcp://x"}}}"#,
        )
        .unwrap();
        assert!(matches!(select(), Err(ContextError::Taken(_))));
        world.contexts.remove(&vm, &world.lock()).unwrap();
        assert!(meta.exists());
    }

    #[test]
    fn names_are_what_people_type() {
        assert_eq!(context_name(&"default".parse().unwrap()), "lighter");
        assert_eq!(context_name(&"ci".parse().unwrap()), "lighter-ci");
    }
}
