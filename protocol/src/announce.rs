//! Milestones on the guest's console, for measurements: a serial port is what every monitor has, so that the same
//! guest can be timed in any of them.

/// The word on the kernel's command line that asks the agent to announce.
pub const WORD: &str = "lighter.announce";

/// The line once the agent runs and has mounted the kernel's file systems.
pub const AGENT_RUNNING: &str = "lighter-agent: running";

/// The line once the engine is ready.
pub const ENGINE_READY: &str = "lighter-agent: engine ready";
