//! Frames of [`lighter_protocol::frame`] read from a stream.

use std::io;

use lighter_protocol::frame::{Decoder, Frame, FrameError};
use tokio::io::{AsyncRead, AsyncReadExt};

/// Why there is no next frame.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The stream broke.
    #[error("the connection broke")]
    Read(#[source] io::Error),
    /// It ended inside a frame.
    #[error("the connection ended in the middle of a message")]
    Cut,
    /// It carries something else.
    #[error("the peer does not speak the protocol")]
    Frame(#[source] FrameError),
}

/// The reading half of a stream, cut into frames.
#[derive(Debug)]
pub struct FrameReader<R> {
    stream: R,
    decoder: Decoder,
    buffer: Box<[u8]>,
}

impl<R: AsyncRead + Unpin> FrameReader<R> {
    /// Reads from `stream`.
    pub fn new(stream: R) -> Self {
        Self {
            stream,
            decoder: Decoder::new(),
            buffer: vec![0; 16 * 1024].into_boxed_slice(),
        }
    }

    /// The stream, for writing to one that goes both ways.
    pub fn get_mut(&mut self) -> &mut R {
        &mut self.stream
    }

    /// The next frame; `None` when the stream has ended between frames. When dropped early, nothing is lost.
    ///
    /// # Errors
    /// When the stream breaks or does not carry frames.
    pub async fn next(&mut self) -> Result<Option<Frame>, Error> {
        loop {
            if let Some(frame) = self.decoder.next_frame().map_err(Error::Frame)? {
                return Ok(Some(frame));
            }
            match self.stream.read(&mut self.buffer).await.map_err(Error::Read)? {
                0 if self.decoder.is_partial() => return Err(Error::Cut),
                0 => return Ok(None),
                length => self.decoder.push(&self.buffer[..length]),
            }
        }
    }
}
