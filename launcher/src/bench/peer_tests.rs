use super::*;
use crate::bench::session::Session;
use crate::supervisor::machine::{COMMON_COMMAND_LINE, NO_PCI};
use lighter_measure::task::{MEASURED, NOT_MEASURED, READY, Task};
use lighter_protocol::announce::{AGENT_RUNNING, ENGINE_READY, WORD};
use serde_json::json;
use std::time::Duration;

/// Of files that are nowhere.
pub fn guest() -> Guest {
    Guest {
        kernel: "/boot/a,b".into(),
        image: "/images/a,b".into(),
        cpus: 3,
        memory: Size(1 << 30),
        disk: Size(5 << 30),
        words: "lighter.x ".into(),
        qemu_options: vec![],
    }
}

/// A shell in place of the monitor.
fn contender(script: &str, folder: &Path) -> Contender {
    Contender {
        name: "firecracker",
        version: String::new(),
        program: "/bin/sh".into(),
        arguments: ["-c", script].map(OsString::from).into(),
        config: Some(firecracker_config(&guest(), &inherited(DATA_FD))),
        disk: guest().disk,
        folder: folder.into(),
    }
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

#[test]
fn peers_are_named_with_or_without_a_path() {
    let peer: Peer = "qemu".parse().unwrap();
    assert_eq!((peer.kind, peer.program), (Kind::Qemu, None));
    let peer: Peer = "firecracker=/a=b".parse().unwrap();
    assert_eq!(
        (peer.kind, peer.program),
        (Kind::Firecracker, Some("/a=b".into()))
    );
    let peer: Peer = "cloud-hypervisor".parse().unwrap();
    assert_eq!(
        (peer.kind, peer.name()),
        (Kind::CloudHypervisor, "cloud-hypervisor")
    );
    assert!(matches!("crosvm=/x".parse::<Peer>(), Err(PeerError::Unknown(name)) if name == "crosvm"));
    assert_eq!("qemu=".parse::<Peer>(), Err(PeerError::NoPath));
}

#[test]
fn a_program_that_is_missing_or_fails_is_named() {
    let prepare = |text: &str| text.parse::<Peer>().unwrap().prepare(&guest(), Path::new("/tmp"));
    let error = prepare("qemu=/nonexistent/qemu").unwrap_err();
    assert!(error.message.contains("/nonexistent/qemu"), "{error}");
    let error = prepare("firecracker=/bin/false").unwrap_err();
    assert!(error.message.contains("/bin/false --version"), "{error}");
}

#[test]
fn the_guest_is_the_same_for_every_peer() {
    let config = firecracker_config(&guest(), &inherited(DATA_FD));
    assert_eq!(
        config["machine-config"],
        json!({ "vcpu_count": 3, "mem_size_mib": 1024 })
    );
    assert_eq!(config["drives"][0]["path_on_host"], "/images/a,b");
    let boot_args = config["boot-source"]["boot_args"].as_str().unwrap();
    let arguments = qemu(&guest());
    let of_qemu = |option| after(&arguments, option);
    assert_eq!(["-smp", "-m", "-kernel"].map(of_qemu), ["3", "1024", "/boot/a,b"]);
    assert!(of_qemu("-drive").ends_with("file=/images/a,,b"));
    let arguments = cloud_hypervisor(&guest()).unwrap();
    let of_cloud_hypervisor = |option| after(&arguments, option);
    assert_eq!(
        ["--cpus", "--memory", "--kernel", "--disk"].map(of_cloud_hypervisor),
        [
            "boot=3",
            "size=1024M",
            "/boot/a,b",
            "path=\"/images/a,b\",readonly=on,sparse=off,image_type=raw"
        ]
    );
    let lines = [boot_args, of_qemu("-append"), of_cloud_hypervisor("--cmdline")];
    for line in lines {
        assert!(line.starts_with(COMMON_COMMAND_LINE) && line.ends_with(WORD));
    }
    // Only one of them has PCI.
    assert_eq!(lines.map(|line| line.contains(NO_PCI)), [true, true, false]);
}

/// The word after `option`.
fn after<'a>(arguments: &'a [OsString], option: &str) -> &'a str {
    let index = arguments.iter().position(|word| word == option).unwrap();
    arguments[index + 1].to_str().unwrap()
}

#[test]
fn an_image_that_a_peer_cannot_be_told_is_named() {
    let mut guest = guest();
    guest.image = "/images/\"a".into();
    let error = cloud_hypervisor(&guest).unwrap_err();
    assert!(
        error.message.contains("/images/\"a") && error.code == Code::Usage,
        "{error}"
    );
}

#[test]
fn a_peer_has_its_disk_and_its_configuration_and_is_killed_at_the_end() {
    let folder = tempfile::tempdir().unwrap();
    let pid = folder.path().join("pid");
    let script = format!(
        "test $(stat -Lc %s /proc/self/fd/{DATA_FD}) = {} && grep -q boot-source /proc/self/fd/{CONFIG_FD} &&
         echo $$ > {} && echo {AGENT_RUNNING} && echo {ENGINE_READY} && exec sleep 1000",
        guest().disk.0,
        pid.display()
    );
    let (started_ns, milestones) = contender(&script, folder.path()).boot(soon()).unwrap();
    assert!(started_ns < milestones.agent_running_ns);
    let pid = std::fs::read_to_string(pid).unwrap();
    assert!(!Path::new("/proc").join(pid.trim()).exists());
    // Nothing but what the script made.
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn a_peer_that_ends_early_is_told_with_its_last_words() {
    let folder = tempfile::tempdir().unwrap();
    let script = format!("echo {AGENT_RUNNING}; echo no more memory >&2; exit 3");
    let error = contender(&script, folder.path()).boot(soon()).unwrap_err();
    assert!(error.message.contains("exit status: 3"), "{error}");
    assert_eq!(error.lines, [AGENT_RUNNING, "no more memory"]);
}

#[test]
fn a_peer_that_hangs_is_ended_at_the_deadline() {
    let folder = tempfile::tempdir().unwrap();
    let contender = contender("echo on my way; exec sleep 1000", folder.path());
    let error = contender
        .boot(Instant::now() + Duration::from_secs(2))
        .unwrap_err();
    assert_eq!(
        (error.code, error.lines),
        (Code::Timeout, vec!["on my way".to_owned()])
    );
}

#[test]
fn a_guest_is_told_what_to_measure_on_its_console() {
    let folder = tempfile::tempdir().unwrap();
    let script = format!(
        "printf 'booting\\r\\n{READY}\\r\\n'; read task; echo \"$task\"
         case $task in *serve*7*) printf '\\n{MEASURED}[1,2]\\r\\n';; esac
         read task; printf '\\n{NOT_MEASURED}no such \\033[2Jfolder\\n'
         read task; echo last words; exit 3"
    );
    let contender = contender(&script, folder.path());
    let mut session = Session::start(&contender, vec![], soon()).unwrap();
    let mut measure = || session.measure::<Vec<u32>>(&Task::Serve(7));
    assert_eq!(measure().unwrap(), [1, 2]);
    let error = measure().unwrap_err();
    assert!(error.message.ends_with("no such \\u{1b}[2Jfolder"), "{error}");
    let error = measure().unwrap_err();
    assert!(error.message.contains("exit status: 3"), "{error}");
    assert_eq!(error.lines.last().unwrap(), "last words");
}

#[test]
fn a_guest_that_does_not_get_ready_is_told_with_its_last_words() {
    let folder = tempfile::tempdir().unwrap();
    let contender = contender("echo on my way; exec sleep 1000", folder.path());
    let late = Instant::now() + Duration::from_secs(2);
    let error = Session::start(&contender, vec![], late).unwrap_err();
    assert_eq!(
        (error.code, error.lines),
        (Code::Timeout, vec!["on my way".to_owned()])
    );
}
