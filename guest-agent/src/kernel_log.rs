//! What the kernel said of its own start, by the stamps of its log.
//!
//! The log has a clock of its own, which runs from the kernel's first lines on; CLOCK_BOOTTIME starts later and stands still
//! until the first timer tick, so it stays behind by a constant (a quarter of a second on an emulated processor). A
//! record that is written here and read back tells how far.

use std::{
    fs::OpenOptions,
    io::{self, ErrorKind, Read, Write},
    os::unix::fs::OpenOptionsExt,
};

use libc::{EPIPE, O_NONBLOCK};

use crate::{log::Log, outbox::Outbox, timeline};

/// The longest record that the kernel passes out (its PRINTK_MESSAGE_MAX).
const LONGEST_RECORD: usize = 2048;

/// What begins the last record before PID 1's first instruction.
const INIT_RUNS: &str = "Run /sbin/init as init process";

/// What begins the record of the root file system's mount.
const ROOT_MOUNTED: &str = "VFS: Mounted root";

/// The record by which the clocks are compared.
const MARK: &str = "lighter-agent: comparing the clocks of this log and of the timeline";

/// When the kernel got where, by its log's clock, nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Stamps {
    first_line_ns: Option<i64>,
    root_mounted_ns: Option<i64>,
    init_runs_ns: Option<i64>,
    mark_ns: Option<i64>,
}

impl Stamps {
    /// Takes the next record, as it is read from /dev/kmsg: `priority,sequence,microseconds,flags;text`.
    fn take(&mut self, record: &str) {
        let Some((prefix, text)) = record.split_once(';') else {
            return;
        };
        let stamp = prefix.split(',').nth(2).and_then(|us| us.parse::<i64>().ok());
        let Some(ns) = stamp.map(|us| us.saturating_mul(1000)) else {
            return;
        };
        self.first_line_ns.get_or_insert(ns);
        if text.starts_with(ROOT_MOUNTED) {
            self.root_mounted_ns.get_or_insert(ns);
        } else if text.starts_with(INIT_RUNS) {
            self.init_runs_ns.get_or_insert(ns);
        } else if text.starts_with(MARK) {
            self.mark_ns.get_or_insert(ns);
        }
    }
}

/// Reports the kernel's steps. What its log does not tell is left out.
pub fn report(log: &Log, outbox: &Outbox) {
    let (stamps, marked_ns) = match read() {
        Ok(read) => read,
        Err(error) => return log.warn(format!("cannot compare clocks by /dev/kmsg: {error}")),
    };
    let Some(mark_ns) = stamps.mark_ns else {
        return log.warn("the kernel's log does not keep what is written to it");
    };
    let on_timeline = |ns: i64| ns.saturating_sub(mark_ns).saturating_add(marked_ns);
    if let (Some(first), Some(end)) = (stamps.first_line_ns, stamps.init_runs_ns) {
        timeline::report(outbox, "kernel", on_timeline(first), on_timeline(end));
    }
    if let Some(mounted) = stamps.root_mounted_ns.map(on_timeline) {
        timeline::report(outbox, "root-disk-mounted", mounted, mounted);
    }
}

/// Writes the mark, and reads the log up to it. Returns when on the timeline the mark was written, too.
fn read() -> io::Result<(Stamps, i64)> {
    let mut kmsg = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(O_NONBLOCK)
        .open("/dev/kmsg")?;
    let before_ns = timeline::now_ns();
    // Priority 7, debugging: never on the console.
    kmsg.write_all(format!("<7>{MARK}\n").as_bytes())?;
    let marked_ns = i64::midpoint(before_ns, timeline::now_ns());
    let mut stamps = Stamps::default();
    let mut record = [0; LONGEST_RECORD];
    while stamps.mark_ns.is_none() {
        match kmsg.read(&mut record) {
            Ok(0) => break,
            Ok(length) => stamps.take(&String::from_utf8_lossy(&record[..length])),
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            // Records were overwritten before they were read: the next read goes on after them.
            Err(error) if error.raw_os_error() == Some(EPIPE) => {}
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok((stamps, marked_ns))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_own_stamps_are_found_among_other_records() {
        let mut stamps = Stamps::default();
        for record in [
            "5,0,0,-;Linux version 6.12\n",
            "6,1,0,-;Command line: quiet\n",
            "nonsense",
            "6,x;nonsense",
            "6,7,notanumber,-;VFS: Mounted root",
            "6,90,310000,-;erofs (device vda): mounted\n SUBSYSTEM=block\n",
            "6,91,320000,-;VFS: Mounted root (erofs filesystem) readonly on device 254:0.\n",
            "6,92,330001,-;Run /sbin/init as init process\n",
            "6,93,400000,-;Run /sbin/init as init process\n",
            "6,94,18446744073709551615,-;late\n",
            "15,95,500000,-;lighter-agent: comparing the clocks of this log and of the timeline\n",
        ] {
            stamps.take(record);
        }
        assert_eq!(
            stamps,
            Stamps {
                first_line_ns: Some(0),
                root_mounted_ns: Some(320_000_000),
                init_runs_ns: Some(330_001_000),
                mark_ns: Some(500_000_000),
            }
        );
    }
}
