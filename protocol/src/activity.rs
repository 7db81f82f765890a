//! What keeps a VM busy, for `lighter status` and for the decision to suspend one that is idle.

use serde::{Deserialize, Serialize};
use std::fmt;

/// Whether a VM is in use.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Activity {
    /// Why it is; empty when it is idle.
    pub busy: Vec<Busy>,
    /// For how long it has been idle, seconds.
    pub idle_s: Option<u64>,
    /// After how long it suspends by itself, seconds.
    pub auto_suspend_s: Option<u64>,
}

/// A reason for which a VM is in use.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "by", rename_all = "kebab-case")]
pub enum Busy {
    /// The engine is not ready.
    Starting,
    /// Connections to the engine's socket.
    Clients {
        /// How many.
        count: usize,
    },
    /// Clients of published ports.
    Ports {
        /// How many.
        count: usize,
    },
    /// Commands by `lighter exec` and `shell`, and starts that wait for the engine.
    Sessions {
        /// How many.
        count: usize,
    },
    /// Logs that are followed.
    Logs {
        /// How many.
        count: usize,
    },
    /// It is being saved.
    Saving,
    /// Containers run, and do not only wait.
    Containers {
        /// The processor time that they took lately, thousandths of one processor.
        cpu_per_mille: u64,
    },
    /// The agent has not told, or not lately, what containers do.
    Untold,
}

impl fmt::Display for Busy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut counted = |count: &usize, one: &str, many: &str| match count {
            1 => write!(f, "1 {one}"),
            _ => write!(f, "{count} {many}"),
        };
        match self {
            Self::Starting => f.write_str("the engine is not ready"),
            Self::Clients { count } => counted(count, "client of the engine", "clients of the engine"),
            Self::Ports { count } => {
                counted(count, "client of a published port", "clients of published ports")
            }
            Self::Sessions { count } => counted(count, "command of lighter's", "commands of lighter's"),
            Self::Logs { count } => counted(count, "log that is followed", "logs that are followed"),
            Self::Saving => f.write_str("it is being saved"),
            Self::Containers { cpu_per_mille } => {
                let (percent, tenths) = (cpu_per_mille / 10, cpu_per_mille % 10);
                write!(f, "containers take {percent}.{tenths} % of a processor")
            }
            Self::Untold => f.write_str("it is not known yet what containers do"),
        }
    }
}

/// For what a client of the supervisor uses the VM ([`crate::supervisor::Request::Use`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Use {
    /// Something is to run in it: one that is suspended goes on.
    Session,
    /// Its logs are followed: that does not wake it.
    Logs,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_are_words_for_people_and_tags_for_programs() {
        let one = Busy::Clients { count: 1 };
        assert_eq!(one.to_string(), "1 client of the engine");
        assert_eq!(
            serde_json::to_string(&one).unwrap(),
            r#"{"by":"clients","count":1}"#
        );
        assert_eq!(
            Busy::Ports { count: 3 }.to_string(),
            "3 clients of published ports"
        );
        let busy = Busy::Containers { cpu_per_mille: 1234 };
        assert_eq!(busy.to_string(), "containers take 123.4 % of a processor");
        assert_eq!(
            Busy::Containers { cpu_per_mille: 15 }.to_string(),
            "containers take 1.5 % of a processor"
        );
    }
}
