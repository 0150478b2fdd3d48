#!/usr/bin/env bash
# Builds the shim for what its requests do (`make tuned`; profile-guided optimisation): once with counters, which a minute of
# load fills, and once more by what they counted. The compiler then knows which code belongs together and which way most
# branches go. Two whole builds, three quarters of an hour on two cores; as root, because a containerd runs in between.
#
#     benches/tuned.sh DIR      makes DIR/containerd-shim-wasmtime-v1
#
# Code that the load does not reach is built as ever. Settings, from the environment: TROUPE_CACHE and TROUPE_GUESTS, as in
# the Makefile.
set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
out=$(mkdir -p "${1:?usage: tuned.sh DIR}" && cd "$1" && pwd)
shim=containerd-shim-wasmtime-v1
containerd_bin=${TROUPE_CACHE:-$HOME/.cache/troupe}/containerds/2.1/usr/bin
guests=${TROUPE_GUESTS:-$HOME/.cache/troupe/guests}
host=$(rustc -vV | sed -n 's/^host: //p')
seconds=5
me=tuned
source "$repo/examples/containerd.sh"

main() {
    local profdata profile
    [ "$(id -u)" = 0 ] || fail "a containerd has to run as root: run this as root"
    profdata=$(rustc --print sysroot)/lib/rustlib/$host/bin/llvm-profdata
    [ -x "$profdata" ] || rustup component add llvm-tools || fail "there is no $profdata: add rustup's component llvm-tools"

    step "Building the shim with counters"
    rm -rf "$out/counts"
    build "-Cprofile-generate=$out/counts"
    step "Starting a containerd, and servers that count"
    begin
    start_containerd "$out/build/$host/release"
    serve hello hello-http.wasm
    serve web web.wasm
    serve reused web.wasm --env WASMTIME_HTTP_PROXY_INSTANCE_REUSE=1000
    serve shared web3.wasm --env WASMTIME_HTTP_PROXY_INSTANCE_REUSE=1000
    step "A minute of load"
    load hello / web /hello reused /hello shared /hello web '/json?items=20' reused /inspect web /echo
    load hello / web /hello reused /hello
    programs
    stop
    step "Building the shim by what was counted"
    "$profdata" merge --sparse --output "$out/profile" "$out"/counts/*.profraw
    rm -f "$out"/*.profdata
    # Named by what is in it, or cargo would not see that it is another one.
    profile=$out/$(sha256sum <"$out/profile" | cut -c 1-16).profdata
    mv "$out/profile" "$profile"
    build "-Cprofile-use=$profile"
    install -m 0755 "$out/build/$host/release/$shim" "$out/$shim"
    say "$out/$shim"
}

# build FLAG. With a target, so that what runs while building has no counters. The flag may hold a blank, RUSTFLAGS could not.
build() {
    local flags
    read -ra flags <<<"${RUSTFLAGS:-}"
    (cd "$repo" && IFS=$'\x1f' && CARGO_ENCODED_RUSTFLAGS="${flags[*]}${flags:+$IFS}$1" \
        cargo build --release --bin "$shim" --target "$host" --target-dir "$out/build")
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
    compgen -G "$out/counts/*.profraw" >/dev/null || fail "nothing was counted"
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
