//! The monitor as a supervisor starts it, with a guest of a few instructions: for its own tests and benchmarks.

mod kernel;
mod process;
mod vm;

pub use kernel::Kernel;
pub use vm::{CONSOLE_BYTES, Lines, Setup, Vm, run_with_stdin};
