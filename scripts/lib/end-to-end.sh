# shellcheck shell=bash
# What runs end-to-end tests, for scripts/test and scripts/soak. Needs lib/common.sh, and $repo as working directory.

# Has the packages of the host's that the tests take programs of.
need_packages_for_e2e() {
    need_packages busybox-static dmsetup e2fsprogs iproute2 passt sqlite3 strace systemd
}

# Builds what the tests need, and sets the variables that tell them where it is, and e2e_program.
build_for_e2e() {
    cargo build --release --locked -q -p lighter -p lighter-vmm &&
        LIGHTER_KERNEL=$(scripts/build-kernel) &&
        LIGHTER_IMAGE=$(scripts/build-image) &&
        LIGHTER_TEST_CLIENTS=$(scripts/lib/test-clients) &&
        LIGHTER_TEST_APPS=$(scripts/lib/test-apps) &&
        LIGHTER_TEST_DOCKER=$(scripts/lib/docker-cli) &&
        LIGHTER_PROGRAMS=$PWD/target/release &&
        export LIGHTER_KERNEL LIGHTER_IMAGE LIGHTER_TEST_CLIENTS LIGHTER_TEST_APPS \
            LIGHTER_TEST_DOCKER LIGHTER_PROGRAMS &&
        e2e_program=$(cargo test -p lighter-tests --test e2e --release --locked -q --no-run \
            --message-format=json-render-diagnostics | sed -n 's/.*"executable":"\([^"]*e2e-[^"]*\)".*/\1/p' | tail -n 1) &&
        [ -n "$e2e_program" ]
}
