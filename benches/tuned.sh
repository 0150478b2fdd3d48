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
work=
containerd_pid=

main() {
    local profdata profile
    [ "$(id -u)" = 0 ] || fail "a containerd has to run as root: run this as root"
    profdata=$(rustc --print sysroot)/lib/rustlib/$host/bin/llvm-profdata
    [ -x "$profdata" ] || rustup component add llvm-tools || fail "there is no $profdata: add rustup's component llvm-tools"
    trap clean_up EXIT
    trap 'exit 130' INT TERM HUP

    step "Building the shim with counters"
    rm -rf "$out/counts"
    build "-Cprofile-generate=$out/counts"
    step "Starting a containerd, and servers that count"
    start_containerd
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

# build FLAG. With a target, so that what runs while building has no counters.
build() {
    (cd "$repo" && RUSTFLAGS="${RUSTFLAGS:-} $1" \
        cargo build --release --bin "$shim" --target "$host" --target-dir "$out/build")
}

start_containerd() {
    work=$(mktemp -d /tmp/troupe.XXXXXX)
    mkdir "$work/bin"
    ln "$out/build/$host/release/$shim" "$work/bin/$shim" 2>/dev/null || cp "$out/build/$host/release/$shim" "$work/bin/$shim"
    cat >"$work/config.toml" <<-END
		version = 3
		root = "$work/root"
		state = "$work/state"
		disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime"]
		[grpc]
		address = "$work/c.sock"
		[ttrpc]
		address = "$work/t.sock"
	END
    printf 'cache_dir = "%s/cache"\nidle_timeout = "1s"\n' "$work" >"$work/options.toml"
    PATH=$work/bin:$containerd_bin:$PATH setsid "$containerd_bin/containerd" --config "$work/config.toml" \
        >"$work/log" 2>&1 </dev/null &
    containerd_pid=$!
    disown "$containerd_pid"
    within 20 "containerd answers" ctr version
}

# serve ID GUEST [OPTION]...
serve() {
    local id=$1 guest=$2
    shift 2
    container --detach --net-host --env WASMTIME_HTTP_PROXY_SOCKET_ADDR=127.0.0.1:0 "$@" "$guest" "$id"
    within 60 "$id listens" address "$id"
    say "$id: http://$(address "$id") $*"
}

address() {
    sed -n "s/.*listening container=tuned\/$1 addr=\([0-9.:]*\).*/\1/p" "$work/log" | grep .
}

# load [ID PATH]...: what echoes gets a body.
load() {
    local url options
    echo 'wrk.method = "POST"; wrk.body = string.rep("body ", 1000)' >"$work/post.lua"
    while [ $# -gt 0 ]; do
        url=http://$(address "$1")$2
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
    within 30 "the shim's process ends" counted
    compgen -G "$out/counts/*.profraw" >/dev/null || fail "nothing was counted"
}

counted() { [ -z "$(daemons)" ]; }
stopped() { [ "$(ctr task ls | awk -v id="$1" '$1 == id { print $3 }')" = STOPPED ]; }

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

ctr() {
    timeout -s KILL 60 "$containerd_bin/ctr" --address "$work/c.sock" --namespace tuned "$@" </dev/null
}

# The daemons of our containerd: its socket is in their arguments.
daemons() {
    local process
    for process in /proc/[0-9]*; do
        if tr '\0' ' ' <"$process/cmdline" | grep -q "^[^ ]*$shim serve .*\"$work/"; then echo "${process#/proc/}"; fi
    done 2>/dev/null
}

clean_up() {
    local code=$? pid
    trap '' INT TERM HUP
    [ -n "$work" ] || exit "$code"
    [ "$code" = 0 ] || tail -n 15 "$work/log" >&2 || true
    for pid in $(daemons) $containerd_pid; do kill -9 "$pid" 2>/dev/null || true; done
    awk -v work="$work/" 'index($2, work) == 1 { print $2 }' /proc/self/mounts | sort -r | while read -r mount; do
        umount -l "$mount"
    done
    rm -rf "$work"
    exit "$code"
}

step() { printf '\n%s\n' "$*"; }
say() { echo "   $*"; }
fail() { echo "tuned: $*" >&2 && exit 1; }

# within SECONDS WHAT COMMAND...: tries the command until it succeeds.
within() {
    local deadline=$((SECONDS + $1)) what=$2
    shift 2
    until "$@" >/dev/null 2>&1; do
        [ $SECONDS -lt $deadline ] || fail "not so: $what"
        sleep 0.1
    done
}

main "$@"
