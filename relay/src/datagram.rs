//! Datagrams on a stream: each behind its length, 16 bits big endian. No UDP payload is longer than that can say.

use std::io;

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::UdpSocket,
};

/// Room for any datagram, bytes.
pub const MAX: usize = u16::MAX as usize;

/// Writes one datagram.
///
/// # Errors
/// When the stream is broken; `InvalidInput` when `payload` is longer than [`MAX`].
pub async fn write(stream: &mut (impl AsyncWrite + Unpin), payload: &[u8]) -> io::Result<()> {
    let length = u16::try_from(payload.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let mut bytes = Vec::with_capacity(size_of::<u16>() + payload.len());
    bytes.extend_from_slice(&length.to_be_bytes());
    bytes.extend_from_slice(payload);
    stream.write_all(&bytes).await
}

/// Reads the next datagram; `None` at the end of the stream.
///
/// # Errors
/// When the stream is broken, or ends inside a datagram.
pub async fn read(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<Vec<u8>>> {
    let mut length = [0; size_of::<u16>()];
    if stream.read(&mut length[..1]).await? == 0 {
        return Ok(None);
    }
    stream.read_exact(&mut length[1..]).await?;
    let mut payload = vec![0; usize::from(u16::from_be_bytes(length))];
    stream.read_exact(&mut payload).await?;
    Ok(Some(payload))
}

/// Joins a stream of datagrams to a connected socket until the stream ends.
///
/// # Errors
/// When the stream is broken.
pub async fn join<S: AsyncRead + AsyncWrite>(stream: S, socket: &UdpSocket) -> io::Result<()> {
    let (mut reader, mut writer) = tokio::io::split(stream);
    let there = async {
        while let Some(payload) = read(&mut reader).await? {
            // Nobody may listen yet, or the network may not take it: datagrams get lost.
            let _ = socket.send(&payload).await;
        }
        Ok(())
    };
    let back = async {
        let mut buffer = vec![0; MAX];
        loop {
            // An error tells of a datagram before that nobody took, and is told once.
            if let Ok(length) = socket.recv(&mut buffer).await {
                write(&mut writer, &buffer[..length]).await?;
            }
        }
    };
    tokio::select! {
        ended = there => ended,
        broken = back => broken,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn datagrams_keep_their_bounds() {
        let mut stream = vec![];
        for payload in [&b"one"[..], b"", &[7; MAX]] {
            write(&mut stream, payload).await.unwrap();
        }
        let mut stream = &stream[..];
        assert_eq!(read(&mut stream).await.unwrap().unwrap(), b"one");
        assert_eq!(read(&mut stream).await.unwrap().unwrap(), b"");
        assert_eq!(read(&mut stream).await.unwrap().unwrap(), [7; MAX]);
        assert_eq!(read(&mut stream).await.unwrap(), None);
    }

    #[tokio::test]
    async fn one_that_is_too_long_or_cut_is_an_error() {
        let error = write(&mut vec![], &[0; MAX + 1]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        for cut in [&[0][..], &[0, 2, 1]] {
            let error = read(&mut &cut[..]).await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        }
    }
}
