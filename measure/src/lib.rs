//! The requests of `lighter bench api`, and the clock beside them.
//!
//! The same code runs at both ends of Lighter's way: in `lighter` on the VM's socket on the host, and in the guest, as a
//! mode of the agent's program, on dockerd's own. What the two measure differs by that way alone. Only samples are made
//! here; what is said of them is the launcher's.
//!
//! - [`http`]: a client of HTTP/1.1 that believes the other end nothing
//! - [`image`]: the image that is loaded and saved
//! - [`requests`]: what is measured
//! - [`tar`]: archives for the engine
//!
//! Of the standard library but for the messages: the agent stays small.

pub mod http;
pub mod image;
pub mod requests;
pub mod tar;

/// The argument that makes the agent's program measure; a [`requests::Plan`] as JSON follows. It prints
/// [`requests::Samples`] as JSON.
pub const VERB: &str = "measure-api";
