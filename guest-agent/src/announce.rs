//! Start-up milestones on the console ([`lighter_protocol::announce`]), when the kernel's command line asks for them.

use std::fs;

use lighter_protocol::{
    agent::EngineState,
    announce::{AGENT_RUNNING, ENGINE_READY, WORD},
};
use tokio::sync::watch;

use crate::log::{Log, print_to_kernel_log};

/// Critical: `quiet` and `loglevel=4` still show it.
const PRIORITY: u8 = 2;

/// Announces that the agent runs, and the engine once it is ready. Call it when /dev and /proc are there.
pub fn start(log: &Log, mut engine: watch::Receiver<EngineState>) {
    match fs::read_to_string("/proc/cmdline") {
        Ok(command_line) if is_wanted(&command_line) => {}
        Ok(_) => return,
        Err(error) => return log.warn(format!("cannot read /proc/cmdline: {error}")),
    }
    print_to_kernel_log(PRIORITY, AGENT_RUNNING);
    tokio::spawn(async move {
        if engine
            .wait_for(|state| *state == EngineState::Ready)
            .await
            .is_ok()
        {
            print_to_kernel_log(PRIORITY, ENGINE_READY);
        }
    });
}

fn is_wanted(command_line: &str) -> bool {
    command_line.split_ascii_whitespace().any(|word| word == WORD)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_whole_word_asks_for_announcements() {
        assert!(is_wanted("console=ttyS0 lighter.announce\n"));
        assert!(is_wanted("lighter.announce quiet\n"));
        for other in [
            "",
            "quiet\n",
            "lighter.announce=0",
            "xlighter.announce",
            "lighter.announced",
        ] {
            assert!(!is_wanted(other), "{other:?}");
        }
    }
}
