//! The agent's own log: structured lines to the supervisor, and the same on the kernel's log for the console, where
//! they can be read when there is no connection.

use std::{
    fs::{File, OpenOptions},
    io::Write,
    sync::OnceLock,
    time::{SystemTime, UNIX_EPOCH},
};

use lighter_protocol::agent::{AgentMessage, LogLevel, LogLine, LogSource};

use crate::outbox::Outbox;

/// The longest text of a line, in bytes.
pub const MAX_TEXT: usize = 8 * 1024;

/// Where the agent's log goes; clones share it.
#[derive(Clone, Debug)]
pub struct Log {
    outbox: Outbox,
}

impl Log {
    /// A log into `outbox`.
    pub fn new(outbox: Outbox) -> Self {
        Self { outbox }
    }

    /// A normal event.
    pub fn info(&self, text: impl Into<String>) {
        self.write(LogLevel::Info, text.into());
    }

    /// Something is off.
    pub fn warn(&self, text: impl Into<String>) {
        self.write(LogLevel::Warn, text.into());
    }

    /// Something failed.
    pub fn error(&self, text: impl Into<String>) {
        self.write(LogLevel::Error, text.into());
    }

    fn write(&self, level: LogLevel, text: String) {
        let priority = match level {
            LogLevel::Error => 3,
            LogLevel::Warn => 4,
            LogLevel::Info => 6,
            LogLevel::Debug => 7,
        };
        to_kernel_log(priority, &text);
        self.outbox
            .push(AgentMessage::Log(line(LogSource::Agent, level, text)));
    }
}

/// A line of now, its text cut to [`MAX_TEXT`].
pub fn line(source: LogSource, level: LogLevel, mut text: String) -> LogLine {
    text.truncate(cut(&text, MAX_TEXT).len());
    let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    LogLine {
        source,
        level,
        time_ms: u64::try_from(time.as_millis()).unwrap_or(u64::MAX),
        text,
    }
}

/// The longest beginning of `text` that has at most `max` bytes and does not end inside a character.
fn cut(text: &str, max: usize) -> &str {
    let end = (0..=max.min(text.len()))
        .rev()
        .find(|&end| text.is_char_boundary(end));
    &text[..end.unwrap_or(0)]
}

/// Writes to the kernel's log at a syslog priority (3 error, 4 warning, 6 information). Before /dev is mounted, and
/// in unit tests, there is nowhere to write to and the line is lost here, not for the supervisor.
pub fn to_kernel_log(priority: u8, text: &str) {
    print_to_kernel_log(priority, &format!("lighter-agent: {text}"));
}

/// As [`to_kernel_log`], without the agent's name before the text.
pub fn print_to_kernel_log(priority: u8, text: &str) {
    static KMSG: OnceLock<File> = OnceLock::new();
    if cfg!(test) {
        return;
    }
    let kmsg = match KMSG.get() {
        Some(kmsg) => kmsg,
        None => match OpenOptions::new().write(true).open("/dev/kmsg") {
            Ok(file) => KMSG.get_or_init(|| file),
            Err(_) => return,
        },
    };
    // The kernel takes at most about 1,000 bytes a record.
    let text = cut(text, 900).replace('\n', " | ");
    // There is nobody to tell when the kernel's log is not writable.
    drop((&*kmsg).write_all(format!("<{priority}>{text}\n").as_bytes()));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_text_is_cut_between_characters() {
        let cut = line(LogSource::Agent, LogLevel::Info, "é".repeat(MAX_TEXT));
        assert_eq!(cut.text.len(), MAX_TEXT);
        let cut = line(
            LogSource::Agent,
            LogLevel::Info,
            format!("a{}", "é".repeat(MAX_TEXT)),
        );
        assert_eq!(cut.text.len(), MAX_TEXT - 1);
    }
}
