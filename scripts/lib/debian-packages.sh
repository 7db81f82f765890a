# shellcheck shell=bash
# Fetches packages of a Debian release without touching the host's own packages, as any user.
# Source it after common.sh.

# fetch_debian_packages SUITE DIR PACKAGE...: downloads the packages with all that they depend on into
# DIR, checked against Debian's archive keys, and prints their sorted name=version list.
fetch_debian_packages() {
    local suite=$1 dir=$2 keyring=/usr/share/keyrings/debian-archive-keyring.gpg mirror=http://deb.debian.org
    shift 2
    local options=(
        -q -o "Dir::State=$dir/state" -o "Dir::State::status=$dir/state/status" -o "Dir::Cache=$dir/cache"
        -o "Dir::Cache::archives=$dir" -o "Dir::Etc::sourcelist=$dir/state/sources.list" -o Dir::Etc::sourceparts=/dev/null
        -o Dir::Etc::preferences=/dev/null -o Dir::Etc::preferencesparts=/dev/null
        -o Dir::Etc::trusted=/dev/null -o Dir::Etc::trustedparts=/dev/null
        -o APT::Architecture=amd64 -o APT::Architectures=amd64 -o APT::Default-Release=
        -o APT::Sandbox::User= -o Acquire::Languages=none -o Acquire::Retries=3
        -o APT::Install-Recommends=false -o Debug::NoLocking=true
    )
    mkdir -p "$dir/partial" "$dir/state/lists/partial" "$dir/cache"
    : >"$dir/state/status"
    printf 'deb [signed-by=%s] %s %s main\n' "$keyring" "$mirror/debian" "$suite" \
        "$keyring" "$mirror/debian" "$suite-updates" \
        "$keyring" "$mirror/debian-security" "$suite-security" >"$dir/state/sources.list"
    # The host's hooks (for its own package lists) have no business here.
    cat >"$dir/state/apt.conf" <<'TEXT'
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
#clear DPkg::Pre-Invoke;
#clear DPkg::Pre-Install-Pkgs;
#clear DPkg::Post-Invoke;
TEXT
    options+=(-c "$dir/state/apt.conf")
    if ! { apt-get "${options[@]}" -o APT::Update::Error-Mode=any update &&
        apt-get "${options[@]}" -y --download-only install "$@"; } >"$dir/state/log" 2>&1; then
        tail -n 20 "$dir/state/log" >&2
        die "cannot fetch packages of Debian $suite from $mirror; the messages are above. Is the network there, and debian-archive-keyring up to date?"
    fi
    local deb
    for deb in "$dir"/*.deb; do
        # shellcheck disable=SC2016 # the variables are dpkg-deb's
        dpkg-deb --show --showformat '${Package}=${Version}\n' "$deb"
    done | LC_ALL=C sort
}

# unpack_debian_packages DIR TREE: unpacks each package of DIR into a folder of its own, TREE/PACKAGE.
unpack_debian_packages() {
    local deb package
    for deb in "$1"/*.deb; do
        package=$(dpkg-deb --field "$deb" Package)
        mkdir -p "$2/$package"
        dpkg-deb --fsys-tarfile "$deb" | tar -x --no-same-owner -C "$2/$package" -f - \
            --exclude=./usr/share/doc --exclude=./usr/share/man --exclude=./usr/share/locale
    done
}
