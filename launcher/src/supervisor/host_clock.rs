//! Jumps of the host's clock: the host slept, in which time its guests stood still, or somebody has set the clock.

use rustix::io::Errno;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};
use std::io;
use std::os::fd::OwnedFd;
use tokio::io::unix::AsyncFd;

/// When the timer would go off: in the year 2200.
const NEVER: Timespec = Timespec {
    tv_sec: 7_258_118_400,
    tv_nsec: 0,
};

/// A timer that the kernel cancels when the clock jumps, which it tells (timerfd_create(2)).
#[derive(Debug)]
pub struct Jumps(AsyncFd<OwnedFd>);

impl Jumps {
    /// Those from now on.
    ///
    /// # Errors
    /// From the system.
    pub fn new() -> io::Result<Self> {
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        let timer = timerfd_create(TimerfdClockId::Realtime, flags)?;
        arm(&timer)?;
        // SAFETY: an owned descriptor stays open and the same until the registration is dropped.
        Ok(Self(unsafe { AsyncFd::register(timer) }?))
    }

    /// Waits for the next.
    pub async fn next(&self) {
        loop {
            let Ok(mut ready) = self.0.readable().await else {
                return std::future::pending().await;
            };
            let mut expirations = [0; 8];
            match rustix::io::read(self.0.get_ref(), &mut expirations) {
                Err(Errno::AGAIN) => ready.clear_ready(),
                Err(Errno::INTR) => {}
                // Armed anew, it tells of the next.
                Err(Errno::CANCELED) => {
                    if arm(self.0.get_ref()).is_ok() {
                        return;
                    }
                    return std::future::pending().await;
                }
                Err(_) | Ok(_) => return std::future::pending().await,
            }
        }
    }
}

fn arm(timer: &OwnedFd) -> io::Result<()> {
    let flags = TimerfdTimerFlags::ABSTIME | TimerfdTimerFlags::CANCEL_ON_SET;
    let never = Itimerspec {
        it_interval: Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        },
        it_value: NEVER,
    };
    timerfd_settime(timer, flags, &never)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[tokio::test]
    async fn a_clock_that_goes_on_does_not_jump() {
        let jumps = Jumps::new().unwrap();
        let jump = tokio::time::timeout(Duration::from_millis(30), jumps.next()).await;
        assert!(jump.is_err());
    }
}
