# shellcheck shell=bash
# The kernel and the initramfs of the test machine. Source it after common.sh.
#
# The kernel is Debian's own for the host's release, unpacked into the cache and never installed. It
# need not be the newest: whatever the cache holds for this release is used again.

# In the initramfs: what the root needs, the console that carries the output, and what has no device
# node before it is loaded. Everything else comes by modprobe from /lib/modules.
TEST_MACHINE_MODULES=(
    virtio_pci virtio_blk virtio_console virtio_net virtio-rng
    9p 9pnet_virtio overlay crc32c_generic ext4
    kvm-amd tun fuse
)

# test_machine_kernel HERE: prints the folder that holds vmlinux, initramfs and modules/, made if missing.
# HERE is the folder of this file.
test_machine_kernel() {
    local here=$1 release key dir
    # shellcheck source=/dev/null
    release=$(. /etc/os-release && printf '%s\n' "${VERSION_CODENAME:-unknown}")
    key=$(content_hash "$here/kernel.sh" "$here/module-order.awk" "$here/initramfs-init" <<<"$release") || return 1
    dir=$(cache_dir)/test-machine-$key || return 1
    cached_folder "$dir" vmlinux make_test_machine_kernel "$here" "$dir"
}

# make_test_machine_kernel HERE DIR: builds the folder aside and renames it, so that a broken one is never used.
make_test_machine_kernel() (
    set -e
    folder=$1 dir=$2
    need_packages busybox-static cpio xz-utils
    tmp=$(mktemp -d "$dir.XXXXXX")
    trap 'rm -rf "$tmp"' EXIT
    cd "$tmp"
    find_kernel_package
    log "downloading $package for the test machine"
    # apt-get warns that it cannot drop its rights in this folder; that is no error.
    apt-get download -q "$package" >apt.log 2>&1 || {
        cat apt.log >&2
        die "cannot download $package; check the network and /etc/apt/sources.list"
    }
    dpkg-deb -x ./*.deb tree
    version=$(basename tree/boot/vmlinuz-*)
    version=${version#vmlinuz-}
    mkdir -p modules
    # Debian 13 ships them compressed, which busybox cannot be relied on to load.
    find tree -name '*.ko.xz' -exec xz -d {} +
    for root in tree/lib/modules tree/usr/lib/modules; do
        [ ! -d "$root/$version" ] || mv "$root/$version" modules/
    done
    # depmod expects lib/modules below its root.
    mkdir -p base/lib
    mv modules base/lib/
    busybox depmod -b "$tmp/base" "$version"
    mv base/lib/modules .
    make_initramfs "$folder" "$version" >initramfs
    extract_vmlinux "tree/boot/vmlinuz-$version" >vmlinux.part
    rm -rf tree base ./*.deb apt.log
    mv vmlinux.part vmlinux
    rm -rf "$dir"
    mv "$tmp" "$dir"
)

# find_kernel_package: sets $package to the one that linux-image-amd64 stands for.
find_kernel_package() {
    package=$(kernel_package_in_lists)
    if [ -z "$package" ]; then
        can_be_root || die "apt knows no kernel; an administrator must run: apt-get update"
        as_root apt-get -q update >&2 || die "apt-get update failed; check the network and /etc/apt/sources.list"
        package=$(kernel_package_in_lists)
        [ -n "$package" ] || die "apt has no linux-image-amd64; the test machine needs Debian's archive"
    fi
}

kernel_package_in_lists() {
    apt-cache depends linux-image-amd64 2>/dev/null | sed -n 's/^ *Depends: \(linux-image-[0-9].*\)$/\1/p' | head -n 1
}

# extract_vmlinux VMLINUZ: QEMU starts the bare ELF by its PVH entry, which saves the emulated CPU from
# unpacking xz, some seconds.
extract_vmlinux() {
    local offset
    while IFS=: read -r offset _; do
        # The payload is followed by other bytes, at which xz complains after it has written all.
        tail -c +$((offset + 1)) "$1" | xz -dc --single-stream >payload 2>/dev/null || true
        if [ "$(head -c 4 payload | tail -c 3)" = ELF ]; then
            cat payload
            rm payload
            return 0
        fi
    done < <(LC_ALL=C grep -obUaP '\xFD7zXZ\x00' "$1" | tr '\0' '\n')
    die "$1 holds no xz-compressed kernel"
}

# make_initramfs HERE VERSION: a cpio archive with busybox, init, and the modules in the order to load them.
make_initramfs() (
    set -e
    folder=$1 modules=$PWD/modules/$2
    mkdir initramfs.d
    cd initramfs.d
    mkdir bin dev proc sys host scratch root modules
    cp "$(command -v busybox)" bin/busybox
    cp "$folder/initramfs-init" init
    chmod 755 init bin/busybox
    awk -f "$folder/module-order.awk" "$modules/modules.dep" "${TEST_MACHINE_MODULES[@]}" >order
    number=100
    while read -r path; do
        cp "$modules/$path" "modules/$number-${path##*/}"
        number=$((number + 1))
    done <order
    rm order
    find . | LC_ALL=C sort | cpio -o -H newc --quiet
    cd ..
    rm -rf initramfs.d
)
