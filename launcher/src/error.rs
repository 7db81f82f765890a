//! What the user is told when a command fails, and the exit code that goes with it.

use lighter_protocol::causes::chain;
use serde::Serialize;
use std::fmt::{self, Display};
use std::io::{self, Write};

/// Exit codes of `lighter`. `exec` and `run` return the command's own otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    /// Something failed.
    Failure,
    /// The command line or the configuration is wrong.
    Usage,
    /// The VM is not running.
    NotRunning,
    /// There is no such VM.
    NoSuchVm,
    /// It took too long.
    Timeout,
    /// `exec` or `run` could not start the command: 125, 126 or 127, as Docker.
    Command(u8),
}

impl Code {
    /// The process's exit status.
    pub fn number(self) -> u8 {
        match self {
            Self::Failure => 1,
            Self::Usage => 2,
            Self::NotRunning => 3,
            Self::NoSuchVm => 4,
            Self::Timeout => 124,
            Self::Command(number) => number,
        }
    }
}

/// A failed command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    /// For the exit status.
    pub code: Code,
    /// What failed, on what, and why: the whole chain of causes.
    pub message: String,
    /// Lines of a log that belong to it, oldest first.
    pub lines: Vec<String>,
    /// What to do.
    pub hint: Option<String>,
}

/// What commands return.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An error of `code`.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            lines: vec![],
            hint: None,
        }
    }

    /// An error of [`Code::Failure`].
    pub fn failure(message: impl Into<String>) -> Self {
        Self::new(Code::Failure, message)
    }

    /// `error` with its whole chain of causes.
    pub fn of(code: Code, error: &dyn std::error::Error) -> Self {
        Self::new(code, chain(error))
    }

    /// Adds what to do.
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Adds lines of a log.
    pub fn lines(mut self, lines: Vec<String>) -> Self {
        self.lines = lines;
        self
    }

    /// As one JSON object, for `--json`.
    pub fn json(&self) -> String {
        #[derive(Serialize)]
        struct Json<'a> {
            code: u8,
            error: &'a str,
            #[serde(skip_serializing_if = "<[String]>::is_empty")]
            lines: &'a [String],
            hint: Option<&'a str>,
        }
        let json = Json {
            code: self.code.number(),
            error: &self.message,
            lines: &self.lines,
            hint: self.hint.as_deref(),
        };
        serde_json::to_string(&json).unwrap_or_else(|_| self.message.clone())
    }
}

impl Display for Error {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "lighter: {}", self.message)?;
        for line in &self.lines {
            write!(out, "\n  | {line}")?;
        }
        if let Some(hint) = &self.hint {
            write!(out, "\n  hint: {hint}")?;
        }
        Ok(())
    }
}

/// Writes a line to standard error. One that cannot be written (nobody reads, the disk of the log is full) is lost, and
/// nothing else comes of it.
pub fn say(line: impl Display) {
    let _ = writeln!(io::stderr(), "{line}");
}

/// Says what was being done when something failed.
pub trait Context<T> {
    /// Turns the error into an [`Error`] of [`Code::Failure`] that begins with `what`.
    fn context(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: std::error::Error> Context<T> for std::result::Result<T, E> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|error| Error::failure(format!("{}: {}", what(), chain(&error))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_has_the_cause_the_lines_and_the_hint() {
        let io: std::io::Result<()> = Err(std::io::Error::other("disk on fire"));
        let error = io.context(|| "cannot write /x".into()).unwrap_err();
        let error = error.lines(vec!["last words".into()]).hint("use water");
        assert_eq!(
            error.to_string(),
            "lighter: cannot write /x: disk on fire\n  | last words\n  hint: use water"
        );
        let json: serde_json::Value = serde_json::from_str(&error.json()).unwrap();
        assert_eq!(json["code"], 1);
        assert_eq!(json["hint"], "use water");
    }
}
