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
    /// The same on the clock of the kernel's log, microseconds, if lines have stamps.
    pub agent_running_kernel_us: Option<u64>,
    /// The engine is ready.
    pub engine_ready_ns: u64,
}

/// Reads a console for announcements.
#[derive(Debug, Default)]
pub struct Reader {
    line: Vec<u8>,
    last_lines: VecDeque<String>,
    /// When its line was seen, and the kernel's stamp of it.
    agent_running: Option<(u64, Option<u64>)>,
}

/// The stamp of a line of the kernel's log, microseconds: `[    1.234567] text`.
fn kernel_us(line: &str) -> Option<u64> {
    let (stamp, _) = line.strip_prefix('[')?.split_once(']')?;
    let (seconds, fraction) = stamp.trim_start().split_once('.')?;
    let (seconds, micros): (u64, u64) = (seconds.parse().ok()?, fraction.parse().ok()?);
    let is_whole = fraction.len() == 6;
    seconds
        .checked_mul(1_000_000)?
        .checked_add(micros)
        .filter(|_| is_whole)
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
                self.agent_running.get_or_insert((now_ns, kernel_us(&line)));
            } else if line.ends_with(ENGINE_READY)
                && let Some((agent_running_ns, agent_running_kernel_us)) = self.agent_running
            {
                return Some(Milestones {
                    agent_running_ns,
                    agent_running_kernel_us,
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
        let console =
            format!("[    0.1] Linux\r\n[    1.000234] {AGENT_RUNNING}\r\nother\n{ENGINE_READY}\r\n");
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
                agent_running_kernel_us: Some(1_000_234),
                engine_ready_ns: at(ENGINE_READY),
            };
            assert_eq!(found, Some(expected), "pieces of {size}");
        }
    }

    #[test]
    fn stamps_are_read_whole_or_not_at_all() {
        assert_eq!(kernel_us("[    0.132456] lighter-agent: running"), Some(132_456));
        assert_eq!(kernel_us("[12345.000001][    T1] x"), Some(12_345_000_001));
        for line in [
            "x",
            "[1.2] x",
            "[-1.000000] x",
            "[    0.132456",
            "[18446744073709551615.000001] x",
        ] {
            assert_eq!(kernel_us(line), None, "{line}");
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
