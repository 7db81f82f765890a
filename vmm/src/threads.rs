//! How the monitor's threads are made.

use std::thread::Builder;

/// Bytes of a thread's stack. The default, 2 MiB, can become one large page that is resident from the first use on.
const STACK: usize = 256 << 10;

/// A thread to be spawned. The host shows the first 15 bytes of `name`.
pub fn builder(name: &str) -> Builder {
    Builder::new().name(name.to_owned()).stack_size(STACK)
}
