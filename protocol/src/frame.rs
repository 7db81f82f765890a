//! Frames on a byte stream: `u32` big-endian payload length, one byte of [`Channel`], the payload.
//!
//! JSON messages and raw terminal bytes share a connection by their channel. The length counts the payload only.

use serde::{Serialize, de::DeserializeOwned};

/// The largest payload either end accepts, in bytes. A longer frame ends the connection.
pub const MAX_PAYLOAD: usize = 1 << 20;

/// Bytes in front of a payload: length and channel.
pub const HEADER: usize = 5;

/// What a frame's payload is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Channel {
    /// One JSON message.
    Message = 0,
    /// Bytes for the command's standard input. An empty payload is its end.
    Stdin = 1,
    /// Bytes of the command's standard output, or of its terminal.
    Stdout = 2,
    /// Bytes of the command's standard error.
    Stderr = 3,
}

impl TryFrom<u8> for Channel {
    type Error = FrameError;

    fn try_from(byte: u8) -> Result<Self, FrameError> {
        match byte {
            0 => Ok(Self::Message),
            1 => Ok(Self::Stdin),
            2 => Ok(Self::Stdout),
            3 => Ok(Self::Stderr),
            other => Err(FrameError::UnknownChannel(other)),
        }
    }
}

/// One received frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// What the payload is.
    pub channel: Channel,
    /// At most [`MAX_PAYLOAD`] bytes.
    pub payload: Vec<u8>,
}

impl Frame {
    /// Reads the payload as a JSON message.
    ///
    /// # Errors
    /// When the frame is not on [`Channel::Message`] or is not a `T`.
    pub fn message<T: DeserializeOwned>(&self) -> Result<T, FrameError> {
        if self.channel != Channel::Message {
            return Err(FrameError::NotAMessage(self.channel));
        }
        serde_json::from_slice(&self.payload).map_err(FrameError::Malformed)
    }
}

/// Why bytes are not frames.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The peer announced more than [`MAX_PAYLOAD`] bytes.
    #[error("a frame of {0} bytes is longer than the limit of {MAX_PAYLOAD}")]
    TooLong(usize),
    /// The channel byte is none of [`Channel`].
    #[error("a frame for channel {0}, which does not exist")]
    UnknownChannel(u8),
    /// A JSON message was wanted.
    #[error("a frame of raw bytes ({0:?}) where a message was expected")]
    NotAMessage(Channel),
    /// The payload is not the wanted message.
    #[error("a message that is not understood")]
    Malformed(#[source] serde_json::Error),
    /// The message cannot be written as JSON.
    #[error("cannot encode a message")]
    Encode(#[source] serde_json::Error),
}

/// Encodes raw bytes for `channel`.
///
/// # Errors
/// [`FrameError::TooLong`] when `payload` is longer than [`MAX_PAYLOAD`]: callers cut streams into pieces.
pub fn encode(channel: Channel, payload: &[u8]) -> Result<Vec<u8>, FrameError> {
    let length = u32::try_from(payload.len())
        .ok()
        .filter(|_| payload.len() <= MAX_PAYLOAD);
    let length = length.ok_or(FrameError::TooLong(payload.len()))?;
    let mut bytes = Vec::with_capacity(HEADER + payload.len());
    bytes.extend_from_slice(&length.to_be_bytes());
    bytes.push(channel as u8);
    bytes.extend_from_slice(payload);
    Ok(bytes)
}

/// Encodes one JSON message.
///
/// # Errors
/// When the message cannot be written as JSON or is longer than [`MAX_PAYLOAD`].
pub fn encode_message<T: Serialize>(message: &T) -> Result<Vec<u8>, FrameError> {
    encode(
        Channel::Message,
        &serde_json::to_vec(message).map_err(FrameError::Encode)?,
    )
}

/// Cuts received bytes into frames. Holds at most one frame that is not complete.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: Vec<u8>,
}

impl Decoder {
    /// An empty decoder.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds bytes as they came from the stream.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// Takes the next complete frame, or `None` until more bytes are pushed.
    ///
    /// # Errors
    /// When the stream is not frames; it cannot be resumed after that.
    pub fn next_frame(&mut self) -> Result<Option<Frame>, FrameError> {
        let Some((header, rest)) = self.buffer.split_first_chunk::<HEADER>() else {
            return Ok(None);
        };
        let [a, b, c, d, channel] = *header;
        let length = u32::from_be_bytes([a, b, c, d]) as usize;
        if length > MAX_PAYLOAD {
            return Err(FrameError::TooLong(length));
        }
        let channel = Channel::try_from(channel)?;
        if rest.len() < length {
            return Ok(None);
        }
        let payload = rest[..length].to_vec();
        self.buffer.drain(..HEADER + length);
        Ok(Some(Frame { channel, payload }))
    }

    /// Whether bytes of an incomplete frame are held: a stream that ends now was cut.
    pub fn is_partial(&self) -> bool {
        !self.buffer.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_frame_longer_than_the_limit_is_refused_before_its_payload_arrives() {
        let mut decoder = Decoder::new();
        decoder.push(&u32::MAX.to_be_bytes());
        decoder.push(&[0]);
        assert!(matches!(decoder.next_frame(), Err(FrameError::TooLong(_))));
        assert!(matches!(
            encode(Channel::Stdin, &vec![0; MAX_PAYLOAD + 1]),
            Err(FrameError::TooLong(_))
        ));
    }

    #[test]
    fn an_unknown_channel_is_refused() {
        let mut decoder = Decoder::new();
        decoder.push(&[0, 0, 0, 0, 9]);
        assert!(matches!(decoder.next_frame(), Err(FrameError::UnknownChannel(9))));
    }

    #[test]
    fn a_cut_stream_is_noticed() {
        let mut decoder = Decoder::new();
        decoder.push(&encode(Channel::Stdout, b"hello").unwrap()[..7]);
        assert!(decoder.next_frame().unwrap().is_none());
        assert!(decoder.is_partial());
    }

    proptest! {
        #[test]
        fn any_split_of_the_stream_gives_the_same_frames(
            payloads in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..300), 0..8),
            cut in 1usize..40,
        ) {
            let mut stream = vec![];
            for payload in &payloads {
                stream.extend(encode(Channel::Stdout, payload).unwrap());
            }
            let mut decoder = Decoder::new();
            let mut got = vec![];
            for piece in stream.chunks(cut) {
                decoder.push(piece);
                while let Some(frame) = decoder.next_frame().unwrap() {
                    got.push(frame.payload);
                }
            }
            prop_assert_eq!(got, payloads);
            prop_assert!(!decoder.is_partial());
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let mut decoder = Decoder::new();
            decoder.push(&bytes);
            while let Ok(Some(_)) = decoder.next_frame() {}
        }
    }
}
