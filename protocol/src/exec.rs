//! One command in the guest, over one connection to [`crate::ports::GUEST_EXEC`].
//!
//! The client sends [`ExecRequest::Start`], then [`crate::frame::Channel::Stdin`] frames (an empty one is the end of
//! input), [`ExecRequest::Resize`] and [`ExecRequest::Signal`]. The agent answers [`ExecReply::Started`], then
//! stdout and stderr frames, and last [`ExecReply::Exited`] or [`ExecReply::Failed`]. A client that goes away
//! hangs up on the command (SIGHUP to its process group).

use serde::{Deserialize, Serialize};

/// From the client, on [`crate::frame::Channel::Message`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum ExecRequest {
    /// The first message.
    Start(Command),
    /// The terminal changed its size.
    Resize(WindowSize),
    /// Send this signal number to the command's process group.
    Signal {
        /// A Linux signal number, 1 to 64.
        number: i32,
    },
}

/// What to run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Command {
    /// Program and arguments; the program is looked up in the guest's PATH. Not empty.
    pub argv: Vec<String>,
    /// Added to the guest's default environment.
    pub env: Vec<(String, String)>,
    /// Working folder in the guest; `None` is `/`.
    pub working_dir: Option<String>,
    /// With a terminal of this size; `None` is pipes.
    pub terminal: Option<WindowSize>,
}

/// A terminal's size in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WindowSize {
    /// Height.
    pub rows: u16,
    /// Width.
    pub columns: u16,
}

/// From the agent, on [`crate::frame::Channel::Message`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum ExecReply {
    /// The command runs.
    Started {
        /// Its process id in the guest.
        pid: u32,
    },
    /// The command ended; all of its output was sent.
    Exited(ExitStatus),
    /// The command could not be started.
    Failed {
        /// What kind of failure, for the exit code.
        kind: FailureKind,
        /// What failed and why.
        message: String,
    },
}

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ExitStatus {
    /// It returned this code.
    Code(i32),
    /// This signal ended it.
    Signal(i32),
}

impl ExitStatus {
    /// As a shell would report it: a signal is 128 plus its number.
    pub fn code(self) -> i32 {
        match self {
            Self::Code(code) => code,
            Self::Signal(number) => 128 + number,
        }
    }
}

/// Why a command could not be started.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FailureKind {
    /// No such program.
    NotFound,
    /// The program is there and cannot be executed.
    NotExecutable,
    /// Anything else.
    Other,
}

impl FailureKind {
    /// Exit code as Docker's own: 127, 126, 125.
    pub fn exit_code(self) -> i32 {
        match self {
            Self::NotFound => 127,
            Self::NotExecutable => 126,
            Self::Other => 125,
        }
    }
}
