//! vsock ports. The host is always CID 2; a guest's CID is [`GUEST_CID`], since routing is by the monitor's sockets.

/// The guest's context identifier. The same in every VM: each monitor has its own sockets.
pub const GUEST_CID: u64 = 3;

/// Host side: the agent connects here once, when it starts, and keeps the connection ([`crate::agent`]).
pub const HOST_CONTROL: u32 = 1024;

/// Host side: questions about names ([`crate::names`]).
pub const HOST_NAMES: u32 = 53;

/// Host side: one connection for each published port ([`crate::publish`]).
pub const HOST_PUBLISH: u32 = 1026;

/// Guest side: raw bytes of the Docker Engine API, one connection for each client connection.
pub const GUEST_DOCKER: u32 = 2375;

/// Guest side: one connection for each command ([`crate::exec`]).
pub const GUEST_EXEC: u32 = 1025;
