//! What a daemon writes to its stdout and stderr: cut into lines, given a level, passed to the supervisor, and the
//! last of it remembered for when the daemon fails.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, PoisonError},
};

use lighter_protocol::agent::{AgentMessage, LogLevel, LogSource};
use tokio::sync::oneshot;

use crate::{
    fd::AsyncFile,
    log::{MAX_TEXT, line},
    outbox::Outbox,
};

/// How many lines are remembered.
const REMEMBERED: usize = 50;

/// The most that a dead daemon's pipe holds: F_SETPIPE_SZ is limited to this for ordinary users.
const PIPE_BYTES: usize = 1 << 20;

/// The last lines of a daemon, oldest first; clones share them.
#[derive(Clone, Debug, Default)]
pub struct LastLines(Arc<Mutex<VecDeque<String>>>);

impl LastLines {
    fn push(&self, line: String) {
        let mut lines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if lines.len() == REMEMBERED {
            lines.pop_front();
        }
        lines.push_back(line);
    }

    /// A copy of them.
    pub fn get(&self) -> Vec<String> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .iter()
            .cloned()
            .collect()
    }
}

/// Cuts bytes into lines of at most [`MAX_TEXT`] bytes; the rest of a longer line is left out.
#[derive(Debug, Default)]
struct LineCutter {
    line: Vec<u8>,
}

impl LineCutter {
    fn push(&mut self, bytes: &[u8], mut each: impl FnMut(String)) {
        let mut pieces = bytes.split(|&byte| byte == b'\n').peekable();
        while let Some(piece) = pieces.next() {
            let room = MAX_TEXT - self.line.len();
            self.line.extend_from_slice(&piece[..piece.len().min(room)]);
            if pieces.peek().is_some() {
                self.end(&mut each);
            }
        }
    }

    /// Ends a line that has no line break.
    fn end(&mut self, mut each: impl FnMut(String)) {
        let text = String::from_utf8_lossy(&self.line).trim_end().to_owned();
        self.line.clear();
        if !text.is_empty() {
            each(text);
        }
    }
}

/// The level of a line in logfmt (`time=… level=warning msg=…`), which both daemons write. A Go program's last words
/// are not in logfmt.
fn level(line: &str) -> LogLevel {
    let value = line.split(' ').find_map(|field| field.strip_prefix("level="));
    match value {
        Some("trace" | "debug") => LogLevel::Debug,
        Some("warning" | "warn") => LogLevel::Warn,
        Some("error" | "fatal" | "panic") => LogLevel::Error,
        None if line.starts_with("panic:") || line.starts_with("fatal error:") => LogLevel::Error,
        _ => LogLevel::Info,
    }
}

/// Reads a daemon's pipe until nobody holds its other end. A child of the daemon's may hold it for long, so when
/// `exited` comes, what is there is read and then `drained` told: the daemon's last words are among it.
pub async fn follow(
    pipe: AsyncFile,
    source: LogSource,
    outbox: Outbox,
    last_lines: LastLines,
    exited: oneshot::Receiver<()>,
    drained: oneshot::Sender<()>,
) {
    let mut cutter = LineCutter::default();
    let mut buffer = [0; 4096];
    let each = |text: String| {
        last_lines.push(text.clone());
        outbox.push(AgentMessage::Log(line(source, level(&text), text)));
    };
    tokio::pin!(exited);
    let mut ended = false;
    while !ended {
        tokio::select! {
            read = pipe.read(&mut buffer) => match read {
                Ok(length) if length > 0 => cutter.push(&buffer[..length], each),
                _ => ended = true,
            },
            // Dropped without a word counts, too: then nobody waits.
            _ = &mut exited => break,
        }
    }
    let mut left = PIPE_BYTES;
    while !ended && left > 0 {
        match pipe.read_now(&mut buffer) {
            Ok(Some(length)) if length > 0 => {
                cutter.push(&buffer[..length], each);
                left = left.saturating_sub(length);
            }
            Ok(None) => break,
            _ => ended = true,
        }
    }
    cutter.end(each);
    // Nobody waits for it when the supervision itself has ended.
    let _ = drained.send(());
    while !ended {
        match pipe.read(&mut buffer).await {
            Ok(length) if length > 0 => cutter.push(&buffer[..length], each),
            _ => ended = true,
        }
    }
    cutter.end(each);
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use nix::{fcntl::OFlag, unistd::pipe2};

    use super::*;

    fn cut(pieces: &[&[u8]]) -> Vec<String> {
        let mut cutter = LineCutter::default();
        let mut lines = vec![];
        for piece in pieces {
            cutter.push(piece, |line| lines.push(line));
        }
        cutter.end(|line| lines.push(line));
        lines
    }

    #[test]
    fn lines_are_joined_over_reads_and_the_last_needs_no_line_break() {
        assert_eq!(
            cut(&[b"one\r\nt", b"w", b"o\n\n\nthree"]),
            ["one", "two", "three"]
        );
        assert_eq!(cut(&[b"\xff\n"]), ["\u{fffd}"]);
        assert_eq!(cut(&[]), [""; 0]);
    }

    #[test]
    fn a_long_line_is_cut_and_the_next_is_whole() {
        let long = vec![b'x'; 3 * MAX_TEXT];
        let lines = cut(&[&long, &long, b"\nnext\n"]);
        assert_eq!(lines.iter().map(String::len).collect::<Vec<_>>(), [MAX_TEXT, 4]);
    }

    #[test]
    fn levels_are_read_from_logfmt() {
        assert_eq!(
            level("time=\"2026-11-24T08:41:28Z\" level=warning msg=\"a level=error b\""),
            LogLevel::Warn
        );
        assert_eq!(level("level=fatal msg=x"), LogLevel::Error);
        assert_eq!(level("panic: runtime error"), LogLevel::Error);
        assert_eq!(level("noise"), LogLevel::Info);
    }

    #[tokio::test]
    async fn last_words_are_there_although_a_child_holds_the_pipe() {
        let (reader, writer) = pipe2(OFlag::O_CLOEXEC).unwrap();
        let mut writer = std::fs::File::from(writer);
        let (exited, exited_receiver) = oneshot::channel();
        let (drained, drained_receiver) = oneshot::channel();
        let (outbox, last_lines) = (Outbox::new(), LastLines::default());
        let pipe = AsyncFile::new(reader).unwrap();
        let following = tokio::spawn(follow(
            pipe,
            LogSource::Dockerd,
            outbox.clone(),
            last_lines.clone(),
            exited_receiver,
            drained,
        ));
        for number in 0..60 {
            writeln!(writer, "line {number}").unwrap();
        }
        write!(writer, "level=error msg=last").unwrap();
        exited.send(()).unwrap();
        drained_receiver.await.unwrap();
        let lines = last_lines.get();
        assert_eq!(lines.len(), REMEMBERED);
        assert_eq!(lines.last().unwrap(), "level=error msg=last");
        assert!(!following.is_finished());
        drop(writer);
        following.await.unwrap();
        let messages: Vec<_> = std::iter::from_fn(|| outbox.take()).collect();
        assert_eq!(messages.len(), 61);
        let Some(AgentMessage::Log(line)) = messages.last() else {
            panic!("not a log line")
        };
        assert_eq!(line.level, LogLevel::Error);
    }
}
