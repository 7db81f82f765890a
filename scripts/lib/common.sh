# shellcheck shell=bash
# Helpers shared by the scripts of this folder. Source it, do not run it.
#
# Progress and errors go to stderr, so that stdout stays free for results.

# log TEXT...: one line of progress.
log() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }

# die TEXT...: one line saying what failed and what to do, then exit 1.
die() { printf '%s: error: %s\n' "${0##*/}" "$*" >&2; exit 1; }

# usage_error TEXT...: as die, for a wrong command line (exit 2).
usage_error() { printf '%s: error: %s (see --help)\n' "${0##*/}" "$*" >&2; exit 2; }

# as_root COMMAND...: runs COMMAND as root, by sudo without a password when not root already.
as_root() {
    if [ "$(id -u)" -eq 0 ]; then
        "$@"
    else
        sudo -n -- "$@"
    fi
}

# can_be_root: whether as_root would work.
can_be_root() {
    [ "$(id -u)" -eq 0 ] || { command -v sudo >/dev/null && sudo -n true 2>/dev/null; }
}

# package_installed PACKAGE: whether dpkg has it installed.
package_installed() {
    [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" = installed ]
}

# need_packages PACKAGE...: installs the Debian packages that are missing; without a way to become
# root, ends with the one line that an administrator must run.
need_packages() {
    local package missing=()
    for package in "$@"; do
        package_installed "$package" || missing+=("$package")
    done
    [ "${#missing[@]}" -gt 0 ] || return 0
    command -v apt-get >/dev/null ||
        die "these Debian packages are missing and there is no apt-get: ${missing[*]}"
    can_be_root ||
        die "missing packages; an administrator must run: apt-get install --no-install-recommends ${missing[*]}"
    log "installing ${missing[*]}"
    local run=(env DEBIAN_FRONTEND=noninteractive apt-get -y -q -o DPkg::Lock::Timeout=600)
    # The package lists may be absent or old; a failed update is only fatal when the installation then fails.
    as_root "${run[@]}" update >&2 || log "apt-get update failed; trying with the lists there are"
    as_root "${run[@]}" install --no-install-recommends "${missing[@]}" >&2 ||
        die "apt-get could not install: ${missing[*]}"
}

# cache_dir: the folder of everything that can be built again, made if missing.
cache_dir() {
    local dir="${XDG_CACHE_HOME:-${HOME:?HOME is not set}/.cache}/lighter"
    mkdir -p "$dir" || die "cannot make the cache folder $dir; set XDG_CACHE_HOME to a writable one"
    printf '%s\n' "$dir"
}

# content_hash FILE...: 16 hexadecimal digits over the names and contents of the files, and over stdin.
# Always give it a stdin (`</dev/null` or a here-string).
content_hash() {
    {
        local file sum
        for file in "$@"; do
            sum=$(sha256sum <"$file") || return 1
            printf '%s %s\n' "${sum%% *}" "${file##*/}"
        done
        cat
    } | sha256sum | cut -c1-16
}

# lock_file PATH: waits for an exclusive lock that lasts until this shell ends.
lock_file() {
    exec {LIGHTER_LOCK_FD}>"$1" || die "cannot open the lock file $1"
    if ! flock -n "$LIGHTER_LOCK_FD"; then
        log "waiting for another ${0##*/} (lock $1)"
        flock "$LIGHTER_LOCK_FD" || die "cannot lock $1"
    fi
}

# cached_folder DIR FILE COMMAND...: prints DIR, a folder of the cache named NAME-HASH; runs COMMAND, which makes it with FILE in it,
# if it is missing, and one such command at a time.
cached_folder() {
    local dir=$1 file=$2
    shift 2
    [ -e "$dir/$file" ] || (
        lock_file "${dir%-*}.lock"
        [ -e "$dir/$file" ] || "$@"
    ) || return 1
    printf '%s\n' "$dir"
}

# elapsed_since EPOCH_SECONDS: whole seconds since then.
elapsed_since() { echo $(($(date +%s) - $1)); }
