//! The serial console: a 16550A that writes the guest's messages to a log file of bounded size.

use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use vm_superio::serial::NoEvents;
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

/// Raises the console's interrupt line.
#[derive(Debug)]
struct Line(EventFd);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// The console's registers. Nothing is ever typed on it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialState {
    divisor: [u8; 2],
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
}

/// The console device.
pub struct SerialConsole {
    uart: Serial<Line, NoEvents, Log>,
}

impl SerialConsole {
    /// A console that raises `line` and writes to `log`, or nowhere.
    pub fn new(line: EventFd, log: Option<CappedLog>) -> Self {
        Self {
            uart: Serial::new(
                Line(line),
                Log {
                    file: log,
                    line: vec![],
                },
            ),
        }
    }

    /// The registers.
    pub fn save(&self) -> SerialState {
        let state = self.uart.state();
        SerialState {
            divisor: [state.baud_divisor_low, state.baud_divisor_high],
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
        }
    }

    /// A console with the registers of a saved one; the rest as for [`Self::new`].
    ///
    /// # Errors
    /// When the line cannot be raised, which a console does that was about to.
    pub fn restore(state: &SerialState, line: EventFd, log: Option<CappedLog>) -> io::Result<Self> {
        let state = vm_superio::SerialState {
            baud_divisor_low: state.divisor[0],
            baud_divisor_high: state.divisor[1],
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: vec![],
        };
        let log = Log {
            file: log,
            line: vec![],
        };
        let uart = Serial::from_state(&state, Line(line), NoEvents, log);
        let uart = uart.map_err(|error| io::Error::other(format!("{error:?}")))?;
        Ok(Self { uart })
    }

    /// Reads a register, 0 to 7.
    pub fn read(&mut self, register: u8) -> u8 {
        self.uart.read(register)
    }

    /// Writes a register, 0 to 7.
    pub fn write(&mut self, register: u8, value: u8) {
        // Fails only when the log cannot be written or the line be raised; neither may disturb the guest.
        let _ = self.uart.write(register, value);
    }

    /// Writes out a line that has no end yet.
    pub fn flush(&mut self) {
        self.uart.writer_mut().write_out();
    }
}

/// Collects bytes to lines: the guest writes one byte at a time, the file should not be.
struct Log {
    file: Option<CappedLog>,
    line: Vec<u8>,
}

/// A line is written out when it is this long, ended or not.
const LONGEST_LINE: usize = 1024;

impl Log {
    fn write_out(&mut self) {
        if let Some(file) = &mut self.file {
            // A full disk loses console output; the console is no place to report that.
            let _ = file.append(&self.line);
        }
        self.line.clear();
    }
}

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.line.extend_from_slice(bytes);
        if bytes.ends_with(b"\n") || self.line.len() >= LONGEST_LINE {
            self.write_out();
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A file that is appended to and never grows beyond a limit: when it is full, its newer half is kept.
#[derive(Debug)]
pub struct CappedLog {
    file: File,
    length: u64,
    limit: u64,
}

impl CappedLog {
    /// Appends to `file`, which must be readable too; `limit` in bytes, at least 8 KiB.
    ///
    /// # Errors
    /// When the file's length cannot be read.
    pub fn new(mut file: File, limit: u64) -> io::Result<Self> {
        let length = file.seek(SeekFrom::End(0))?;
        Ok(Self {
            file,
            length,
            limit: limit.max(8 << 10),
        })
    }

    /// Adds bytes at the end.
    ///
    /// # Errors
    /// When the file cannot be written, read or cut.
    pub fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.length.saturating_add(bytes.len() as u64) > self.limit {
            self.keep_newer_half()?;
        }
        self.file.write_all(bytes)?;
        self.length += bytes.len() as u64;
        Ok(())
    }

    fn keep_newer_half(&mut self) -> io::Result<()> {
        let mut newer = vec![];
        self.file
            .seek(SeekFrom::Start(self.length.saturating_sub(self.limit / 2)))?;
        (&self.file).take(self.limit).read_to_end(&mut newer)?;
        let whole_lines = newer
            .iter()
            .position(|byte| *byte == b'\n')
            .map_or(0, |end| end + 1);
        self.file.set_len(0)?;
        self.file.seek(SeekFrom::Start(0))?;
        self.file.write_all(&newer[whole_lines..])?;
        self.length = (newer.len() - whole_lines) as u64;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    fn contents(file: &File) -> String {
        let mut text = String::new();
        let mut file = file;
        file.seek(SeekFrom::Start(0)).unwrap();
        file.read_to_string(&mut text).unwrap();
        text
    }

    #[test]
    fn what_the_guest_writes_arrives_line_by_line() {
        let file = tempfile::tempfile().unwrap();
        let log = CappedLog::new(file.try_clone().unwrap(), 1 << 20).unwrap();
        let mut console = SerialConsole::new(EventFd::new(EFD_NONBLOCK).unwrap(), Some(log));
        for byte in b"hello\nwor" {
            console.write(0, *byte);
        }
        assert_eq!(contents(&file), "hello\n");
        console.flush();
        assert_eq!(contents(&file), "hello\nwor");
    }

    #[test]
    fn a_flooding_guest_does_not_fill_the_disk_and_the_newest_lines_stay() {
        let file = tempfile::tempfile().unwrap();
        let mut log = CappedLog::new(file.try_clone().unwrap(), 8 << 10).unwrap();
        for number in 0..10_000 {
            log.append(format!("line {number}\n").as_bytes()).unwrap();
            assert!(file.metadata().unwrap().len() <= 8 << 10);
        }
        let text = contents(&file);
        assert!(text.ends_with("line 9998\nline 9999\n"));
        assert!(text.starts_with("line "));
    }
}
