//! /var/run/docker.sock: where programs look for an engine when nobody tells them of another. It is root's to make, so Lighter only
//! says how, and looks whether it is as the configuration wants it.

use crate::config::Config;
use crate::paths::Paths;
use crate::shell::quoted;
use std::path::{Path, PathBuf};

/// Where programs look.
pub const LINK: &str = "/var/run/docker.sock";

/// Who has it.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Found {
    Nothing,
    Ours,
    LinkTo(PathBuf),
    /// A socket, most likely of an engine of the host's.
    Another,
}

fn look(link: &Path, ours: &Path) -> Found {
    match std::fs::read_link(link) {
        Ok(target) if target == ours => Found::Ours,
        Ok(target) => Found::LinkTo(target),
        Err(_) if link.symlink_metadata().is_ok() => Found::Another,
        Err(_) => Found::Nothing,
    }
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ToDo {
    /// What is not as it should be.
    pub why: String,
    /// What the user is to run.
    pub command: String,
}

/// Whether the default VM's engine is there, and wanted to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// It is neither.
    Unused,
    /// It is both, by a link to this socket.
    Linked(PathBuf),
    /// One of the two.
    Wrong(ToDo),
}

/// Looks at [`LINK`].
pub fn state(paths: &Paths, config: &Config) -> State {
    let ours = match "default".parse() {
        Ok(name) => paths.vm(&name).docker_socket(),
        Err(_) => return State::Unused,
    };
    state_of(Path::new(LINK), &ours, config.default_socket)
}

fn state_of(link: &Path, ours: &Path, wanted: bool) -> State {
    let (target, place) = (quoted(&ours.to_string_lossy()), link.display());
    let make = |options| format!("sudo ln {options} {target} {place}");
    let (why, command) = match (look(link, ours), wanted) {
        (Found::Ours, true) => return State::Linked(ours.into()),
        (Found::Ours, false) => (
            format!("{place} leads to the default VM"),
            format!("sudo rm {place}"),
        ),
        (_, false) => return State::Unused,
        // Without -f: what others have put there meanwhile stays.
        (Found::Nothing, true) => (format!("{place} is not there"), make("-s")),
        (Found::LinkTo(other), true) => (
            format!("{place} leads to {}, and will not any more", other.display()),
            make("-sfn"),
        ),
        (Found::Another, true) => (
            format!(
                "{place} is the socket of another engine, which has to go first; this fails until it has"
            ),
            make("-s"),
        ),
    };
    State::Wrong(ToDo { why, command })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;
    use std::os::unix::net::UnixListener;

    fn command(state: State) -> String {
        match state {
            State::Wrong(todo) => todo
                .command
                .replace(['\'', '/'], " ")
                .split_whitespace()
                .take(3)
                .collect::<Vec<_>>()
                .join(" "),
            other => format!("{other:?}").chars().take(6).collect(),
        }
    }

    #[test]
    fn the_command_makes_the_link_and_never_takes_a_socket_away() {
        let folder = tempfile::tempdir().unwrap();
        let (link, ours) = (folder.path().join("docker.sock"), folder.path().join("ours"));
        let state = |wanted| command(state_of(&link, &ours, wanted));
        assert_eq!([state(true), state(false)], ["sudo ln -s", "Unused"]);
        symlink(&ours, &link).unwrap();
        assert_eq!(state(true), "Linked");
        assert!(state(false).starts_with("sudo rm "));
        std::fs::remove_file(&link).unwrap();
        symlink("/elsewhere", &link).unwrap();
        assert_eq!([state(true), state(false)], ["sudo ln -sfn", "Unused"]);
        std::fs::remove_file(&link).unwrap();
        let _engine = UnixListener::bind(&link).unwrap();
        assert_eq!([state(true), state(false)], ["sudo ln -s", "Unused"]);
    }

    #[test]
    fn a_path_with_spaces_is_one_word() {
        let State::Wrong(todo) = state_of(Path::new("/nonexistent/d.sock"), Path::new("/a b/d.sock"), true)
        else {
            panic!("nothing to do");
        };
        assert_eq!(todo.command, "sudo ln -s '/a b/d.sock' /nonexistent/d.sock");
    }
}
