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
    cached_folder "$dir" qemu make_test_machine_qemu "$dir"
}

# make_test_machine_qemu DIR: builds the folder aside and renames it, so that a broken one is never used.
make_test_machine_qemu() (
    set -e
    dir=$1
    need_packages apt debian-archive-keyring
    tmp=$(mktemp -d "$dir.XXXXXX")
    trap 'rm -rf "$tmp"' EXIT
    log "downloading QEMU of Debian $TEST_MACHINE_QEMU_SUITE for the test machine"
    fetch_debian_packages "$TEST_MACHINE_QEMU_SUITE" "$tmp/debs" qemu-system-x86 >"$tmp/versions"
    unpack_debian_packages "$tmp/debs" "$tmp/packages"
    mkdir "$tmp/lib"
    # One folder of libraries, one of firmware.
    find "$tmp/packages" -path '*/lib/x86_64-linux-gnu/*' -name '*.so*' ! -path '*/qemu/*' -exec cp -a -t "$tmp/lib" {} +
    cp "$tmp/packages/qemu-system-x86/usr/bin/qemu-system-x86_64" "$tmp/program"
    deliver_injected_interrupts_once "$tmp/program" ||
        log "warning: this QEMU is not the one that scripts/lib/test-machine/qemu.sh knows how to correct; guests may" \
            "crash now and then, and --counted hangs (see helper_vmrun in QEMU's target/i386/tcg)"
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

# deliver_injected_interrupts_once PROGRAM: corrects an error of QEMU in the program itself.
#
# When KVM injects an interrupt into a guest, QEMU's helper_vmrun delivers it, but leaves its number behind as an
# exception that is still to come (`cs->exception_index = vector`). If QEMU then leaves its inner loop before the guest's
# next exit (a timer is due, another thread calls), the guest gets the interrupt a second time, with interrupts off: it
# deadlocks or crashes. With the counting clock that happens in every boot. QEMU is too large to be built for this, so
# the one instruction that stores the number, in the middle of the four that GCC makes of these assignments, becomes a
# no-operation of the same length.
deliver_injected_interrupts_once() {
    perl -0777 -i -pe '
        BEGIN { $changes = 0 }
        $changes += s{
            ( \x44?\x89 . .{4} )                       # env->error_code = event_inj_err
            \x89\xb3 .{4}                              # cs->exception_index = vector
            ( \xc7\x83 .{4} \0{4}                      # env->exception_is_int = 0
            \x48\xc7\x83 .{4} \xff{4} )               # env->exception_next_eip = -1
        }{$1\x66\x0f\x1f\x44\0\0$2}xsg;
        END { exit($changes != 1) }
    ' "$1"
}
