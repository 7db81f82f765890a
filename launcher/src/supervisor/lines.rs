//! Lines from a pipe or socket, bounded.

use std::io;
use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};

/// Cuts a stream into lines. A line longer than the limit is given in pieces, so that nothing grows without bound.
#[derive(Debug)]
pub struct Lines<R> {
    reader: BufReader<R>,
    line: Vec<u8>,
    limit: usize,
}

impl<R: AsyncRead + Unpin> Lines<R> {
    /// Lines of at most `limit` bytes.
    pub fn new(reader: R, limit: usize) -> Self {
        Self {
            reader: BufReader::new(reader),
            line: vec![],
            limit,
        }
    }

    /// The next line without its break, or `None` at the end. May be cancelled without losing anything.
    ///
    /// # Errors
    /// When reading fails.
    pub async fn next(&mut self) -> io::Result<Option<String>> {
        loop {
            let chunk = self.reader.fill_buf().await?;
            if chunk.is_empty() {
                return Ok((!self.line.is_empty()).then(|| self.take()));
            }
            let room = self.limit - self.line.len();
            let end = chunk.iter().take(room).position(|&byte| byte == b'\n');
            let piece = &chunk[..end.unwrap_or(chunk.len().min(room))];
            self.line.extend_from_slice(piece);
            let used = piece.len() + usize::from(end.is_some());
            self.reader.consume(used);
            if end.is_some() || self.line.len() >= self.limit {
                return Ok(Some(self.take()));
            }
        }
    }

    /// The stream, for a peer that has no more to say but its end.
    pub fn into_reader(self) -> R {
        self.reader.into_inner()
    }

    fn take(&mut self) -> String {
        String::from_utf8_lossy(&std::mem::take(&mut self.line)).into_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn long_lines_come_in_pieces_and_the_last_needs_no_break() {
        let mut lines = Lines::new(&b"ab\n\n12345678\nend"[..], 4);
        let mut got = vec![];
        while let Some(line) = lines.next().await.unwrap() {
            got.push(line);
        }
        assert_eq!(got, ["ab", "", "1234", "5678", "", "end"]);
    }
}
