//! The whole device, driven through real virtqueues in guest memory and real sockets of the host.

mod close;
mod connect;
mod flow;
mod guest;
mod guest_socket;
mod host;
mod hostile;
mod lifecycle;
mod restore;
