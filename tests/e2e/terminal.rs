//! Terminals: a user in front of a pseudo-terminal, with a window that changes its size.

use super::Test;
use super::world::{shared, until, with_shared_home};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};
use std::sync::{Arc, Mutex};

pub const TESTS: &[Test] = &[
    (
        "a_container_has_a_terminal_that_follows_the_window",
        container_terminal,
    ),
    (
        "a_shell_in_the_vm_has_a_terminal_that_follows_the_window",
        vm_terminal,
    ),
];

/// A program on a terminal of its own.
struct Screen {
    master: File,
    shown: Arc<Mutex<String>>,
    child: Child,
}

impl Screen {
    fn start(mut command: Command) -> Self {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).expect("a terminal");
        grantpt(&master).expect("a terminal");
        unlockpt(&master).expect("a terminal");
        let name = ptsname(&master, vec![])
            .expect("a terminal")
            .into_string()
            .expect("a name");
        set_size(&master, 24, 80);
        // Or it would become this process's own, and could not be the program's.
        let no_controlling_terminal = rustix::fs::OFlags::NOCTTY.bits().cast_signed();
        let open = || {
            File::options()
                .read(true)
                .write(true)
                .custom_flags(no_controlling_terminal)
                .open(&name)
                .expect("open the terminal")
        };
        command.stdin(open()).stdout(open()).stderr(open());
        // SAFETY: both calls are allowed between fork and exec.
        unsafe {
            command.pre_exec(|| {
                rustix::process::setsid()?;
                rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())?;
                Ok(())
            });
        }
        let child = command.spawn().expect("start the program");
        drop(command);
        let master = File::from(master);
        let shown = Arc::<Mutex<String>>::default();
        let (mut from, to) = (master.try_clone().expect("clone"), shown.clone());
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            // The terminal ends with EIO when the program is gone.
            while let Ok(count @ 1..) = from.read(&mut bytes) {
                to.lock()
                    .expect("not poisoned")
                    .push_str(&String::from_utf8_lossy(&bytes[..count]));
            }
        });
        Self { master, shown, child }
    }

    fn type_line(&mut self, line: &str) {
        self.master
            .write_all(format!("{line}\r").as_bytes())
            .expect("type");
    }

    fn wait_for(&self, text: &str) {
        until(&format!("{text:?} on the screen"), || {
            self.shown
                .lock()
                .expect("not poisoned")
                .contains(text)
                .then_some(())
        });
    }

    /// Asks the shell on it for the size until it is this one: a resize takes its time to arrive.
    fn wait_for_size(&mut self, size: &str) {
        self.type_line(&format!(
            "until [ \"$(stty size)\" = '{size}' ]; do sleep 0.1; done; echo size is $(stty size)"
        ));
        self.wait_for(&format!("size is {size}"));
    }

    fn end(mut self) -> i32 {
        self.type_line("exit 6");
        self.child.wait().expect("wait").code().expect("a code")
    }
}

fn set_size(master: &OwnedFd, rows: u16, columns: u16) {
    let size = Winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    tcsetwinsize(master, size).expect("set the size");
}

fn try_terminal(command: Command) {
    let mut screen = Screen::start(command);
    screen.wait_for_size("24 80");
    set_size(&screen.master.try_clone().expect("clone").into(), 50, 132);
    screen.wait_for_size("50 132");
    assert_eq!(screen.end(), 6);
}

fn container_terminal() {
    try_terminal(shared().command(&["run", "-it", "--rm", "busybox", "sh"]));
}

fn vm_terminal() {
    try_terminal(with_shared_home(|home| home.lighter(&["shell", "shared"])));
}
