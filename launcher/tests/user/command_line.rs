//! Everything that needs no guest.

use crate::world::{World, expect, ran, tree};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

#[test]
fn bad_names_are_a_usage_error_and_leave_nothing() {
    let world = World::new();
    for name in ["../x", ".x", "X", "a/b", "a b", "", &"a".repeat(64)] {
        for verb in ["create", "start", "stop", "rm", "status"] {
            world.fails(&[verb, name], 2, &["a name"]);
        }
    }
    assert!(tree(world.home.path()).is_empty());
}

#[test]
fn sizes_out_of_range_are_a_usage_error_that_names_option_and_limits() {
    let world = World::new();
    for (option, value, words) in [
        ("--cpus", "0", ["--cpus", "from 1 to 64"]),
        ("--cpus", "-1", ["--cpus", "from 1 to 64"]),
        ("--cpus", "1000000", ["--cpus", "from 1 to 64"]),
        ("--cpus", "two", ["--cpus", "whole number"]),
        ("--memory", "0", ["--memory", "from 256 MiB"]),
        ("--memory", "-1g", ["--memory", "positive"]),
        ("--memory", "500t", ["--memory", "what this host has"]),
        ("--memory", "lots", ["--memory", "not a size"]),
        ("--disk", "0", ["--disk", "from 1 GiB"]),
        ("--disk", "-5", ["--disk", "positive"]),
        ("--disk", "17t", ["--disk", "16 TiB"]),
        ("--disk", "99999999999999999999999t", ["--disk", "16 EiB"]),
    ] {
        world.fails(&["create", option, value], 2, &words);
        world.fails(&["start", option, value], 2, &words);
    }
    world.fails(&["start", "--wait-timeout", "0"], 2, &["--wait-timeout"]);
    assert!(tree(world.home.path()).is_empty());
}

#[test]
fn folders_that_cannot_be_shared_are_a_usage_error_that_names_them() {
    let world = World::new();
    let home = world.home.path().to_str().unwrap();
    for (mounts, words) in [
        (&["/nowhere"][..], ["/nowhere", "does not exist"]),
        (&["/dev/null/x"], ["/dev", "own system"]),
        (&["/"], ["the folder /", "own system"]),
        (
            &["/var/lib/docker:ro"],
            ["/var/lib/docker", "own system in /var/lib"],
        ),
        (&[home, &format!("{home}/:ro")], [home, "given twice"]),
        (&["a:b"], ["a:b", "colon"]),
    ] {
        let options = mounts.iter().flat_map(|mount| ["--mount", mount]);
        let arguments: Vec<&str> = ["create"].into_iter().chain(options).collect();
        world.fails(&arguments, 2, &words);
    }
    world.fails(&["create", "--mount", home, "--no-mounts"], 2, &["--no-mounts"]);
    assert!(tree(world.home.path()).is_empty());
    world.ok(&["create", "--mount", &format!("{home}:ro")]);
    let settings = &world.json(&["inspect"])["settings"];
    assert_eq!(settings["mounts"], serde_json::json!([format!("{home}:ro")]));
    world.ok(&["create", "--no-mounts", "bare"]);
    assert_eq!(world.json(&["inspect", "bare"])["mounts"], serde_json::json!([]));
    // The home folder, of whoever starts it.
    world.ok(&["create", "plain"]);
    assert_eq!(
        world.json(&["inspect", "plain"])["mounts"],
        serde_json::json!([home])
    );
}

#[test]
fn a_vm_suspends_by_itself_when_the_option_or_the_configuration_says_so() {
    let world = World::new();
    world.fails(
        &["create", "--auto-suspend", "soon"],
        2,
        &["--auto-suspend", "such as 90s or 10m"],
    );
    let config = world.home.path().join("config.toml");
    std::fs::write(&config, "auto-suspend = \"1h\"\n").unwrap();
    world.ok(&["create", "hour"]);
    world.ok(&["create", "--auto-suspend", "90s", "soon"]);
    world.ok(&["create", "--auto-suspend", "off", "never"]);
    let settings = |name: &str| {
        let path = world.home.path().join("vms").join(name).join("vm.toml");
        std::fs::read_to_string(path).unwrap()
    };
    assert!(settings("hour").contains("auto_suspend = \"1h\""));
    assert!(settings("soon").contains("auto_suspend = \"90s\""));
    assert!(!settings("never").contains("auto_suspend"));
}

#[test]
fn the_configuration_is_shown_and_changed_by_its_keys() {
    let world = World::new();
    world.ok(&["config", "set", "memory", "512m"]);
    world.ok(&["config", "set", "insecure-registries", "a:1", "b:2"]);
    world.ok(&["config", "set", "ports.default-address", "127.0.0.1"]);
    assert_eq!(world.ok(&["config", "get", "insecure-registries"]), "a:1\nb:2\n");
    let rows = world.json(&["config", "ls", "--json"]);
    let row = |key| {
        let row = rows.as_array().unwrap().iter().find(|row| row["key"] == key);
        row.unwrap().clone()
    };
    assert_eq!(
        (&row("memory")["value"], &row("memory")["set"]),
        (&"512m".into(), &true.into())
    );
    assert_eq!(
        (&row("disk")["value"], &row("disk")["set"]),
        (&"20g".into(), &false.into())
    );
    assert_eq!(row("ports.default-address")["value"], "127.0.0.1");
    world.ok(&["create"]);
    assert_eq!(world.json(&["inspect"])["memory_bytes"], 512 << 20);
    let file = std::fs::read_to_string(world.path("config.toml")).unwrap();
    world.fails(&["config", "set", "memory", "lots"], 2, &["memory", "not a size"]);
    world.fails(
        &["config", "set", "memroy", "2g"],
        2,
        &["memroy", "similar", "'memory'", "registry-mirrors"],
    );
    assert_eq!(std::fs::read_to_string(world.path("config.toml")).unwrap(), file);
    world.ok(&["config", "unset", "memory"]);
    assert!(
        world
            .ok(&["config", "ls"])
            .contains("memory                 default")
    );
}

#[test]
fn a_vm_is_not_started_by_a_systemd_that_is_not_there() {
    let world = World::new();
    world.fails(&["autostart", "enable"], 4, &["no VM named default"]);
    world.ok(&["create"]);
    let words = ["systemd does not answer", "enable-linger"];
    let enable = ["autostart", "enable", "--on-demand"];
    if std::process::Command::new("systemctl")
        .arg("--version")
        .output()
        .is_ok()
    {
        world.fails(&enable, 1, &words);
    }
    let none = ran(world
        .command(&enable)
        .env("PATH", "/nonexistent")
        .output()
        .unwrap());
    expect(&none, 1, &["cannot run systemctl", "lighter start"], &enable);
    world.ok(&["autostart", "disable"]);
    assert_eq!(world.json(&["autostart", "ls", "--json"]), serde_json::json!([]));
    assert_eq!(world.json(&["inspect"])["autostart"], serde_json::Value::Null);
}

#[test]
fn a_created_vm_is_listed_inspected_and_removed() {
    let world = World::new();
    assert_eq!(world.ok(&["ls", "-q"]), "");
    assert_eq!(world.json(&["ls", "--json"]), serde_json::json!([]));
    world.ok(&["create", "-c", "2", "-m", "512m", "-d", "3"]);
    world.ok(&["create", "other"]);
    assert_eq!(world.ok(&["ls", "-q"]), "default\nother\n");
    assert_eq!(world.ok(&["list", "--quiet"]), "default\nother\n");
    let table = world.ok(&["ls"]);
    assert!(table.contains("512 MiB") && table.contains("3 GiB"), "{table}");

    let everything = world.json(&["inspect"]);
    assert_eq!(everything["name"], "default");
    assert_eq!(everything["state"], "stopped");
    assert_eq!(everything["settings"]["cpus"], 2);
    assert_eq!(everything["memory_bytes"], 512 << 20);
    let disk = everything["files"]["data_disk"].as_str().unwrap();
    let metadata = std::fs::metadata(disk).unwrap();
    assert_eq!(metadata.len(), 3 << 30);
    assert_eq!(metadata.permissions().mode() & 0o777, 0o600);

    world.ok(&["rm", "--force"]);
    world.ok(&["delete", "-f", "other"]);
    assert!(
        tree(&world.path("vms")).is_empty(),
        "{:?}",
        tree(&world.path("vms"))
    );
}

#[test]
fn a_second_vm_of_a_name_is_refused_and_the_first_keeps_its_settings() {
    let world = World::new();
    world.ok(&["create", "-c", "1"]);
    world.fails(&["create", "-c", "3"], 1, &["exists already", "default"]);
    assert_eq!(world.json(&["inspect"])["cpus"], 1);
}

#[test]
fn verbs_on_a_vm_that_is_not_there_return_4() {
    let world = World::new();
    for arguments in [
        &["stop", "nobody"][..],
        &["restart", "nobody"],
        &["rm", "--force", "nobody"],
        &["status", "nobody"],
        &["inspect", "nobody"],
        &["logs", "nobody"],
        &["env", "nobody"],
        &["shell", "nobody"],
        &["exec", "nobody", "--", "true"],
        &["snapshot", "create", "nobody"],
        &["fork", "nobody"],
    ] {
        world.fails(arguments, 4, &["no VM named nobody"]);
    }
    assert!(tree(world.home.path()).is_empty());
}

#[test]
fn verbs_that_need_a_running_vm_return_3() {
    let world = World::new();
    world.ok(&["create"]);
    for arguments in [
        &["env"][..],
        &["exec", "default", "--", "true"],
        &["shell"],
        &["snapshot", "create", "default"],
        &["fork", "default"],
    ] {
        world.fails(arguments, 3, &["default is not running", "lighter start default"]);
    }
    let status = world.run(&["status"]);
    assert_eq!(status.code, 3);
    assert!(status.stdout.contains("stopped"), "{}", status.stdout);
    let status = world.run(&["status", "--json"]);
    assert_eq!(status.code, 3);
    assert_eq!(
        serde_json::from_str::<serde_json::Value>(&status.stdout).unwrap()["state"],
        "stopped"
    );
    // Nothing to stop is no failure: what was wanted is so.
    assert_eq!(world.run(&["stop"]).code, 0);
}

#[test]
fn data_is_not_removed_without_asking() {
    let world = World::new();
    world.ok(&["create"]);
    world.fails(&["rm"], 1, &["not removed", "--force"]);
    assert!(world.path("vms/default/data.img").exists());
}

#[test]
fn errors_are_json_when_json_was_asked_for() {
    let world = World::new();
    for (arguments, code) in [
        (&["status", "nobody", "--json"][..], 4),
        (&["ls", "--json", "--nonsense"], 2),
        (&["inspect", "BAD", "--json"], 2),
    ] {
        let ran = world.run(arguments);
        assert_eq!(ran.code, code, "{arguments:?}");
        let error: serde_json::Value = serde_json::from_str(&ran.stderr).unwrap();
        assert_eq!(error["code"], code);
        assert!(!error["error"].as_str().unwrap().is_empty());
        assert!(!error["hint"].as_str().unwrap().is_empty());
    }
}

#[test]
fn configuration_sets_defaults_and_its_mistakes_are_named_with_their_line() {
    let world = World::new();
    let config = world.path("config.toml");
    std::fs::write(&config, "cpus = 3\nmemory = \"768m\"\n").unwrap();
    world.ok(&["create"]);
    let made = world.json(&["inspect"]);
    assert_eq!(
        (&made["cpus"], &made["memory_bytes"]),
        (&3.into(), &(768 << 20).into())
    );

    std::fs::write(&config, "cpus = 3\nmemroy = \"768m\"\n").unwrap();
    world.fails(&["create", "b"], 2, &["config.toml:2:", "memroy"]);
    std::fs::write(&config, "disk = \"0\"\n").unwrap();
    world.fails(&["create", "b"], 2, &["config.toml: disk:", "1 GiB"]);
    assert_eq!(world.ok(&["ls", "-q"]), "default\n");
}

#[test]
fn a_disk_that_would_shrink_is_refused_before_anything_starts() {
    let world = World::new();
    world.ok(&["create", "-d", "3g"]);
    world.fails(&["start", "-d", "2g"], 2, &["3 GiB", "cannot shrink to 2 GiB"]);
    assert_eq!(
        std::fs::metadata(world.path("vms/default/data.img"))
            .unwrap()
            .len(),
        3 << 30
    );
}

#[test]
fn a_socket_path_that_is_too_long_is_named() {
    let mut world = World::new();
    let deep = world.path(&"d".repeat(100));
    std::fs::create_dir(&deep).unwrap();
    world.home = tempfile::tempdir_in(deep).unwrap();
    for verb in ["create", "start"] {
        world.fails(&[verb], 2, &["docker.sock", "107", "LIGHTER_HOME"]);
    }
    assert!(tree(world.home.path()).is_empty());
}

#[test]
fn a_start_without_a_kernel_or_image_names_quickstart_and_leaves_no_process_or_socket() {
    let world = World::new();
    if !Path::new("/dev/kvm").exists() {
        // What is missing first is named first.
        world.fails(&["start"], 1, &["cannot open /dev/kvm"]);
        return;
    }
    world.fails(
        &["start"],
        1,
        &["guest kernel", "artifacts/vmlinux", "scripts/quickstart"],
    );
    assert!(
        tree(&world.path("run")).is_empty(),
        "{:?}",
        tree(&world.path("run"))
    );
    std::fs::write(world.path("empty"), "").unwrap();
    let empty = world.path("empty");
    let empty = empty.to_str().unwrap();
    world.fails(
        &["start", "--kernel", empty],
        1,
        &["guest kernel", "it is empty", "--kernel"],
    );
    world.fails(&["start", "--kernel", "/dev/null"], 1, &["not a regular file"]);
    let status = world.run(&["status"]);
    assert_eq!(status.code, 3);
    assert!(
        status.stdout.contains("failed") && status.stdout.contains("last end"),
        "{}",
        status.stdout
    );
    // The next command works.
    world.ok(&["rm", "--force"]);
    assert!(tree(&world.path("vms")).is_empty());
}

#[test]
fn a_missing_or_truncated_data_disk_is_named_and_never_replaced() {
    let world = World::new();
    if !Path::new("/dev/kvm").exists() {
        world.fails(&["start"], 1, &["cannot open /dev/kvm"]);
        return;
    }
    world.ok(&["create", "-d", "2g"]);
    let file = world.path("some-file");
    std::fs::write(&file, "not a kernel, but a file").unwrap();
    let file = file.to_str().unwrap();
    let start = ["start", "--kernel", file, "--image", file];
    let disk = world.path("vms/default/data.img");
    let shorter = std::fs::OpenOptions::new().write(true).open(&disk).unwrap();
    shorter.set_len(1 << 20).unwrap();
    world.fails(&start, 1, &["data disk", "truncated", "1048576"]);
    assert_eq!(std::fs::metadata(&disk).unwrap().len(), 1 << 20);
    std::fs::remove_file(&disk).unwrap();
    world.fails(&start, 1, &["data disk", "missing", "lighter rm"]);
    assert!(!disk.exists());
    assert!(tree(&world.path("run")).is_empty());
}

#[test]
fn a_throw_away_vm_that_does_not_boot_leaves_nothing_and_returns_125() {
    let world = World::new();
    world.fails(&["run", "--", "true"], 125, &["did not start"]);
    assert!(
        tree(&world.path("vms")).is_empty(),
        "{:?}",
        tree(&world.path("vms"))
    );
    assert!(tree(&world.path("run")).is_empty());
}

#[test]
fn a_folder_for_sockets_that_others_may_write_to_is_refused() {
    let world = World::new();
    let run = world.path("run");
    std::fs::create_dir(&run).unwrap();
    std::fs::set_permissions(&run, std::fs::Permissions::from_mode(0o777)).unwrap();
    world.fails(&["start"], 1, &["not a folder of this user alone"]);
    assert!(tree(&run).is_empty());
}

#[test]
fn doctor_finds_what_is_missing_and_says_how_to_fix_it() {
    let world = World::new();
    let ran = ran(world
        .command(&["doctor", "--json"])
        .env("PATH", "/nonexistent")
        .env("LIGHTER_VMM", "/nonexistent/lighter-vmm")
        .output()
        .unwrap());
    assert_eq!(ran.code, 1, "without a kernel nothing boots: {}", ran.stdout);
    let report: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!(report["healthy"], false);
    let checks = report["checks"].as_array().unwrap();
    let check = |name: &str| checks.iter().find(|check| check["name"] == name).unwrap().clone();
    assert_eq!(check("kernel")["verdict"], "bad");
    assert!(
        check("kernel")["fix"]
            .as_str()
            .unwrap()
            .contains("scripts/quickstart")
    );
    assert_eq!(check("docker CLI")["verdict"], "warning");
    assert_eq!(check("config")["verdict"], "good");
    for check in checks {
        let healthy = check["verdict"] == "good";
        assert_eq!(healthy, check["fix"].is_null(), "{check}");
    }
    let words = world.run(&["doctor"]);
    assert!(words.stdout.contains("fix: "), "{}", words.stdout);
}

#[test]
fn completion_and_version_are_printed() {
    let world = World::new();
    for shell in ["bash", "zsh", "fish"] {
        assert!(world.ok(&["completion", shell]).contains("lighter"));
    }
    let version = env!("CARGO_PKG_VERSION");
    assert_eq!(world.ok(&["version"]), format!("lighter {version}\n"));
    assert_eq!(world.ok(&["--version"]), format!("lighter {version}\n"));
    assert_eq!(world.json(&["version", "--json"])["version"], version);
    assert!(world.ok(&["--help"]).contains("Exit codes"));
    assert!(!world.ok(&["--help"]).contains("supervise"));
}

#[test]
fn relative_roots_are_refused() {
    let world = World::new();
    let ran = ran(world
        .command(&["ls"])
        .env("LIGHTER_HOME", "here")
        .output()
        .unwrap());
    expect(&ran, 2, &["LIGHTER_HOME", "not an absolute path"], &["ls"]);
}

#[test]
fn snapshots_that_are_not_there_and_files_that_are_none_are_told() {
    let world = World::new();
    for arguments in [
        &["restore", "a/s"][..],
        &["start", "new", "--from", "a/s"],
        &["snapshot", "inspect", "a/s"],
        &["snapshot", "rm", "a/s"],
        &["snapshot", "export", "a/s", "file"],
    ] {
        world.fails(arguments, 1, &["there is no snapshot a/s", "lighter snapshot ls"]);
    }
    world.fails(&["restore", "../s"], 2, &["a name"]);
    world.fails(
        &["start", "--from", "a/s", "-c", "1"],
        2,
        &["--from takes no other options"],
    );
    assert_eq!(world.ok(&["snapshot", "ls", "-q"]), "");
    assert_eq!(world.ok(&["snapshot", "ls", "--json"]), "[]\n");
    let file = world.path("file");
    std::fs::write(&file, "no snapshot").unwrap();
    let file = file.to_str().unwrap();
    world.fails(
        &["snapshot", "import", file],
        1,
        &["not a whole exported snapshot"],
    );
    world.fails(&["snapshot", "import", "/nowhere"], 1, &["cannot read /nowhere"]);
    assert_eq!(tree(world.home.path()), [world.path("file")]);
}
