//! What the agent's program measures when it is told to, and how it is told.

use crate::{files, net, requests};
use serde::{Deserialize, Serialize};

/// The argument that makes the agent's program measure; a [`Task`] as JSON follows. It prints the samples as JSON.
pub const VERB: &str = "measure";

/// The word on the kernel's command line that has the agent take tasks on the console once the engine is ready, a line each: so
/// a guest can be measured in a monitor with nothing but a serial port.
pub const WORD: &str = "lighter.measure";

/// The line of the console that says that tasks are taken.
pub const READY: &str = "lighter-agent: ready to measure";

/// How a line of the console begins that has the samples of a task.
pub const MEASURED: &str = "lighter-agent: measured ";

/// How a line of the console begins that says why there are none.
pub const NOT_MEASURED: &str = "lighter-agent: not measured: ";

/// What the agent's program prints when it serves the network's clients.
pub const SERVING: &str = "serving\n";

/// What to measure.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Task {
    /// The engine's API; gives [`requests::Samples`].
    Api(requests::Plan),
    /// A folder; gives [`files::Samples`].
    Files(files::Plan),
    /// The network; gives [`net::Samples`].
    Net(net::Plan),
    /// Serve the network's clients on this port, on all addresses, for ever.
    Serve(u16),
}
