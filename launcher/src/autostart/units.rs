//! The units of a VM (systemd.unit(5), systemd.service(5), systemd.socket(5)).

use super::{When, service, socket};
use crate::boot::START_TIMEOUT;
use crate::error::{Code, Context, Error, Result};
use crate::supervisor::STOP_TIMEOUT;
use crate::vm::Vm;
use std::path::Path;

/// What a start depends on, of the environment of whoever enables it: systemd's own is another.
const KEPT: [&str; 8] = [
    "PATH",
    "LIGHTER_HOME",
    "LIGHTER_KERNEL",
    "LIGHTER_IMAGE",
    "LIGHTER_VMM",
    "XDG_CONFIG_HOME",
    "XDG_DATA_HOME",
    "SSL_CERT_FILE",
];

/// What a stop may take beyond the guest's own time, seconds: the supervisor tells the monitor, and kills it, before systemd does.
const STOP_SLACK: u64 = 90;

/// The units of one VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Units {
    service: String,
    socket: Option<String>,
}

impl Units {
    /// Those of `vm`; `variable` is the environment.
    ///
    /// # Errors
    /// When a path cannot be written in a unit.
    pub fn of(vm: &Vm, when: When, variable: impl Fn(&str) -> Option<String>) -> Result<Self> {
        let program = std::env::current_exe().context(|| "cannot find this program".into())?;
        Self::new(vm, when, &program, variable)
    }

    fn new(vm: &Vm, when: When, program: &Path, variable: impl Fn(&str) -> Option<String>) -> Result<Self> {
        let listen = specifiers(text(&vm.paths.docker_socket())?);
        Ok(Self {
            service: service_text(vm, when, text(program)?, variable),
            socket: (when == When::Demand).then(|| socket_text(vm, &listen)),
        })
    }

    /// Their names and texts.
    pub fn files(&self, vm: &Vm) -> Vec<(String, &str)> {
        let socket = self.socket.as_deref().map(|text| (socket(vm), text));
        [(service(vm), self.service.as_str())]
            .into_iter()
            .chain(socket)
            .collect()
    }
}

/// The line by which a unit of `vm` is known.
pub fn mark(vm: &Vm) -> String {
    format!(
        "# Written by `lighter autostart` for the VM in {}.",
        vm.paths.data.display()
    )
}

fn text(path: &Path) -> Result<&str> {
    let text = path.to_str().filter(|text| !text.contains(char::is_control));
    text.ok_or_else(|| {
        let error = format!(
            "the path {} cannot be written in a unit of systemd",
            path.display()
        );
        Error::new(Code::Usage, error).hint("choose one that is text without line breaks")
    })
}

fn service_text(vm: &Vm, when: When, program: &str, variable: impl Fn(&str) -> Option<String>) -> String {
    let kept = KEPT.iter().filter_map(|name| {
        let value = variable(name).filter(|value| !value.is_empty() && !value.contains(char::is_control))?;
        Some(format!("Environment={}\n", quoted(&format!("{name}={value}"))))
    });
    let (with, install) = match when {
        When::Session => (String::new(), "\n[Install]\nWantedBy=default.target\n"),
        When::Demand => (format!("Wants={0}\nAfter={0}\n", socket(vm)), ""),
    };
    format!(
        "{mark}
[Unit]
Description=Docker engine of the Lighter VM {name}
{with}StartLimitIntervalSec=600
StartLimitBurst=5

[Service]
Type=notify
ExecStart={program} supervise --service {name}
{environment}WorkingDirectory=/
# Only the supervisor is told to stop: it shuts the guest down, and the others end with it.
KillMode=mixed
TimeoutStartSec={start}
TimeoutStopSec={stop}
# A VM that has served and crashed; one that does not start at all (3) would not the next time either.
Restart=on-failure
RestartSec=2
RestartPreventExitStatus=2 3 4
{install}",
        mark = mark(vm),
        name = vm.name,
        program = quoted(program),
        environment = kept.collect::<String>(),
        start = START_TIMEOUT.as_secs(),
        stop = STOP_TIMEOUT.as_secs() + STOP_SLACK,
    )
}

fn socket_text(vm: &Vm, listen: &str) -> String {
    format!(
        "{mark}
[Unit]
Description=Docker socket of the Lighter VM {name}

[Socket]
ListenStream={listen}
SocketMode=0600
DirectoryMode=0700

[Install]
WantedBy=sockets.target
",
        mark = mark(vm),
        name = vm.name,
    )
}

/// As one word, in which nothing is replaced.
fn quoted(text: &str) -> String {
    let escaped = text.replace('\\', r"\\").replace('"', "\\\"");
    format!("\"{}\"", specifiers(&escaped))
}

fn specifiers(text: &str) -> String {
    text.replace('%', "%%")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::paths::Paths;
    use crate::vm::testing::settings;
    use std::process::Command;

    fn vm(home: &Path) -> Vm {
        let name = "web".parse().unwrap();
        Vm {
            paths: Paths::at(home).vm(&name),
            name,
            settings: settings(1 << 20),
        }
    }

    fn variable(name: &str) -> Option<String> {
        match name {
            "PATH" => Some("/usr/bin:/home/u/100%/bin".into()),
            "LIGHTER_HOME" => Some("/home/u/a \"b\"\\c".into()),
            "LIGHTER_IMAGE" => Some("two\nlines".into()),
            _ => None,
        }
    }

    #[test]
    fn a_vm_of_the_session_is_one_service_that_is_wanted() {
        let vm = vm(Path::new("/h"));
        let units = Units::new(&vm, When::Session, Path::new("/usr/bin/lighter"), variable).unwrap();
        let files = units.files(&vm);
        let [(name, text)] = &files[..] else {
            panic!("{files:?}");
        };
        assert_eq!(name, "lighter-web.service");
        for line in [
            &*mark(&vm),
            "Type=notify",
            "ExecStart=\"/usr/bin/lighter\" supervise --service web",
            "Environment=\"PATH=/usr/bin:/home/u/100%%/bin\"",
            r#"Environment="LIGHTER_HOME=/home/u/a \"b\"\\c""#,
            "KillMode=mixed",
            "TimeoutStopSec=210",
            "WantedBy=default.target",
        ] {
            assert!(
                text.lines().any(|found| found == line),
                "{line:?} is not in {text}"
            );
        }
        assert!(!text.contains("lines") && !text.contains(".socket"), "{text}");
    }

    #[test]
    fn a_vm_on_demand_is_wanted_by_its_socket_alone() {
        let vm = vm(Path::new("/h/50%"));
        let units = Units::new(&vm, When::Demand, Path::new("/o p/$x/lighter"), variable).unwrap();
        let files = units.files(&vm);
        let [(_, service), (name, socket)] = &files[..] else {
            panic!("{files:?}");
        };
        assert_eq!(name, "lighter-web.socket");
        assert!(
            service.contains("ExecStart=\"/o p/$x/lighter\" supervise"),
            "{service}"
        );
        assert!(service.contains("Wants=lighter-web.socket\nAfter=lighter-web.socket\n"));
        assert!(!service.contains("WantedBy"), "{service}");
        assert!(socket.contains("ListenStream=/h/50%%/run/web/docker.sock\nSocketMode=0600\n"));
        assert!(socket.contains("WantedBy=sockets.target"), "{socket}");
    }

    #[test]
    fn a_path_with_a_line_break_is_refused() {
        let vm = vm(Path::new("/h\nExecStart=/bin/sh"));
        let error = Units::new(&vm, When::Demand, Path::new("/x"), variable).unwrap_err();
        assert!(error.message.contains("cannot be written"), "{error}");
    }

    /// By systemd itself, where it is.
    #[test]
    fn systemd_understands_them() {
        let folder = tempfile::tempdir().unwrap();
        let vm = vm(folder.path());
        let program = folder.path().join("lighter a$b");
        std::fs::copy("/bin/true", &program).unwrap();
        let units = Units::new(&vm, When::Demand, &program, variable).unwrap();
        let mut command = Command::new("systemd-analyze");
        command.args(["verify", "--user", "--man=no", "--recursive-errors=no"]);
        for (name, text) in units.files(&vm) {
            let path = folder.path().join(name);
            std::fs::write(&path, text).unwrap();
            command.arg(path);
        }
        let command = command.env("XDG_RUNTIME_DIR", folder.path());
        let output = match command.output() {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return,
            output => output.unwrap(),
        };
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && !said.contains("lighter-web"), "{said}");
    }
}
