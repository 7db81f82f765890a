# shellcheck shell=bash
# The QEMU of the test machine. Source it after common.sh and debian-packages.sh.
#
# The same one on every host: that of Debian 13, with all its libraries, in the cache and never installed.
TEST_MACHINE_QEMU_SUITE=trixie

# test_machine_qemu HERE: prints the folder that holds the program `qemu`, made if missing. HERE is the folder of
# this file.
test_machine_qemu() {
    local here=$1 key dir
    key=$(content_hash "$here/qemu.sh" "$here/../debian-packages.sh" <<<"") || return 1
    dir=$(cache_dir)/test-machine-qemu-$key || return 1
    [ -e "$dir/qemu" ] || (
        lock_file "$(cache_dir)/test-machine.lock"
        [ -e "$dir/qemu" ] || make_test_machine_qemu "$dir"
    ) || return 1
    printf '%s\n' "$dir"
}

# make_test_machine_qemu DIR: builds the folder aside and renames it, so that a broken one is never used.
make_test_machine_qemu() (
    set -e
    dir=$1
    need_packages apt debian-archive-keyring
    # With the lock held, any such folder was left by a script that was killed.
    rm -rf "$(cache_dir)"/test-machine-qemu-*
    tmp=$dir.part
    trap 'rm -rf "$tmp"' EXIT
    mkdir "$tmp"
    log "downloading QEMU of Debian $TEST_MACHINE_QEMU_SUITE for the test machine"
    fetch_debian_packages "$TEST_MACHINE_QEMU_SUITE" "$tmp/debs" qemu-system-x86 >"$tmp/versions"
    unpack_debian_packages "$tmp/debs" "$tmp/packages"
    mkdir "$tmp/lib"
    # One folder of libraries, one of firmware.
    find "$tmp/packages" -path '*/lib/x86_64-linux-gnu/*' -name '*.so*' ! -path '*/qemu/*' -exec cp -a -t "$tmp/lib" {} +
    cp "$tmp/packages/qemu-system-x86/usr/bin/qemu-system-x86_64" "$tmp/program"
    mkdir "$tmp/share"
    for folder in "$tmp"/packages/*/usr/share/qemu "$tmp"/packages/*/usr/share/seabios; do
        [ ! -d "$folder" ] || cp -a "$folder/." "$tmp/share/"
    done
    rm -rf "$tmp/debs" "$tmp/packages"
    # With its own loader and libraries, whatever the host's are; QEMU replaces the shell.
    cat >"$tmp/qemu" <<'TEXT'
#!/bin/sh
here=${0%/*}
exec "$here/lib/ld-linux-x86-64.so.2" --library-path "$here/lib" "$here/program" -L "$here/share" "$@"
TEXT
    chmod 755 "$tmp/qemu"
    "$tmp/qemu" --version >"$tmp/test" 2>&1 || {
        cat "$tmp/test" >&2
        die "QEMU of Debian $TEST_MACHINE_QEMU_SUITE does not start here; its messages are above"
    }
    rm "$tmp/test"
    mv "$tmp" "$dir"
)
