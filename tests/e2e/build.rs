//! Images are built, by both of Docker's builders.

use super::Test;
use super::world::shared;

pub const TESTS: &[Test] = &[
    ("the_classic_builder_builds", classic),
    ("buildkit_builds_and_its_cache_is_used", buildkit),
];

const DOCKERFILE: &str = "
FROM busybox
COPY cargo.txt /cargo.txt
RUN wc -c < /cargo.txt > /size
CMD [\"cat\", \"/size\"]
";

fn build(buildkit: &str) -> String {
    let docker = shared();
    let folder = tempfile::tempdir().expect("make a folder");
    std::fs::write(folder.path().join("Dockerfile"), DOCKERFILE).expect("write");
    std::fs::write(folder.path().join("cargo.txt"), "x".repeat(1234)).expect("write");
    let tag = format!("built-{buildkit}");
    let mut command = docker.command(&["build", "-t", &tag, "."]);
    command
        .env("DOCKER_BUILDKIT", buildkit)
        .current_dir(folder.path());
    let built = super::world::Running::start(&mut command, b"").wait();
    let log = format!("{}{}", built.stdout, built.stderr);
    built.ok();
    assert_eq!(docker.ok(&["run", "--rm", "--network", "none", &tag]), "1234");
    docker.ok(&["rmi", &tag]);
    log
}

fn classic() {
    build("0");
}

fn buildkit() {
    build("1");
    let second = build("1");
    assert!(second.contains("CACHED"), "{second}");
}
