//! Bytes both ways between two streams, with each half closed on its own.
//!
//! The end of one side's bytes is passed on as a shutdown of the other side's writing half, and the opposite way
//! stays open: `docker run -i` ends its input and still wants the output. An error on either side ends both.
//!
//! A thousand idle connections must cost little: bytes pass through one buffer of the thread, and a connection has
//! memory of its own only while its receiver is slower than its sender.

use std::{
    cell::RefCell,
    future::poll_fn,
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Bytes moved by one read.
const BUFFER: usize = 128 * 1024;

/// Reads in a row before other connections get their turn.
const TURNS: usize = 8;

thread_local! {
    static SCRATCH: RefCell<Box<[u8]>> = RefCell::new(vec![0; BUFFER].into_boxed_slice());
}

/// Moves bytes until both directions have ended.
///
/// # Errors
/// The first error of either stream.
pub async fn relay<A, B>(mut a: A, mut b: B) -> io::Result<()>
where
    A: AsyncRead + AsyncWrite + Unpin,
    B: AsyncRead + AsyncWrite + Unpin,
{
    let mut there = Direction::default();
    let mut back = Direction::default();
    poll_fn(|context| {
        let there = there.poll(context, &mut a, &mut b)?;
        let back = back.poll(context, &mut b, &mut a)?;
        if there.is_ready() && back.is_ready() {
            Poll::Ready(Ok(()))
        } else {
            Poll::Pending
        }
    })
    .await
}

/// One direction's state.
#[derive(Debug, Default)]
struct Direction {
    /// Read and not yet taken by the receiver.
    pending: Vec<u8>,
    /// How much of `pending` was taken.
    taken: usize,
    /// The sender has ended.
    ended: bool,
    /// And the receiver knows.
    shut: bool,
}

impl Direction {
    fn poll(
        &mut self,
        context: &mut Context<'_>,
        from: &mut (impl AsyncRead + Unpin),
        to: &mut (impl AsyncWrite + Unpin),
    ) -> Poll<io::Result<()>> {
        for _ in 0..TURNS {
            if self.shut {
                return Poll::Ready(Ok(()));
            }
            while self.taken < self.pending.len() {
                let rest = &self.pending[self.taken..];
                self.taken += nonzero(ready!(Pin::new(&mut *to).poll_write(context, rest))?)?;
            }
            self.pending = Vec::new();
            self.taken = 0;
            if self.ended {
                ready!(Pin::new(&mut *to).poll_shutdown(context))?;
                self.shut = true;
                return Poll::Ready(Ok(()));
            }
            ready!(SCRATCH.with_borrow_mut(|scratch| self.read_some(context, scratch, from, to)))?;
        }
        // There may be more, but other connections come first.
        context.waker().wake_by_ref();
        Poll::Pending
    }

    /// Reads once and passes on what the receiver takes at once; the rest becomes `pending`.
    fn read_some(
        &mut self,
        context: &mut Context<'_>,
        scratch: &mut [u8],
        from: &mut (impl AsyncRead + Unpin),
        to: &mut (impl AsyncWrite + Unpin),
    ) -> Poll<io::Result<()>> {
        let mut buffer = ReadBuf::new(scratch);
        ready!(Pin::new(from).poll_read(context, &mut buffer))?;
        let mut bytes = buffer.filled();
        self.ended = bytes.is_empty();
        while !bytes.is_empty() {
            match Pin::new(&mut *to).poll_write(context, bytes) {
                Poll::Ready(written) => bytes = &bytes[nonzero(written?)?..],
                Poll::Pending => {
                    self.pending = bytes.to_vec();
                    break;
                }
            }
        }
        Poll::Ready(Ok(()))
    }
}

fn nonzero(written: usize) -> io::Result<usize> {
    if written == 0 {
        Err(io::ErrorKind::WriteZero.into())
    } else {
        Ok(written)
    }
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::UnixStream,
        task::JoinHandle,
    };

    use super::*;

    /// A client and a server with a relay between them.
    fn pair() -> (UnixStream, UnixStream, JoinHandle<io::Result<()>>) {
        let (client, a) = UnixStream::pair().unwrap();
        let (server, b) = UnixStream::pair().unwrap();
        (client, server, tokio::spawn(relay(a, b)))
    }

    #[tokio::test]
    async fn a_client_that_has_ended_its_input_still_gets_the_answer() {
        let (mut client, mut server, relay) = pair();
        client.write_all(b"hi").await.unwrap();
        client.shutdown().await.unwrap();
        let mut input = vec![];
        server.read_to_end(&mut input).await.unwrap();
        assert_eq!(input, b"hi");
        server.write_all(b"answer").await.unwrap();
        drop(server);
        let mut output = vec![];
        client.read_to_end(&mut output).await.unwrap();
        assert_eq!(output, b"answer");
        relay.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_server_that_has_ended_its_output_still_gets_input() {
        let (mut client, mut server, relay) = pair();
        server.shutdown().await.unwrap();
        assert_eq!(client.read(&mut [0; 8]).await.unwrap(), 0);
        client.write_all(b"late").await.unwrap();
        drop(client);
        let mut input = vec![];
        server.read_to_end(&mut input).await.unwrap();
        assert_eq!(input, b"late");
        relay.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn many_bytes_pass_a_slow_receiver_unchanged_both_ways_at_once() {
        let (client, server, relay) = pair();
        let bytes: Vec<u8> = (0..5_000_000u32).flat_map(u32::to_le_bytes).collect();
        let exchange = |stream: UnixStream, bytes: Vec<u8>| async move {
            let (mut reader, mut writer) = stream.into_split();
            let sent = bytes.clone();
            let writing = tokio::spawn(async move { writer.write_all(&sent).await });
            let mut got = vec![];
            let mut piece = [0; 1000];
            while got.len() < bytes.len() {
                let length = reader.read(&mut piece).await.unwrap();
                got.extend_from_slice(&piece[..length]);
                tokio::task::yield_now().await;
            }
            writing.await.unwrap().unwrap();
            assert!(got == bytes);
        };
        tokio::join!(exchange(client, bytes.clone()), exchange(server, bytes));
        relay.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_receiver_that_is_gone_ends_both_sides() {
        let (mut client, server, relay) = pair();
        drop(server);
        // The relay may need a write to notice.
        while client.write_all(b"x").await.is_ok() {
            tokio::task::yield_now().await;
        }
        assert!(relay.await.unwrap().is_err());
    }
}
