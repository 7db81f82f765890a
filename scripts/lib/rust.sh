# shellcheck shell=bash
# Makes sure that there is a Rust toolchain that can build Lighter. Source it after common.sh.

# The oldest that is known to work: rust-version in Cargo.toml.
oldest_rust=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' "${repo:?}/Cargo.toml")

rust_is_new_enough() {
    local version
    version=$(cargo --version 2>/dev/null | cut -d' ' -f2) || return 1
    [ "$(printf '%s\n' "$oldest_rust" "${version:-0}" | sort -V | head -n 1)" = "$oldest_rust" ]
}

# libcap-ng is of the FUSE server.
need_packages gcc libc6-dev libcap-ng-dev
if ! rust_is_new_enough; then
    # Debian keeps a current toolchain under this name, for its browsers.
    need_packages cargo-web rustc-web
    rust_is_new_enough ||
        die "Rust $oldest_rust or newer is needed and Debian's packages have none; install it from https://rustup.rs"
fi
