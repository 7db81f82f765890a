//! What moves between two sockets, for both ends of a vsock connection.
//!
//! - [`listen`]: sockets that wait for clients.
//! - [`streams`]: a TCP listener whose clients are each joined to a stream.
//! - [`flows`]: a UDP socket whose clients each get a stream of their own.
//! - [`datagram`]: datagrams on a stream.
//! - [`relay`]: bytes both ways between two streams.

use std::sync::Arc;

use tokio::sync::Semaphore;

pub mod datagram;
pub mod flows;
pub mod listen;
mod relay;
pub mod streams;

pub use relay::relay;

/// How many clients there may be.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Of one socket.
    pub clients: usize,
    /// Places that sockets share; each client takes one.
    pub places: Arc<Semaphore>,
}
