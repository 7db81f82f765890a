//! Children that do not outlive this process, however it ends.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

/// Has the process of `command` killed when its parent ends. Start it from the main thread: the kernel takes the end of
/// the thread that started it for the parent's.
pub fn die_with_parent(command: &mut Command) {
    let parent = rustix::process::getpid();
    let ask = move || {
        rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
        // A parent that died before this line sends no signal.
        match rustix::process::getppid() {
            Some(current) if current == parent => Ok(()),
            _ => Err(io::Error::from(rustix::io::Errno::SRCH)),
        }
    };
    // SAFETY: between fork and exec the closure makes two system calls and allocates nothing.
    unsafe { command.pre_exec(ask) };
}
