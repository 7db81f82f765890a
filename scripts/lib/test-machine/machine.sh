# shellcheck shell=bash disable=SC2154
# Starts the emulated test machine and runs a command in it. Source it after kernel.sh and qemu.sh.
#
# The host leaves what to run in a folder under /var/tmp, which the machine sees as it sees all files of the host.
# `initramfs-init`, `init` and `run-command` are what happens inside, in this order; `receive-output` takes what
# comes back.

# run_in_test_machine COMMAND...: reads $repository, $cpus, $memory_mib, $timeout_s and $counted; does not return.
run_in_test_machine() {
    local here=$repository/scripts/lib/test-machine kernel program status
    PATH=$PATH:/usr/sbin:/sbin
    need_packages e2fsprogs busybox-static
    kernel=$(test_machine_kernel "$here") || exit 1
    program=$(test_machine_qemu "$here")/qemu || exit 1
    mkdir -p "$repository/target" || die "cannot make $repository/target"
    remove_stale_run_folders
    run=$(mktemp -d "/var/tmp/lighter-test-machine.$$.XXXXXX") || die "cannot make a folder in /var/tmp"
    qemu='' receiver=''
    trap end_test_machine EXIT
    trap 'exit 129' HUP
    trap 'exit 130' INT
    trap 'exit 143' TERM

    leave_command_in "$run" "$kernel" "$@"
    mkfifo "$run/output"
    # The disk has no name: it goes with QEMU, whatever happens to this script.
    truncate -s 20G "$run/scratch" || die "cannot make $run/scratch; free some space in /var/tmp"
    mkfs.ext4 -q -F -O ^has_journal -E lazy_itable_init=1,root_owner=0:0 "$run/scratch" ||
        die "cannot format $run/scratch; free some space in /var/tmp"
    exec {scratch}<>"$run/scratch"
    rm "$run/scratch"

    "$here/receive-output" "$run/outcome" "$timeout_s" <"$run/output" &
    receiver=$!
    start_qemu "$program" "$kernel"
    exec {scratch}>&-
    wait -n "$qemu" "$receiver"
    # If QEMU ended first, its end of the pipe may never have been opened, and the receiver waits for that.
    : <>"$run/output"
    wait "$receiver"

    read -r outcome status <"$run/outcome"
    case $outcome in
    exit) exit "$status" ;;
    closed) exit 141 ;;
    timeout)
        log "error: the command did not end within $timeout_s s and was stopped; give more with --timeout"
        exit 124
        ;;
    *)
        log "error: the test machine ended before the command did; the last lines of its console and of QEMU:"
        tail -n 60 "$run/console" >&2
        # EPYC stands for more than TCG has; that is known.
        grep -v "TCG doesn't support requested feature" "$run/qemu.log" >&2
        exit 125
        ;;
    esac
}

# leave_command_in RUN KERNEL COMMAND...: what `run-command` and the inits read; items end in a zero byte.
leave_command_in() {
    local run=$1 kernel=$2
    shift 2
    printf '%s\n' "$repository" >"$run/repository"
    printf '%s\n' "$kernel" >"$run/kernel"
    printf '%s\0' "$@" >"$run/command"
    printf '%s\0' "$PWD" >"$run/directory"
    env -u LIGHTER_TEST_MACHINE -0 >"$run/environment"
}

# start_qemu PROGRAM KERNEL: sets $qemu.
start_qemu() {
    local program=$1 kernel=$2
    # shellcheck disable=SC2054 # QEMU's commas
    local devices=(
        # Throw-away: nothing need reach the host's disk.
        -drive "if=none,id=scratch,format=raw,file=/proc/self/fd/$scratch,cache=unsafe,discard=unmap"
        -device virtio-blk-pci,drive=scratch
        -fsdev "local,id=host,path=/,security_model=none,readonly=on,multidevs=remap"
        -device virtio-9p-pci,fsdev=host,mount_tag=host
        -fsdev "local,id=target,path=${repository//,/,,}/target,security_model=none,multidevs=remap"
        -device virtio-9p-pci,fsdev=target,mount_tag=target
        -netdev user,id=net
        -device virtio-net-pci,netdev=net,romfile=
        -device virtio-rng-pci
        -device virtio-serial-pci
        -chardev "file,id=output,path=$run/output"
        -device virtserialport,chardev=output,name=lighter.output
        -serial "file:$run/console"
    )
    local clock=(-accel "tcg,thread=multi,tb-size=1024") options=''
    if [ -n "$counted" ]; then
        # An instruction takes a nanosecond and waiting takes no time; what is random is the same each time.
        clock=(-accel "tcg,thread=single,tb-size=1024" -icount "shift=0,sleep=off" -rtc "base=2026-01-01,clock=vm" -seed 1)
        options="nokaslr norandmaps"
    fi
    # Not more than one processor unless it is asked for: with two, QEMU 7.2 and 10.0 alike now and then mix up the states
    # of a nested guest and of the machine's own kernel, and a guest, or the machine, hangs or dies. With one, none did.
    #
    # Dies with this script, even when that is killed.
    setpriv --pdeathsig KILL -- "$program" \
        -nodefaults -no-user-config -display none -no-reboot -machine q35 \
        "${clock[@]}" -cpu EPYC,+svm,+npt -smp "$cpus" -m "$memory_mib" \
        -kernel "$kernel/vmlinux" -initrd "$kernel/initramfs" \
        -append "console=ttyS0 quiet panic=-1 tsc=reliable mitigations=off nowatchdog cryptomgr.notests $options lighter.run=$run" \
        "${devices[@]}" </dev/null >"$run/qemu.log" 2>&1 &
    qemu=$!
}

# end_test_machine: leaves nothing behind, however this script ends.
end_test_machine() {
    trap '' HUP INT TERM
    [ -z "$qemu" ] || kill -KILL "$qemu" 2>/dev/null
    [ -z "$receiver" ] || kill -TERM "$receiver" 2>/dev/null
    # Silent about the kill.
    wait 2>/dev/null
    rm -rf "$run"
}

# remove_stale_run_folders: of scripts that were killed.
remove_stale_run_folders() {
    local folder pid
    for folder in /var/tmp/lighter-test-machine.*; do
        pid=${folder#/var/tmp/lighter-test-machine.}
        pid=${pid%%.*}
        [ ! -O "$folder" ] || [ -d "/proc/$pid" ] || rm -rf "$folder"
    done
}
