//! The workloads of `lighter bench api`, `fs` and `net`, and the clock beside them.
//!
//! The same code runs at both ends of Lighter's way: in `lighter` on the host, and in the guest as a mode of the agent's program.
//! What the two measure differs by that way alone. Only samples are made here; what is said of them is the launcher's.
//!
//! - [`http`]: a client of HTTP/1.1 that believes the other end nothing
//! - [`image`]: the image that is loaded and saved
//! - [`requests`]: what is measured of the engine's API
//! - [`files`]: what is measured of a folder
//! - [`net`]: what is measured of a network, with the server for it
//! - [`work`]: an amount, and the time that it took
//! - [`task`]: how the agent's program is told what to measure
//! - [`tar`]: archives for the engine
//!
//! Of the standard library but for the messages: the agent stays small.

pub mod files;
pub mod http;
pub mod image;
pub mod net;
pub mod requests;
pub mod tar;
pub mod task;
pub mod work;
