//! The keys of `config.toml`, for whoever reads and changes them by name.

use crate::mounts;
use crate::paths::Paths;
use crate::size;
use serde_json::{Value, json};

/// How a key's value is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A whole number.
    Number,
    /// `true` or `false`.
    Truth,
    /// Text, whatever it means.
    Text,
    /// A file.
    File,
    /// Any number of texts.
    Texts,
    /// Any number of folders to share.
    Mounts,
}

/// A key.
#[derive(Clone, Copy, Debug)]
pub struct Key {
    /// Its name; that of a key in a table has the table's before a dot.
    pub name: &'static str,
    /// How its value is written.
    pub kind: Kind,
    default: fn(&Paths) -> Value,
}

const fn key(name: &'static str, kind: Kind, default: fn(&Paths) -> Value) -> Key {
    Key { name, kind, default }
}

/// All of them.
pub const KEYS: &[Key] = &[
    key("cpus", Kind::Number, |_| json!(size::default_cpus())),
    key("memory", Kind::Text, |_| json!(size::default_memory())),
    key("disk", Kind::Text, |_| json!(size::default_disk())),
    key("kernel", Kind::File, |paths| json!(paths.kernel())),
    key("image", Kind::File, |paths| json!(paths.image())),
    key("context", Kind::Truth, |_| json!(true)),
    key("template", Kind::Truth, |_| json!(true)),
    key("default-socket", Kind::Truth, |_| json!(false)),
    key("network", Kind::Text, |_| json!("passt")),
    key("host-access", Kind::Truth, |_| json!(true)),
    // Those of the environment.
    key("http-proxy", Kind::Text, |_| Value::Null),
    key("https-proxy", Kind::Text, |_| Value::Null),
    key("no-proxy", Kind::Text, |_| Value::Null),
    key("registry-mirrors", Kind::Texts, |_| json!([])),
    key("insecure-registries", Kind::Texts, |_| json!([])),
    key("mounts", Kind::Mounts, |_| json!(Vec::from_iter(mounts::home()))),
    key("auto-suspend", Kind::Text, |_| json!("off")),
    key("strict", Kind::Truth, |_| json!(false)),
    key("ports.default-address", Kind::Text, |_| Value::Null),
];

impl Key {
    /// The key `name`.
    pub fn find(name: &str) -> Option<&'static Self> {
        KEYS.iter().find(|key| key.name == name)
    }

    /// The names of the tables above it, and its own there.
    pub fn path(&self) -> (Option<&'static str>, &'static str) {
        match self.name.split_once('.') {
            Some((table, name)) => (Some(table), name),
            None => (None, self.name),
        }
    }

    /// What holds when it is not set; null when that is nothing, or told by something else.
    pub fn default(&self, paths: &Paths) -> Value {
        (self.default)(paths)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, PortSettings};
    use serde::de::DeserializeOwned;

    /// The fields of `T`, as serde names them when it meets another.
    fn fields<T: DeserializeOwned + std::fmt::Debug>() -> Vec<String> {
        let error = toml::from_str::<T>("not-a-key = 1").unwrap_err().to_string();
        let list = error.rsplit_once("expected ").unwrap().1;
        list.split('`').skip(1).step_by(2).map(String::from).collect()
    }

    #[test]
    fn every_key_of_the_file_is_among_them() {
        let mut wanted = fields::<Config>();
        wanted.retain(|name| name != "ports");
        wanted.extend(
            fields::<PortSettings>()
                .iter()
                .map(|name| format!("ports.{name}")),
        );
        let mut names: Vec<_> = KEYS.iter().map(|key| key.name).collect();
        wanted.sort();
        names.sort();
        assert_eq!(names, wanted);
    }
}
