//! The messages between Lighter's processes, each defined once for both ends.
//!
//! ```text
//!  lighter (CLI) ──supervisor──▶ lighter supervise ──monitor──▶ lighter-vmm
//!                                       └───────────agent / exec────────────▶ lighter-agent (in the guest)
//! ```
//!
//! - [`ports`]: the vsock ports, and who listens on them.
//! - [`frame`]: length-delimited frames, the encoding of everything on the agent's ports but the Docker stream.
//! - [`activity`]: what keeps a VM busy.
//! - [`agent`]: supervisor and agent: greeting, logs, timeline, engine state, clock, shutdown.
//! - [`announce`]: the agent's milestones on the console, for measurements.
//! - [`causes`]: an error as one line of text.
//! - [`escaped`]: bytes as text.
//! - [`exec`]: one command run in the guest.
//! - [`file_events`]: changes in shared folders that the guest is told of.
//! - [`monitor`]: what the supervisor tells the monitor to build, its control requests and its events.
//! - [`names`]: questions about names, from the guest to the host's resolver.
//! - [`network`]: the guest's network, on its kernel's command line.
//! - [`publish`]: published ports.
//! - [`shares`]: the host's folders in the guest, on its kernel's command line.
//! - [`supervisor`]: what the CLI asks a running supervisor.
//!
//! No I/O happens here: callers move the bytes.

pub mod activity;
pub mod agent;
pub mod announce;
pub mod causes;
pub mod escaped;
pub mod exec;
pub mod file_events;
pub mod frame;
pub mod monitor;
pub mod names;
pub mod network;
pub mod ports;
pub mod publish;
pub mod shares;
pub mod supervisor;
