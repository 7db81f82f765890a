//! Log files of a VM: capped in size, and free of what would disturb a terminal.
//!
//! What is in them comes from the guest, which may be hostile: control characters are written as escapes.

use clap::ValueEnum;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// A log file is renamed to `.1` when it is longer than this, bytes, replacing the one before.
const MAX_BYTES: u64 = 4 << 20;

/// How much of a file's end is looked at for its last lines, bytes.
const TAIL_BYTES: u64 = 1 << 20;

/// Longest line that is kept, bytes.
const MAX_LINE: usize = 8 << 10;

/// Whose log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Source {
    /// The guest's serial console: its kernel.
    Console,
    /// Lighter's agent in the guest.
    Agent,
    /// dockerd and containerd.
    Engine,
    /// The monitor and the supervisor on the host.
    Monitor,
}

impl Source {
    /// The file's name in the VM's folder.
    pub fn file_name(self) -> &'static str {
        match self {
            Self::Console => "console.log",
            Self::Agent => "agent.log",
            Self::Engine => "engine.log",
            Self::Monitor => "monitor.log",
        }
    }
}

/// A log file that is appended to.
#[derive(Debug)]
pub struct LogFile {
    path: PathBuf,
    file: File,
    length: u64,
}

impl LogFile {
    /// Opens `path`, making it if need be.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub fn open(path: PathBuf) -> io::Result<Self> {
        let file = open_append(&path)?;
        let length = file.metadata()?.len();
        Ok(Self { path, file, length })
    }

    /// Appends a line. One that cannot be written is lost: a full disk must not stop a VM.
    pub fn line(&mut self, text: &str) {
        if self.length > MAX_BYTES {
            let mut old = self.path.clone().into_os_string();
            old.push(".1");
            if std::fs::rename(&self.path, old).is_ok()
                && let Ok(file) = open_append(&self.path)
            {
                self.file = file;
                self.length = 0;
            }
        }
        let mut line = printable(cut(text, MAX_LINE));
        line.push('\n');
        if self.length <= MAX_BYTES && self.file.write_all(line.as_bytes()).is_ok() {
            self.length += line.len() as u64;
        }
    }
}

/// Opens a log for appending, readable by the user alone.
///
/// # Errors
/// When it cannot be opened or made.
pub fn open_append(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(path)
}

/// `text` with control characters as escapes, but for tabs and line breaks.
pub fn printable(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        // Bidirectional overrides make a line read as what it is not.
        let disguise = matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
        match c {
            '\t' | '\n' => out.push(c),
            '\r' => {}
            _ if c.is_control() || disguise => out.extend(c.escape_unicode()),
            _ => out.push(c),
        }
    }
    out
}

/// At most `bytes` of `text`, cut between characters.
pub fn cut(text: &str, bytes: usize) -> &str {
    let mut end = text.len().min(bytes);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

/// The last `count` lines of a file, printable. A file that is not there has none.
///
/// # Errors
/// When it is there and cannot be read.
pub fn last_lines(path: &Path, count: usize) -> io::Result<Vec<String>> {
    let (mut file, length) = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(vec![]),
        result => {
            let file = result?;
            let length = file.metadata()?.len();
            (file, length)
        }
    };
    file.seek(SeekFrom::Start(length.saturating_sub(TAIL_BYTES)))?;
    let mut bytes = vec![];
    file.take(TAIL_BYTES).read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    let last = &lines[lines.len().saturating_sub(count)..];
    Ok(last.iter().map(|line| printable(cut(line, MAX_LINE))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escape_sequences_do_not_reach_the_terminal() {
        assert_eq!(printable("a\x1b[2Jb\r\n\tc"), "a\\u{1b}[2Jb\n\tc");
        assert_eq!(printable("\u{202e}x"), "\\u{202e}x");
    }

    #[test]
    fn a_log_never_grows_beyond_its_limit() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("agent.log");
        let mut log = LogFile::open(path.clone()).unwrap();
        let line = "x".repeat(2 * MAX_LINE);
        for _ in 0..(3 * MAX_BYTES / MAX_LINE as u64) {
            log.line(&line);
        }
        let limit = MAX_BYTES + MAX_LINE as u64 + 1;
        assert!(std::fs::metadata(&path).unwrap().len() <= limit);
        assert!(
            std::fs::metadata(folder.path().join("agent.log.1"))
                .unwrap()
                .len()
                <= limit
        );
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2);
    }

    #[test]
    fn the_last_lines_are_the_last_ones() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x");
        assert!(last_lines(&path, 3).unwrap().is_empty());
        std::fs::write(&path, b"a\nb\n\nc\xff\nd").unwrap();
        assert_eq!(last_lines(&path, 2).unwrap(), ["c\u{fffd}", "d"]);
    }
}
