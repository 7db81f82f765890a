//! The user's systemd, by its own `systemctl`.

use crate::error::{Code, Error};
use std::io;
use std::path::PathBuf;
use std::process::{Command, Stdio};

/// Why systemd has not done something.
#[derive(Debug, thiserror::Error)]
pub enum SystemdError {
    /// There is no such program.
    #[error("cannot run systemctl")]
    NoProgram(#[source] io::Error),
    /// Nobody answers it.
    #[error("the user's systemd does not answer: {0}")]
    Unreachable(String),
    /// It was not done.
    #[error("systemctl --user {command} failed: {said}")]
    Failed {
        /// What was to be done.
        command: String,
        /// What it said.
        said: String,
    },
    /// No folder for units of the user's.
    #[error("the user's systemd names no folder of the user's for units: {0}")]
    NoFolder(String),
}

impl From<SystemdError> for Error {
    fn from(error: SystemdError) -> Self {
        Self::of(Code::Failure, &error).hint(match error {
            SystemdError::NoProgram(_) => {
                "autostart is done by systemd; on a host without it, have a login script run lighter start"
            }
            SystemdError::Unreachable(_) => {
                "log in as this user (by ssh, at the console or by machinectl shell; su and sudo start no systemd for it), \
                 or have it always run: sudo loginctl enable-linger USER, with XDG_RUNTIME_DIR=/run/user/UID set"
            }
            SystemdError::Failed { .. } | SystemdError::NoFolder(_) => {
                "journalctl --user and systemctl --user status tell more"
            }
        })
    }
}

/// Runs `systemctl --user` and returns what it prints.
///
/// # Errors
/// When it does not succeed.
pub fn run(arguments: &[&str]) -> Result<String, SystemdError> {
    let output = Command::new("systemctl")
        .args(["--user", "--no-ask-password", "--quiet"])
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .map_err(SystemdError::NoProgram)?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().replace('\n', " ");
    let said = text(&output.stderr);
    if output.status.success() {
        Ok(text(&output.stdout))
    } else if said.contains("connect to bus") || said.contains("has not been booted with systemd") {
        Err(SystemdError::Unreachable(said))
    } else {
        let command = arguments.join(" ");
        let said = match said.as_str() {
            "" => output.status.to_string(),
            _ => said,
        };
        Err(SystemdError::Failed { command, said })
    }
}

/// Where the user's systemd looks for units that the user has made.
///
/// # Errors
/// When it does not answer.
pub fn unit_folder() -> Result<PathBuf, SystemdError> {
    let all = run(&["show", "--property=UnitPath", "--value"])?;
    users_own(&all).ok_or(SystemdError::NoFolder(all))
}

/// The first folder of `all` that lasts: `XDG_CONFIG_HOME` of systemd's, which need not be this process's, is in it. Before it are those of
/// `systemctl edit` and what goes with the session.
fn users_own(all: &str) -> Option<PathBuf> {
    let lasting = |folder: &&str| folder.ends_with("/systemd/user") && !folder.starts_with("/run/");
    let systems = ["/etc/", "/usr/"];
    let first = all.split(' ').find(lasting)?;
    (!systems.iter().any(|system| first.starts_with(system))).then(|| first.into())
}

/// Whether the user's systemd runs without a session, from the host's start on.
pub fn lingers() -> bool {
    let uid = rustix::process::getuid().as_raw().to_string();
    let output = Command::new("loginctl")
        .args(["show-user", &uid, "--property=Linger", "--value"])
        .stdin(Stdio::null())
        .output();
    output.is_ok_and(|output| output.stdout.trim_ascii() == b"yes")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_go_where_the_users_own_are() {
        let all = "/home/u/.config/systemd/user.control /run/user/1/systemd/user.control /run/user/1/systemd/transient \
                   /run/user/1/systemd/generator.early /home/u/.config/systemd/user /etc/xdg/systemd/user \
                   /etc/systemd/user /usr/lib/systemd/user";
        assert_eq!(users_own(all), Some("/home/u/.config/systemd/user".into()));
        assert_eq!(users_own("/run/systemd/user /etc/systemd/user"), None);
        assert_eq!(users_own(""), None);
    }
}
