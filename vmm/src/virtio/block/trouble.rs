//! Errors of the host's file, told to people: once when they begin, not once a request.

use super::operation::StepKind;
use std::io;
use std::time::{Duration, Instant};

/// Trouble of one kind is told again only after so long without it.
const QUIET: Duration = Duration::from_secs(60);

/// What went wrong, and when it last did.
#[derive(Debug, Default)]
pub(super) struct Troubles {
    seen: Vec<(StepKind, Option<i32>, Instant)>,
}

impl Troubles {
    /// Notes an error; what to tell if it is news. There are few kinds of errors, so the list stays short.
    pub(super) fn note(&mut self, step: StepKind, error: &io::Error, now: Instant) -> Option<String> {
        let code = error.raw_os_error();
        let known = self
            .seen
            .iter_mut()
            .find(|(kind, c, _)| (*kind, *c) == (step, code));
        let news = match known {
            Some((.., last)) => now.duration_since(std::mem::replace(last, now)) >= QUIET,
            None => {
                self.seen.push((step, code, now));
                true
            }
        };
        news.then(|| describe(step, error))
    }
}

fn describe(step: StepKind, error: &io::Error) -> String {
    let verb = step.verb();
    match error.raw_os_error() {
        Some(libc::ENOSPC | libc::EDQUOT) => format!(
            "the host's disk is full: cannot {verb} ({error}); the guest sees I/O errors until space is freed on the host"
        ),
        Some(libc::EFBIG) => format!(
            "the host's limit on file sizes is reached: cannot {verb} ({error}); the guest sees I/O errors until it is raised"
        ),
        _ if error.kind() == io::ErrorKind::UnexpectedEof => {
            format!("the host's file was cut short while in use: cannot {verb}; the guest sees I/O errors")
        }
        _ if step == StepKind::Sync => format!(
            "the host cannot {verb} its file ({error}) and may have lost data; the guest's flushes fail until the VM is started anew"
        ),
        _ => format!("the host cannot {verb} its file ({error}); the guest sees I/O errors"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lasting_trouble_is_told_once_and_returning_trouble_again() {
        let mut troubles = Troubles::default();
        let full = io::Error::from_raw_os_error(libc::ENOSPC);
        let start = Instant::now();
        let told = troubles.note(StepKind::Write, &full, start).unwrap();
        assert!(
            told.starts_with("the host's disk is full: cannot write"),
            "{told}"
        );
        // An error every 30 seconds for an hour is one trouble.
        for half_minute in 1..120 {
            let now = start + Duration::from_secs(30 * half_minute);
            assert_eq!(troubles.note(StepKind::Write, &full, now), None);
        }
        let broken = io::Error::from_raw_os_error(libc::EIO);
        let later = start + Duration::from_secs(3600);
        assert!(troubles.note(StepKind::Write, &broken, later).is_some());
        assert!(troubles.note(StepKind::Sync, &full, later).is_some());
        let much_later = later + Duration::from_secs(120);
        assert!(troubles.note(StepKind::Write, &full, much_later).is_some());
    }
}
