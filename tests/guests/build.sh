#!/usr/bin/env bash
# Builds the wasm programs of tests, demo and benches from source (`make guests` calls it).
#
#     tests/guests/build.sh [rust] [js] [py]
#
# Without an argument all of them. Progress is on stderr; the last line, alone on stdout, is the folder of the outputs:
#
#     rust   hello.wasm  kit.wasm  exports.wasm       programs, modules for WASI preview 1
#            hello-component.wasm …                   the same three as components for WASI 0.2
#            hello-http.wasm  web.wasm  connect.wasm  HTTP servers, components for WASI 0.2
#            net.wasm                                 a program with sockets, component for WASI 0.2
#            cli3.wasm  net3.wasm  web3.wasm          programs and an HTTP server, components for WASI 0.3
#     js     js.wasm                                  an HTTP server by another toolchain (others.sh)
#     py     py.wasm                                  and by a third
#
# What each can do is in the header of its first source file. The text files of `wat/` need no building: tests compile
# them.
#
# Settings, from the environment:
#     TROUPE_GUESTS          the folder, never one under git          default: ~/.cache/troupe/guests
#     TROUPE_GUESTS_TARGET   auto | installed | debian                default: auto
#         installed: the Rust of the PATH has the target wasm32-wasip1 (or rustup can add it)
#         debian:    Debian's rustc-web builds the standard library for it; packages are installed when missing
#         auto:      the first, and the second where the first cannot be had
#
# Nothing is done where the sources are those of the last build. Runs at the same time wait for each other, and each
# output appears under its name in one step, complete.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
out=${TROUPE_GUESTS:-${HOME:?set HOME or TROUPE_GUESTS}/.cache/troupe/guests}
want=${TROUPE_GUESTS_TARGET:-auto}
target=wasm32-wasip1
programs=(exports hello kit)
libraries=(cli3 connect hello-http net net3 web web3)
debian_libc=/usr/lib/wasm32-wasi
cannot="no target $target here, and rustup cannot add it"

# The other toolchains: build_js, build_py.
# shellcheck source-path=SCRIPTDIR source=others.sh
. "$here/others.sh"

main() {
    mkdir -p "$out"
    out=$(cd "$out" && pwd)
    exec 9>"$out/.lock"
    if ! flock --nonblock 9; then
        say "another run builds into $out: waiting for it"
        flock 9
    fi
    # An inherited setting must not decide what the guests are built with or where they go.
    unset RUSTFLAGS CARGO_ENCODED_RUSTFLAGS CARGO_BUILD_TARGET CARGO_TARGET_DIR RUSTC RUSTC_WRAPPER
    unset NODE_OPTIONS PYTHONHOME PYTHONPATH VIRTUAL_ENV
    local kind
    [ $# -gt 0 ] || set -- rust js py
    for kind; do
        case $kind in
        rust) unless_current rust "${programs[*]} ${programs[*]/%/-component} ${libraries[*]}" \
            build.sh Cargo.toml Cargo.lock "${programs[@]}" "${libraries[@]}" realloc componentize ;;
        js | py) unless_current "$kind" "$kind" others.sh "$kind" wit ;;
        *) say "there is nothing called '$kind'; it can be rust, js or py" && exit 1 ;;
        esac
    done
    echo "$out"
}

# unless_current KIND OUTPUTS SOURCE...: calls build_KIND where an output is missing or a source has changed. What it is
# built with does not count: an update of Rust is no reason to build everything again.
unless_current() {
    local kind=$1 outputs=$2 sources output
    shift 2
    sources=$(cd "$here" && find "$@" -type f -print0 | LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum)
    if [ "$(cat "$out/.sources-$kind" 2>/dev/null)" = "$sources" ]; then
        for output in $outputs; do
            [ -s "$out/$output.wasm" ] || sources=
        done
        if [ -n "$sources" ]; then
            say "$kind: up to date"
            return
        fi
    fi
    rm -f "$out/.sources-$kind"
    "build_$kind"
    echo "$sources" >"$out/.sources-$kind"
}

build_rust() {
    build_modules
    build_components
}

build_modules() {
    local guest
    case $want in
    auto) if has_target; then want=installed; else say "$cannot: taking Debian's Rust" && want=debian; fi ;;
    installed) has_target || { say "$cannot"; exit 1; } ;;
    debian) ;;
    *) say "TROUPE_GUESTS_TARGET is '$want'; it can be auto, installed or debian" && exit 1 ;;
    esac
    modules=$out/.build/$want/$target/release
    if [ "$want" = debian ]; then
        need_packages 'Rust with the sources of its library, WASI'"'s C library and linker" \
            "install a Rust with the target $target, e.g. https://rustup.rs" \
            rustc-web cargo-web rust-web-src wasi-libc lld
        say "building for $target with $(/usr/bin/rustc --version), standard library included (minutes at first)"
        cargo_debian
    else
        say "building for $target with $(cd "$here" && rustc --version)"
        (cd "$here" && cargo build --release --locked --target "$target" --target-dir "$out/.build/$want") >&2 9>&-
    fi
    for guest in "${programs[@]}"; do
        cp "$modules/$guest.wasm" "$out/.$guest.unfinished"
        mv "$out/.$guest.unfinished" "$out/$guest.wasm"
    done
}

# True when the Rust of the PATH can build for the target, after rustup has added it if need be.
has_target() {
    command -v rustc >/dev/null && command -v cargo >/dev/null || return 1
    target_is_there && return 0
    command -v rustup >/dev/null || return 1
    say "rustup target add $target (the guests' target)"
    (cd "$here" && timeout 300 rustup target add "$target") >&2 9>&- && target_is_there
}

target_is_there() {
    local folder
    folder=$(cd "$here" && rustc --print target-libdir --target "$target" 2>/dev/null) || return 1
    compgen -G "$folder/libstd-*.rlib" >/dev/null
}

# How a module begins is the one difference between programs and libraries, and only what is linked last may know of it:
# flags for everything would build the standard library twice.
cargo_debian() {
    local guest
    for guest in "${programs[@]}"; do
        debian_rustc --package "$guest" --bin "$guest" -- "-Clink-arg=$debian_libc/crt1-command.o"
    done
    for guest in "${libraries[@]}"; do
        debian_rustc --package "$guest" --lib -- "-Clink-arg=$debian_libc/crt1-reactor.o"
    done
}

debian_rustc() {
    local flags='"-Clink-self-contained=no", "-L'$debian_libc'", "-Clinker=/usr/bin/wasm-ld", "-Clink-arg=-lc"'
    # RUSTC_BOOTSTRAP: building the standard library is not yet for a stable compiler, and this one is used for no more.
    (cd "$here" && RUSTC=/usr/bin/rustc RUSTC_BOOTSTRAP=1 /usr/bin/cargo rustc --release --locked --target "$target" \
        --target-dir "$out/.build/debian" -Zbuild-std=std,panic_abort --config "target.$target.rustflags=[$flags]" \
        "$@") >&2 9>&-
}

# need_packages WHAT OTHERWISE PACKAGE...: what they are for, and what to do where they cannot be had.
need_packages() {
    local what=$1 otherwise=$2 missing=() package
    shift 2
    for package; do
        dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    say "missing: ${missing[*]} ($what)"
    if ! command -v apt-get >/dev/null; then
        say "this is no Debian; $otherwise, and run this again"
        exit 1
    elif [ "$(id -u)" != 0 ]; then
        say "installing needs root; run this, then try again:  sudo apt-get install ${missing[*]}"
        exit 1
    fi
    say "apt-get install ${missing[*]}"
    apt-get update >&2 9>&- || say "apt-get update failed; trying with the lists there are"
    if ! DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends "${missing[@]}" >&2 9>&-; then
        say "apt-get cannot install them; $otherwise, and run this again"
        exit 1
    fi
}

build_components() {
    local guest world
    build_tool
    for guest in "${programs[@]}"; do
        world=()
        [ -f "$here/$guest/$guest.wit" ] && world=("$here/$guest/$guest.wit")
        "$tool" new "$out/$guest.wasm" "$out/$guest-component.wasm" "${world[@]}" >&2
        "$tool" check "$out/$guest.wasm" "$out/$guest-component.wasm" >&2
    done
    for guest in "${libraries[@]}"; do
        # Cargo names the file of a library after the crate, and a crate's name has no hyphen.
        "$tool" new "$modules/${guest//-/_}.wasm" "$out/$guest.wasm" >&2
        "$tool" check "$out/$guest.wasm" >&2
    done
}

# The host program that makes components and checks them.
build_tool() {
    local cargo=cargo
    command -v cargo >/dev/null || cargo=/usr/bin/cargo
    tool=$out/.build/host/debug/componentize
    (cd "$here/componentize" && "$cargo" build --locked --target-dir "$out/.build/host") >&2 9>&-
}

say() {
    echo "guests: $*" >&2
}

main "$@"
