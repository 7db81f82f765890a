//! The agent's announcements on a serial console ([`lighter_protocol::announce`]), with the time each was seen.

use crate::logs::printable;
use lighter_protocol::announce::{AGENT_RUNNING, ENGINE_READY};
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;

/// Lines that are kept for an error message.
const LAST_LINES: usize = 20;

/// The longest line that is looked at, bytes; what goes on is another line.
const MAX_LINE: usize = 4096;

/// When the announcements were seen, CLOCK_MONOTONIC, nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Milestones {
    /// The agent runs.
    pub agent_running_ns: u64,
    /// The engine is ready.
    pub engine_ready_ns: u64,
}

/// Reads a console for announcements.
#[derive(Debug, Default)]
pub struct Reader {
    line: Vec<u8>,
    last_lines: VecDeque<String>,
    agent_running_ns: Option<u64>,
}

impl Reader {
    /// Takes what came at `now_ns`. Returns the milestones once the last is reached.
    pub fn feed(&mut self, bytes: &[u8], now_ns: u64) -> Option<Milestones> {
        for &byte in bytes {
            if byte != b'\n' && self.line.len() < MAX_LINE {
                self.line.push(byte);
                continue;
            }
            let line = std::mem::take(&mut self.line);
            if byte != b'\n' {
                self.line.push(byte);
            }
            let line = printable(&String::from_utf8_lossy(&line));
            if line.ends_with(AGENT_RUNNING) {
                self.agent_running_ns.get_or_insert(now_ns);
            } else if line.ends_with(ENGINE_READY)
                && let Some(agent_running_ns) = self.agent_running_ns
            {
                return Some(Milestones {
                    agent_running_ns,
                    engine_ready_ns: now_ns,
                });
            }
            if self.last_lines.len() == LAST_LINES {
                self.last_lines.pop_front();
            }
            self.last_lines.push_back(line);
        }
        None
    }

    /// The last lines, fit for a terminal, and what has come of another.
    pub fn into_last_lines(mut self) -> Vec<String> {
        if !self.line.is_empty() {
            self.last_lines
                .push_back(printable(&String::from_utf8_lossy(&self.line)));
        }
        self.last_lines.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn announcements_are_found_however_they_are_cut() {
        let console = format!("[    0.1] Linux\r\n[    1.2] {AGENT_RUNNING}\r\nother\n{ENGINE_READY}\r\n");
        for size in 1..console.len() {
            let mut reader = Reader::default();
            let mut found = None;
            for (index, piece) in console.as_bytes().chunks(size).enumerate() {
                found = found.or(reader.feed(piece, index as u64));
            }
            let at = |line: &str| {
                let end = console.find(line).unwrap() + line.len() + 1;
                (end / size) as u64
            };
            let expected = Milestones {
                agent_running_ns: at(AGENT_RUNNING),
                engine_ready_ns: at(ENGINE_READY),
            };
            assert_eq!(found, Some(expected), "pieces of {size}");
        }
    }

    #[test]
    fn endless_and_evil_output_takes_bounded_memory_and_is_made_printable() {
        let mut reader = Reader::default();
        for _ in 0..1000 {
            assert_eq!(reader.feed(&[b'x'; 1000], 1), None);
        }
        reader.feed(b"\n\x1b[2Jlast", 1);
        let lines = reader.into_last_lines();
        assert!(lines.iter().map(String::len).sum::<usize>() <= (LAST_LINES + 1) * MAX_LINE);
        assert_eq!(lines.last().unwrap(), "\\u{1b}[2Jlast");
    }
}
