//! The program with a home of its own.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// A folder that is the user's whole world.
pub struct World {
    pub home: tempfile::TempDir,
}

impl Drop for World {
    /// A test that failed leaves no VM behind.
    fn drop(&mut self) {
        for vm in std::fs::read_dir(self.path("vms"))
            .into_iter()
            .flatten()
            .flatten()
        {
            if let Some(name) = vm.file_name().to_str().filter(|name| !name.starts_with('.')) {
                let _ = self.command(&["rm", "--force", name]).output();
            }
        }
    }
}

/// What a run of the program gave.
pub struct Ran {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl World {
    pub fn new() -> Self {
        Self {
            home: tempfile::tempdir().unwrap(),
        }
    }

    pub fn path(&self, below: &str) -> PathBuf {
        self.home.path().join(below)
    }

    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lighter"));
        command
            .args(arguments)
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap())
            .env("HOME", self.home.path())
            .env("LIGHTER_HOME", self.home.path())
            .stdin(Stdio::null());
        command
    }

    pub fn run(&self, arguments: &[&str]) -> Ran {
        ran(self.command(arguments).output().unwrap())
    }

    /// Runs it and expects success without a word on standard error.
    pub fn ok(&self, arguments: &[&str]) -> String {
        let ran = self.run(arguments);
        assert_eq!(
            (ran.code, ran.stderr.as_str()),
            (0, ""),
            "lighter {arguments:?}: {}",
            ran.stdout
        );
        ran.stdout
    }

    /// Runs it and expects a failure of `code` whose text has all of `words`.
    pub fn fails(&self, arguments: &[&str], code: i32, words: &[&str]) {
        expect(&self.run(arguments), code, words, arguments);
    }

    pub fn json(&self, arguments: &[&str]) -> serde_json::Value {
        serde_json::from_str(&self.ok(arguments)).unwrap()
    }
}

pub fn ran(output: Output) -> Ran {
    Ran {
        code: output.status.code().expect("lighter ends by itself"),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

#[track_caller]
pub fn expect(ran: &Ran, code: i32, words: &[&str], arguments: &[&str]) {
    assert_eq!(
        ran.code, code,
        "lighter {arguments:?}: {}{}",
        ran.stdout, ran.stderr
    );
    for word in words {
        assert!(
            ran.stderr.contains(word),
            "lighter {arguments:?} does not say {word:?}: {}",
            ran.stderr
        );
    }
}

/// Everything below `folder`, to see that nothing was left.
pub fn tree(folder: &Path) -> Vec<PathBuf> {
    let mut found = vec![];
    for entry in std::fs::read_dir(folder).into_iter().flatten() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(tree(&path));
        }
        found.push(path);
    }
    found.sort();
    found
}
