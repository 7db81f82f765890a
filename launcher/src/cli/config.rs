//! `lighter config`.

use super::{Json, print, print_json};
use crate::config::Config;
use crate::config::edit::{set, unset};
use crate::config::keys::{KEYS, Key};
use crate::default_socket::{self, State};
use crate::error::{Code, Context, Error, Result};
use crate::paths::Paths;
use crate::table;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Args, Subcommand};
use serde::Serialize;
use serde_json::Value;

/// What to do with the configuration.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// List every key with its value
    #[command(alias = "list")]
    Ls(Json),
    /// Print the value of a key; one line for each of a list
    Get(Get),
    /// Set a key
    Set(Set),
    /// Go back to the default of a key
    Unset(Unset),
}

/// Arguments.
#[derive(Debug, Args)]
pub struct Get {
    #[command(flatten)]
    which: Which,
    #[command(flatten)]
    output: Json,
}

/// Arguments.
#[derive(Debug, Args)]
pub struct Set {
    #[command(flatten)]
    which: Which,
    /// Its value; those of a list, one after another
    #[arg(value_name = "VALUE", allow_hyphen_values = true)]
    values: Vec<String>,
}

/// Arguments.
#[derive(Debug, Args)]
pub struct Unset {
    #[command(flatten)]
    which: Which,
}

/// Which key.
#[derive(Debug, Args)]
struct Which {
    /// The key
    #[arg(value_name = "KEY", hide_possible_values = true, value_parser = parser())]
    key: String,
}

fn parser() -> impl TypedValueParser<Value = String> {
    PossibleValuesParser::new(KEYS.iter().map(|key| key.name))
}

impl Which {
    fn find(&self) -> Result<&'static Key> {
        Key::find(&self.key).ok_or_else(|| Error::new(Code::Usage, format!("there is no key {}", self.key)))
    }
}

/// A key as `ls` shows it.
#[derive(Debug, Serialize)]
struct Row {
    key: &'static str,
    /// Null when nothing holds, or something else tells.
    value: Value,
    /// Whether the file says so.
    set: bool,
}

impl Row {
    fn of(key: &Key, file: &toml::Table, paths: &Paths) -> Result<Self> {
        let (table, name) = key.path();
        let found = match table {
            None => file.get(name),
            Some(table) => file.get(table).and_then(|table| table.get(name)),
        };
        let value = found.map(serde_json::to_value).transpose();
        let value = value.context(|| format!("cannot show the value of {}", key.name))?;
        Ok(Self {
            key: key.name,
            set: value.is_some(),
            value: value.unwrap_or_else(|| key.default(paths)),
        })
    }

    fn texts(&self) -> Vec<String> {
        match &self.value {
            Value::Null => vec![],
            Value::Array(values) => values.iter().map(text).collect(),
            value => vec![text(value)],
        }
    }
}

fn text(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        value => value.to_string(),
    }
}

impl Verb {
    /// Does it.
    ///
    /// # Errors
    /// When the file cannot be used, or a value is none for its key.
    pub fn run(self, paths: &Paths) -> Result<()> {
        match self {
            Self::Ls(output) => ls(paths, &output),
            Self::Get(Get { which, output }) => {
                let row = Row::of(which.find()?, &file(paths)?, paths)?;
                match output.json {
                    true => print_json(&row),
                    false => print(
                        &row.texts()
                            .iter()
                            .map(|text| format!("{text}\n"))
                            .collect::<String>(),
                    ),
                }
            }
            Self::Set(Set { which, values }) => {
                set(paths, which.find()?, &values)?;
                what_remains(paths, &which)
            }
            Self::Unset(Unset { which }) => {
                unset(paths, which.find()?)?;
                what_remains(paths, &which)
            }
        }
    }
}

/// What the file says, which is understood.
fn file(paths: &Paths) -> Result<toml::Table> {
    Config::load(&paths.config_file)?;
    match paths.config_file.exists() {
        true => Ok(crate::config::read(&paths.config_file)?),
        false => Ok(toml::Table::new()),
    }
}

fn ls(paths: &Paths, output: &Json) -> Result<()> {
    let file = file(paths)?;
    let rows: Vec<Row> = KEYS
        .iter()
        .map(|key| Row::of(key, &file, paths))
        .collect::<Result<_>>()?;
    if output.json {
        return print_json(&rows);
    }
    let mut table = table::plain();
    table.set_header(["KEY", "FROM", "VALUE"]);
    for row in &rows {
        let value = row.texts().join(" ");
        table.add_row([
            row.key,
            if row.set { "file" } else { "default" },
            if value.is_empty() { "-" } else { &value },
        ]);
    }
    print(&table::text(&table))
}

/// Tells of what a key asks for that is root's to do.
fn what_remains(paths: &Paths, which: &Which) -> Result<()> {
    if which.key != "default-socket" {
        return Ok(());
    }
    match default_socket::state(paths, &Config::load(&paths.config_file)?) {
        State::Unused | State::Linked(_) => Ok(()),
        State::Wrong(todo) => print(&format!(
            "{}, and Lighter is not root; run:\n  {}\n",
            todo.why, todo.command
        )),
    }
}
