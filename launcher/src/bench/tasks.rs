//! Has a guest of Lighter's measure something: its agent's program is run as a command.

use crate::cli::exec::collect;
use crate::error::{Context, Error, Result};
use crate::logs::printable;
use crate::vm::Vm;
use lighter_measure::task::{Task, VERB};
use serde::de::DeserializeOwned;

/// The agent's program in the guest.
pub const AGENT: &str = "/sbin/init";

/// Has the guest of `vm` do `task`, and returns its samples, which may be `limit` bytes.
///
/// # Errors
/// When it fails, or its samples are not what they should be.
pub fn in_guest<Samples: DeserializeOwned>(vm: &Vm, task: &Task, limit: usize) -> Result<Samples> {
    let argv = vec![AGENT.into(), VERB.into(), encoded(task)?];
    let output = collect(vm, argv, limit)?;
    if output.code == 0 {
        return samples(&output.stdout);
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let failed = format!("the measurement in the guest failed (status {})", output.code);
    let error = Error::failure(failed).lines(said.lines().map(printable).collect());
    // What an agent says that only knows how to be PID 1.
    Err(match output.code {
        2 => {
            error.hint("the guest image is older than this program: build and install both from one checkout")
        }
        _ => error,
    })
}

/// As the agent takes it.
///
/// # Errors
/// When it is no text.
pub fn encoded(task: &Task) -> Result<String> {
    serde_json::to_string(task).context(|| "cannot encode what is to be measured".into())
}

/// What a guest says: anything.
///
/// # Errors
/// When it is no samples.
pub fn samples<Samples: DeserializeOwned>(json: &[u8]) -> Result<Samples> {
    serde_json::from_slice(json).context(|| "the guest's samples are not understood".into())
}
