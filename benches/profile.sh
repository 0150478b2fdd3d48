#!/usr/bin/env bash
# Profile-guided optimisation: the compiler learns from a minute of load which code of the shim belongs together and which way
# most branches go. What was counted is in `profile/`, for each platform
#
#     x86_64-unknown-linux-gnu.profdata.gz      the counts
#     x86_64-unknown-linux-gnu.counted-with     the compiler and the packages that they are of
#
# Only the compiler that counted can be relied on to read them. The names of functions have a hash of the packages below them,
# so that where a package is another one, what depends on it is built as ever; so is code whose own branches have changed.
#
#     profile.sh cargo ARG...   cargo, by the profile if it is of this compiler (`make build`)
#     profile.sh check          says how well the profile fits; fails if it cannot be read
#     profile.sh count          makes the profile anew (`make profile`): builds with counters, runs servers under a containerd of
#                               its own, writes `profile/`; as root, 25 minutes on two cores
#
# Settings, from the environment: CARGO_TARGET_DIR, RUSTFLAGS as cargo has them; TROUPE_CACHE, TROUPE_GUESTS as the Makefile.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
host=$(rustc -vV | sed -n 's/^host: //p')
counts=benches/profile/$host.profdata.gz
counted_with=benches/profile/$host.counted-with
target=$(mkdir -p "${CARGO_TARGET_DIR:-target}/profile" && cd "${CARGO_TARGET_DIR:-target}" && pwd)

shim=containerd-shim-wasmtime-v1
containerd_bin=${TROUPE_CACHE:-$HOME/.cache/troupe}/containerds/2.1/usr/bin
guests=${TROUPE_GUESTS:-$HOME/.cache/troupe/guests}
seconds=5
me=profile
source examples/containerd.sh

main() {
    case ${1-} in
    cargo) shift && by_profile "$@" ;;
    check)
        tell_fit
        unpack >/dev/null
        ;;
    count) count ;;
    *) echo "usage: profile.sh cargo ARG... | check | count" >&2 && exit 2 ;;
    esac
}

by_profile() {
    local profile
    tell_fit >&2
    of_this_compiler || exec cargo "$@"
    profile=$(unpack)
    # A function that has changed since is no matter.
    with_flags "-Cprofile-use=$profile" -Cllvm-args=-no-pgo-warn-mismatch -- "$@"
}

# with_flags FLAG... -- ARG...: cargo with the environment's flags and these, which may hold blanks.
with_flags() {
    local flags
    if [ -n "${CARGO_ENCODED_RUSTFLAGS:-}" ]; then
        IFS=$'\x1f' read -ra flags <<<"$CARGO_ENCODED_RUSTFLAGS"
    else
        read -ra flags <<<"${RUSTFLAGS:-}"
    fi
    while [ "$1" != -- ]; do flags+=("$1") && shift; done
    shift
    (IFS=$'\x1f' && CARGO_ENCODED_RUSTFLAGS="${flags[*]}" exec cargo "$@")
}

# The compiler, then all packages of the shim with their features.
builds_with() {
    rustc -V
    cargo tree --locked --edges normal,build --prefix none --format '{p} {f}' |
        sed 's/ (\*)$//; s/ ([^)]*\/[^)]*)//; s/ *$//' | LC_ALL=C sort -u
}

of_this_compiler() { [ "$(head -n 1 "$counted_with" 2>/dev/null)" = "$(rustc -V)" ]; }

tell_fit() {
    local packages others
    if [ ! -e "$counted_with" ]; then
        echo "profile: there is none for $host: built without, a sixth slower; make profile makes one"
    elif ! of_this_compiler; then
        echo "profile: it is of $(head -n 1 "$counted_with"), this is $(rustc -V): built without, a sixth slower"
    else
        packages=$(builds_with)
        others=$(diff "$counted_with" - <<<"$packages" | grep '^[<>]' || true)
        [ -z "$others" ] || printf 'profile: made with other packages; what uses them is built without (make profile):\n%s\n' "$others"
    fi
}

# Prints where the counts are, if they are of this compiler. The file is named by what is in it, or cargo would not see that it
# is another one.
unpack() {
    local file warnings
    of_this_compiler || return 0
    file=$target/profile/$(sha256sum <"$counts" | cut -c 1-16).profdata
    if [ ! -e "$file" ]; then
        gzip -dc "$counts" >"$file.$$" && mv "$file.$$" "$file" || { rm -f "$file.$$" && fail "$counts is damaged"; }
    fi
    # The compiler takes what it cannot read for a warning.
    warnings=$(echo 'pub fn f() {}' |
        rustc --crate-type lib --crate-name profile --emit obj --out-dir "$target/profile" "-Cprofile-use=$file" - 2>&1)
    [ -z "$warnings" ] || fail "$counts: $warnings"
    echo "$file"
}

count() {
    local profdata
    [ "$(id -u)" = 0 ] || fail "a containerd has to run as root: run this as root"
    profdata=$(rustc --print sysroot)/lib/rustlib/$host/bin/llvm-profdata
    [ -x "$profdata" ] || rustup component add llvm-tools || fail "there is no $profdata: add rustup's component llvm-tools"

    step "Building the shim with counters"
    with_flags "-Cprofile-generate=$target/profile/counts" -- build --release --locked --bin "$shim"
    # What ran while it was built has counted, too.
    rm -rf "$target/profile/counts"
    step "Starting a containerd, and servers that count"
    begin
    mkdir "$work/bin"
    cp "$target/release/$shim" "$work/bin"
    start_containerd "$work/bin"
    serve hello hello-http.wasm
    serve web web.wasm
    serve reused web.wasm --env WASMTIME_HTTP_PROXY_INSTANCE_REUSE=1000
    serve shared web3.wasm --env WASMTIME_HTTP_PROXY_INSTANCE_REUSE=1000
    step "A minute of load"
    load hello / web /hello reused /hello shared /hello web '/json?items=20' reused /inspect web /echo
    load hello / web /hello reused /hello
    programs
    stop
    step "Packing what was counted"
    "$profdata" merge --sparse --output "$work/profdata" "$target"/profile/counts/*.profraw
    mkdir -p "${counts%/*}"
    gzip -9nc "$work/profdata" >"$counts"
    builds_with >"$counted_with"
    unpack >/dev/null
    say "$counts"
}

# serve ID GUEST [OPTION]...
serve() {
    local id=$1 guest=$2
    shift 2
    container --detach --net-host --env WASMTIME_HTTP_PROXY_SOCKET_ADDR=127.0.0.1:0 "$@" "$guest" "$id"
    within 60 "$id listens" address_of "$id"
    say "$id: http://$(address_of "$id") $*"
}

# load [ID PATH]...: what echoes gets a body.
load() {
    local url options
    echo 'wrk.method = "POST"; wrk.body = string.rep("body ", 1000)' >"$work/post.lua"
    while [ $# -gt 0 ]; do
        url=http://$(address_of "$1")$2
        options=(-t1 -c32 "-d$seconds")
        [ "$2" != /echo ] || options+=(-s "$work/post.lua")
        wrk "${options[@]}" "$url" >"$work/wrk"
        ! grep "Non-2xx\|Socket errors" "$work/wrk" || fail "$url does not answer as it should"
        say "$url: $(sed -n 's/^Requests\/sec: *//p' "$work/wrk") requests a second"
        shift 2
    done
}

# Starts and ends of containers.
programs() {
    local number
    for number in 1 2 3 4 5 6 7 8; do
        container --rm hello.wasm "module$number" 1 >/dev/null
        container --rm hello-component.wasm "component$number" 1 >/dev/null
    done
}

# The counts are written when the process ends, which it does by itself.
stop() {
    local id
    for id in hello web reused shared; do
        ctr task kill "$id"
        within 20 "$id has drained" stopped "$id"
        ctr task rm "$id"
        ctr container rm "$id"
    done
    within 30 "the shim's process ends" no_daemon
    compgen -G "$target/profile/counts/*.profraw" >/dev/null || fail "nothing was counted"
}

# container [OPTION]... GUEST ID [ARG]...
container() {
    local options=()
    while [[ $1 == --* ]]; do
        case $1 in
        --env) options+=("$1" "$2") && shift 2 ;;
        *) options+=("$1") && shift ;;
        esac
    done
    local guest=$1 id=$2
    shift 2
    mkdir -p "$work/$id"
    cp "$guests/$guest" "$work/$id/app.wasm"
    ctr run --runtime io.containerd.wasmtime.v1 --runtime-config-path "$work/options.toml" "${options[@]}" --rootfs \
        "$work/$id" "$id" /app.wasm "$@"
}

main "$@"
