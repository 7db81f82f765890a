//! New VMs that start from the template that the first one of their configuration has left.

use super::Test;
use super::world::{Docker, Home, Ran, Running, SMALL, client_file, programs, until, write_program};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use serde_json::Value;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::PathBuf;

pub const TESTS: &[Test] = &[
    (
        "new_vms_start_from_what_the_first_has_left_and_each_is_itself",
        templates,
    ),
    ("a_template_that_cannot_be_made_or_used_fails_no_start", failures),
];

/// Runs `lighter` with the monitor that the home has, if it has one.
fn lighter(home: &Home, arguments: &[&str]) -> Ran {
    let mut command = home.lighter(arguments);
    let monitor = home.path().join("monitor");
    if monitor.exists() {
        command.env("LIGHTER_VMM", monitor);
    }
    Running::start(&mut command, b"").wait()
}

/// Gives the home a monitor that goes on from nothing once there is the file `broken`.
fn make_monitor(home: &Home) {
    let path = home.path().join("monitor");
    let [broken, real] = [home.path().join("broken"), programs().join("lighter-vmm")];
    let script = format!(
        "#!/bin/sh\nmachine=$(cat)\ncase $machine in *snapshot*) test ! -e {} || exit 1; esac\nexec {} \"$@\" <<END\n\
         $machine\nEND\n",
        broken.display(),
        real.display()
    );
    write_program(&path, script);
}

fn start(home: &Home, name: &str, more: &[&str]) -> Ran {
    let arguments = [&["start", "--no-context", name], &SMALL[..], more].concat();
    let ran = lighter(home, &arguments);
    assert!(ran.status.success(), "{ran:?}");
    ran
}

/// Runs a script in the home, with an engine of its own.
fn run(home: &Home, more: &[&str], script: &str) -> String {
    let command = ["--", "sh", "-ec", script];
    lighter(home, &[&["run"], &SMALL[..], more, &command[..]].concat()).ok()
}

/// What the running VM says of itself.
fn running(home: &Home, name: &str) -> Value {
    home.status(name)["running"].clone()
}

/// The templates there are.
fn list(home: &Home) -> Vec<String> {
    let names = home.run(&["template", "ls", "-q"]).ok();
    names.lines().map(str::to_owned).collect()
}

/// Waits until the template of VM `name` is written; returns its name.
fn made(home: &Home, name: &str) -> String {
    until("template", || {
        let template = &running(home, name)["template"];
        assert_ne!(template, "failed", "{}", home.status(name));
        (template == "made").then_some(())
    });
    list(home).pop().expect("a template")
}

fn file(home: &Home, template: &str, name: &str) -> PathBuf {
    home.path().join("templates").join(template).join(name)
}

/// What must be different in two engines, each with its name.
fn marks(home: &Home, vm: &str, docker: &Docker) -> Vec<(&'static str, String)> {
    let inside = |script: &str| home.run(&["exec", vm, "--", "sh", "-c", script]).ok();
    vec![
        ("hostname", inside("hostname")),
        ("name of the engine", docker.ok(&["info", "-f", "{{.Name}}"])),
        ("machine-id", inside("cat /etc/machine-id")),
        ("MAC", inside("cat /sys/class/net/eth0/address")),
        ("engine ID on the disk", inside("cat /var/lib/docker/engine-id")),
        ("random bytes", inside("cat /proc/sys/kernel/random/uuid")),
    ]
}

/// The image of busybox, a container of it, and who the engine is: one engine per line of output.
fn fresh_engine() -> String {
    let (docker, tar) = (
        std::env::var("LIGHTER_TEST_DOCKER").expect("docker"),
        client_file("busybox.tar"),
    );
    format!(
        "docker() {{ {docker} \"$@\"; }}; test -z \"$(docker images -q)\"; docker import {} busybox > /dev/null; \
         echo $(docker info -f '{{{{.Name}}}}') $(docker run --rm busybox echo hello)",
        tar.display()
    )
}

/// What the VM of `lighter run` began with.
fn origin_of_run() -> String {
    format!("{} inspect run-$PPID", programs().join("lighter").display())
}

fn templates() {
    let home = Home::with_templates();
    start(&home, "one", &[]);
    assert_eq!(running(&home, "one")["origin"], "boot");
    let template = made(&home, "one");
    // The disk is frozen.
    for (name, mode) in [
        ("manifest.json", 0o600),
        ("state", 0o600),
        ("memory", 0o600),
        ("disk", 0o400),
    ] {
        let metadata = std::fs::metadata(file(&home, &template, name)).expect("a file");
        assert_eq!(metadata.permissions().mode() & 0o777, mode, "{name}");
    }
    let one = home.docker("one");
    one.import("busybox");

    start(&home, "two", &[]);
    let origin = serde_json::json!({ "template": template });
    assert_eq!(running(&home, "two")["origin"], origin);
    let two = home.docker("two");
    assert_eq!(two.ok(&["images", "-q"]), "");
    let pairs = marks(&home, "one", &one)
        .into_iter()
        .zip(marks(&home, "two", &two));
    for ((what, of_one), (_, of_two)) in pairs {
        assert_ne!(of_one, of_two, "{what}");
    }
    two.import("busybox");
    two.ok(&["run", "--rm", "busybox", "true"]);
    assert_eq!(running(&home, "two")["trouble"], Value::Null);
    // Its disk is its own from now on.
    home.run(&["stop", "two"]).ok();
    home.run(&["start", "--no-context", "two"]).ok();
    assert_eq!(running(&home, "two")["origin"], "boot");
    assert_eq!(two.ok(&["images", "-q"]).lines().count(), 1);
    home.run(&["rm", "--force", "two"]).ok();

    // One that was made before, and another size.
    home.run(&[&["create", "three"], &SMALL[..]].concat()).ok();
    home.run(&["start", "--no-context", "three"]).ok();
    assert_eq!(running(&home, "three")["origin"], origin);
    home.run(&["rm", "--force", "three"]).ok();

    // An engine for a command, twice at once.
    let script = fresh_engine();
    let command = [&["run"], &SMALL[..], &["--", "sh", "-ec", &script]].concat();
    let both = [(); 2].map(|()| home.start(&command, b""));
    let mut lines = both.map(|run| run.wait().ok());
    lines.sort();
    assert!(lines.iter().all(|line| line.ends_with(" hello")), "{lines:?}");
    assert_ne!(lines[0], lines[1]);
    let inspected: Value = serde_json::from_str(&run(&home, &[], &origin_of_run())).expect("JSON");
    assert_eq!(inspected["running"]["origin"], origin);
    assert_eq!(list(&home), std::slice::from_ref(&template));
    assert_eq!(home.run(&["ls", "-q"]).ok(), "one");

    // Nobody needs it any more.
    let listed: Value = serde_json::from_str(&home.run(&["template", "ls", "--json"]).ok()).expect("JSON");
    assert_eq!(listed[0]["current"], true, "{listed}");
    assert!(listed[0]["used_bytes"].as_u64() > Some(1 << 20), "{listed}");
    home.run(&["template", "rm", &template]).ok();
    home.run(&["template", "rm", &template]).fails_with(1);
    assert_eq!(list(&home).len(), 0);
    one.ok(&["run", "--rm", "busybox", "true"]);
}

fn failures() {
    let home = Home::with_templates();
    make_monitor(&home);
    let store = home.path().join("templates");
    std::fs::create_dir(&store).expect("make a folder");
    mount("tmpfs", &store, "tmpfs", MountFlags::empty(), Some(c"size=8m"))
        .expect("mount a small file system");
    start(&home, "one", &[]);
    let status = until("failure", || {
        let status = running(&home, "one");
        (status["template"] == "failed").then_some(status)
    });
    assert_eq!(status["phase"], "ready", "{status}");
    assert_eq!(status["trouble"]["device"], "template", "{status}");
    assert_eq!(list(&home).len(), 0);
    unmount(&store, UnmountFlags::empty()).expect("unmount, for nothing is open there");
    home.run(&["rm", "--force", "one"]).ok();

    // A command that is shorter than the writing of a template leaves one behind all the same.
    run(&home, &[], "true");
    let template = list(&home).pop().expect("a template");
    let state = std::fs::File::options()
        .write(true)
        .open(file(&home, &template, "state"))
        .expect("open");
    state.write_all_at(b"?", 100).expect("write");
    let inspected = run(&home, &["--no-template"], &origin_of_run());
    let inspected: Value = serde_json::from_str(&inspected).expect("JSON");
    assert_eq!(inspected["running"]["origin"], "boot");
    assert_eq!(inspected["running"]["template"], Value::Null);
    assert_eq!(list(&home), std::slice::from_ref(&template));

    let told = start(&home, "two", &[]).stderr;
    assert!(told.contains("state does not have the checksum"), "{told}");
    assert!(told.contains("the VM boots"), "{told}");
    assert_eq!(running(&home, "two")["origin"], "boot");
    let another = made(&home, "two");
    assert_ne!(another, template);
    assert_eq!(list(&home), std::slice::from_ref(&another));
    home.run(&["rm", "--force", "two"]).ok();

    // As on a processor that lacks something.
    std::fs::write(home.path().join("broken"), "").expect("write");
    let told = start(&home, "three", &[]).stderr;
    assert!(
        told.contains(&format!("template {another} is of no use")),
        "{told}"
    );
    assert_eq!(running(&home, "three")["origin"], "boot");
    let last = made(&home, "three");
    assert_eq!(list(&home), [last]);
}
