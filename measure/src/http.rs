//! A client of HTTP/1.1 on a Unix socket for a few fixed requests (RFC 9112).
//!
//! The other end may be a hostile guest: heads and lines are bounded, bodies are bounded by the caller and never kept
//! here, and a wait is bounded by [`PATIENCE`].

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The longest silence of the other end: it hangs.
const PATIENCE: Duration = Duration::from_secs(600);

/// The longest head of an answer, bytes.
const MAX_HEAD: usize = 16 << 10;

/// The longest line that begins a chunk or is part of the trailer, bytes.
const MAX_LINE: usize = 1 << 10;

/// What is kept of the body of an answer that refuses, bytes.
const MAX_REASON: usize = 1 << 10;

/// Bytes read at once.
const BUFFER: usize = 64 << 10;

/// Why a request has no answer.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The socket.
    #[error("cannot connect to {}", .0.display())]
    Connect(PathBuf, #[source] io::Error),
    /// While the request was sent.
    #[error("cannot send the request {0:?}")]
    Send(String, #[source] io::Error),
    /// While the answer was received.
    #[error("cannot receive the answer to {0:?}")]
    Receive(String, #[source] io::Error),
    /// The answer is not HTTP.
    #[error("the answer to {0:?} is not understood: {1}")]
    Malformed(String, &'static str),
    /// The answer's body goes on and on.
    #[error("the answer to {0:?} has more than {1} bytes")]
    TooLong(String, u64),
    /// The engine does not do it.
    #[error("the engine refused {request:?} with status {status}: {reason:?}")]
    Refused {
        /// What was asked for.
        request: String,
        /// The status.
        status: u16,
        /// The beginning of what it said.
        reason: String,
    },
}

/// The body of a request.
pub struct Body<'a> {
    /// Its media type.
    pub kind: &'a str,
    /// Its length, bytes.
    pub length: u64,
    /// Writes it.
    pub write: &'a dyn Fn(&mut dyn Write) -> io::Result<()>,
}

/// A connection, which serves one request after another.
#[derive(Debug)]
pub struct Connection(BufReader<UnixStream>);

/// What is wrong while an answer is read, before it is known to which request.
#[derive(Debug)]
enum Trouble {
    Io(io::Error),
    Malformed(&'static str),
    TooLong,
}

impl From<io::Error> for Trouble {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl Trouble {
    /// While the answer to `request` was read, whose body may have `limit` bytes.
    fn at(self, request: &str, limit: u64) -> Error {
        match self {
            Self::Io(error) => Error::Receive(request.into(), error),
            Self::Malformed(what) => Error::Malformed(request.into(), what),
            Self::TooLong => Error::TooLong(request.into(), limit),
        }
    }
}

/// How the end of a body is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Framing {
    Length(u64),
    Chunked,
    UntilClose,
}

/// What matters of an answer's head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Head {
    status: u16,
    framing: Framing,
}

impl Connection {
    /// Connects to `socket`.
    ///
    /// # Errors
    /// When nobody listens.
    pub fn open(socket: &Path) -> Result<Self, Error> {
        Self::open_for(socket, PATIENCE)
    }

    /// Connects to `socket`; a silence of the other end may last for `patience`, which is not zero.
    ///
    /// # Errors
    /// When nobody listens.
    pub fn open_for(socket: &Path, patience: Duration) -> Result<Self, Error> {
        UnixStream::connect(socket)
            .and_then(|stream| Self::over(stream, patience))
            .map_err(|error| Error::Connect(socket.into(), error))
    }

    fn over(stream: UnixStream, patience: Duration) -> io::Result<Self> {
        stream.set_read_timeout(Some(patience))?;
        stream.set_write_timeout(Some(patience))?;
        Ok(Self(BufReader::with_capacity(BUFFER, stream)))
    }

    /// Sends `request` (method and target) and hands the body of the answer to `sink`. Returns the body's length.
    ///
    /// # Errors
    /// When there is no answer, it is none of success, or its body has more than `limit` bytes.
    pub fn request(
        &mut self,
        request: &str,
        body: Option<Body<'_>>,
        limit: u64,
        sink: &mut dyn FnMut(&[u8]),
    ) -> Result<u64, Error> {
        let sent = self.send(request, "", body);
        // An engine that refuses need not take all of the body.
        let received = match sent {
            Err(error) => match self.head() {
                Ok(head) if !(200..300).contains(&head.status) => Ok(head),
                _ => return Err(Error::Send(request.into(), error)),
            },
            Ok(()) => self.head(),
        };
        let trouble = |trouble: Trouble| trouble.at(request, limit);
        let head = received.map_err(trouble)?;
        if (200..300).contains(&head.status) {
            return self.body(head, limit, sink).map_err(trouble);
        }
        Err(self.refused(request, head))
    }

    /// Sends `request` and makes the connection a stream of the other end's own, such as an attached container's. What of
    /// it has come with the answer is in the reader.
    ///
    /// # Errors
    /// When there is no answer, or it does not switch protocols.
    pub fn upgrade(mut self, request: &str) -> Result<BufReader<UnixStream>, Error> {
        let upgrade = "Connection: Upgrade\r\nUpgrade: tcp\r\n";
        self.send(request, upgrade, None)
            .map_err(|error| Error::Send(request.into(), error))?;
        let head = self
            .head()
            .map_err(|trouble| trouble.at(request, MAX_HEAD as u64))?;
        match head.status {
            101 => Ok(self.0),
            _ => Err(self.refused(request, head)),
        }
    }

    /// The engine's refusal, with what it says of it.
    fn refused(&mut self, request: &str, head: Head) -> Error {
        let mut reason = vec![];
        let mut keep = |bytes: &[u8]| {
            let room = MAX_REASON - reason.len();
            reason.extend_from_slice(&bytes[..bytes.len().min(room)]);
        };
        // The status is known, whatever becomes of the reason.
        let _ = self.body(head, MAX_REASON as u64, &mut keep);
        Error::Refused {
            request: request.into(),
            status: head.status,
            reason: String::from_utf8_lossy(&reason).trim().into(),
        }
    }

    /// `headers` are whole lines.
    fn send(&mut self, request: &str, headers: &str, body: Option<Body<'_>>) -> io::Result<()> {
        let stream = self.0.get_mut();
        let mut head = format!("{request} HTTP/1.1\r\nHost: lighter\r\n{headers}");
        if let Some(body) = &body {
            head += &format!(
                "Content-Type: {}\r\nContent-Length: {}\r\n",
                body.kind, body.length
            );
        }
        head += "\r\n";
        stream.write_all(head.as_bytes())?;
        body.map_or(Ok(()), |body| (body.write)(stream))
    }

    fn head(&mut self) -> Result<Head, Trouble> {
        let mut text = vec![];
        loop {
            let begin = text.len();
            self.line(MAX_HEAD, &mut text)?;
            if text[begin..].trim_ascii().is_empty() {
                break;
            }
        }
        let text = str::from_utf8(&text).map_err(|_| Trouble::Malformed("its head is no text"))?;
        parse_head(text).map_err(Trouble::Malformed)
    }

    /// Adds a line with its end to `text`, which may grow to `limit`.
    fn line(&mut self, limit: usize, text: &mut Vec<u8>) -> Result<(), Trouble> {
        loop {
            let ready = self.ready()?;
            let end = ready.iter().position(|&byte| byte == b'\n');
            let length = end.map_or(ready.len(), |end| end + 1);
            if text.len() + length > limit {
                return Err(Trouble::Malformed("a line or its head is too long"));
            }
            text.extend_from_slice(&ready[..length]);
            self.0.consume(length);
            if end.is_some() {
                return Ok(());
            }
        }
    }

    /// Bytes that have come, at least one.
    fn ready(&mut self) -> Result<&[u8], Trouble> {
        let ready = self.0.fill_buf()?;
        match ready.is_empty() {
            true => Err(Trouble::Io(io::ErrorKind::UnexpectedEof.into())),
            false => Ok(ready),
        }
    }

    fn body(&mut self, head: Head, limit: u64, sink: &mut dyn FnMut(&[u8])) -> Result<u64, Trouble> {
        match head.framing {
            // RFC 9112, section 6.3: these have none.
            _ if head.status == 204 || head.status == 304 => Ok(0),
            Framing::Length(length) => {
                if length > limit {
                    return Err(Trouble::TooLong);
                }
                self.pass(length, sink)?;
                Ok(length)
            }
            Framing::Chunked => self.chunks(limit, sink),
            Framing::UntilClose => {
                let mut total = 0;
                loop {
                    let ready = self.0.fill_buf()?;
                    let length = ready.len();
                    total += length as u64;
                    if total > limit {
                        return Err(Trouble::TooLong);
                    }
                    if length == 0 {
                        return Ok(total);
                    }
                    sink(ready);
                    self.0.consume(length);
                }
            }
        }
    }

    fn chunks(&mut self, limit: u64, sink: &mut dyn FnMut(&[u8])) -> Result<u64, Trouble> {
        let mut total = 0u64;
        let mut line = vec![];
        loop {
            line.clear();
            self.line(MAX_LINE, &mut line)?;
            let size = chunk_size(&line).ok_or(Trouble::Malformed("a chunk has no size"))?;
            if size == 0 {
                break;
            }
            total = total
                .checked_add(size)
                .filter(|&total| total <= limit)
                .ok_or(Trouble::TooLong)?;
            self.pass(size, sink)?;
            line.clear();
            self.line(MAX_LINE, &mut line)?;
            if line != b"\r\n" {
                return Err(Trouble::Malformed("a chunk is longer than it said"));
            }
        }
        // The trailer; like the head it ends with an empty line, and is bounded as a whole.
        line.clear();
        loop {
            let begin = line.len();
            self.line(MAX_LINE, &mut line)?;
            if line[begin..].trim_ascii().is_empty() {
                return Ok(total);
            }
        }
    }

    /// Hands the next `left` bytes to `sink`.
    fn pass(&mut self, mut left: u64, sink: &mut dyn FnMut(&[u8])) -> Result<(), Trouble> {
        while left > 0 {
            let ready = self.ready()?;
            let length = ready.len().min(usize::try_from(left).unwrap_or(usize::MAX));
            sink(&ready[..length]);
            self.0.consume(length);
            left -= length as u64;
        }
        Ok(())
    }
}

fn parse_head(text: &str) -> Result<Head, &'static str> {
    let mut lines = text.lines();
    let status = lines
        .next()
        .and_then(|line| line.strip_prefix("HTTP/1.1 "))
        .and_then(|rest| rest.get(..3)?.parse().ok())
        .filter(|status| (100..600).contains(status))
        .ok_or("it does not begin with HTTP/1.1 and a status")?;
    let mut framing = Framing::UntilClose;
    for line in lines.take_while(|line| !line.is_empty()) {
        let (name, value) = line.split_once(':').ok_or("a header has no colon")?;
        let value = value.trim();
        if name.eq_ignore_ascii_case("transfer-encoding") {
            if !value.eq_ignore_ascii_case("chunked") {
                return Err("it has another transfer encoding than chunked");
            }
            framing = Framing::Chunked;
        } else if name.eq_ignore_ascii_case("content-length") && framing != Framing::Chunked {
            framing = Framing::Length(decimal(value).ok_or("its Content-Length is no number").and_then(
                |length| match framing {
                    Framing::Length(other) if other != length => Err("it has two lengths"),
                    _ => Ok(length),
                },
            )?);
        }
    }
    Ok(Head { status, framing })
}

/// Digits only: the standard library also takes a sign.
fn decimal(text: &str) -> Option<u64> {
    let digits = text.bytes().all(|byte| byte.is_ascii_digit());
    digits.then(|| text.parse().ok())?
}

fn chunk_size(line: &[u8]) -> Option<u64> {
    let line = str::from_utf8(line).ok()?;
    let digits = line.split(';').next()?.trim();
    let plain = digits.bytes().all(|byte| byte.is_ascii_hexdigit());
    plain.then(|| u64::from_str_radix(digits, 16).ok())?
}

#[cfg(test)]
#[path = "http_tests.rs"]
mod tests;
