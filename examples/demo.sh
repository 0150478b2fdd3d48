#!/usr/bin/env bash
# The demo (`make demo`): builds everything, then runs wasm containers under a containerd of its own and checks what it
# sees. Exit code 0: all of it worked. The system's containerd is never touched: this one has its root, state and socket
# in a folder of /tmp, and is gone afterwards.
#
# Settings, from the environment; none is needed:
#     TROUPE_CONTAINERD_BIN   folder of `containerd` and `ctr`               default: those of the PATH, else by apt-get
#     TROUPE_BIN              folder of the shim and of `oci-tar-builder`    default: built by cargo (release profile)
#     TROUPE_GUESTS           folder of the built guests                     default: ~/.cache/troupe/guests
#     CARGO_TARGET_DIR        where cargo builds                             default: target
set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
shim=containerd-shim-wasmtime-v1
runtime=io.containerd.wasmtime.v1
image=localhost/troupe/hello:demo
me=demo
source "$repo/examples/containerd.sh"

main() {
    case ${1:-} in
    "") prepare ;;
    run) shift && show "$@" ;;
    *) fail "$0 takes no arguments; its settings are in its first lines" ;;
    esac
}

# --- First half, as the user who called: what has to be there ---------------------------------------------------------

prepare() {
    step "Looking for what the demo needs"
    need_cargo
    need_containerd
    command -v curl >/dev/null || install curl "the client of the http server"
    [ "$(id -u)" = 0 ] || command -v sudo >/dev/null ||
        fail "containerd has to run as root, and there is no sudo: run this as root"
    step "Building the guests (wasm programs)"
    local guests bin
    guests=$("$repo/tests/guests/build.sh" rust | tail -n 1)
    bin=${TROUPE_BIN:-}
    if [ -z "$bin" ]; then
        step "Building the shim (release profile; many minutes the first time)"
        "$repo/benches/profile.sh" cargo build --release --workspace --bins
        bin=$(cd "$repo" && cd "${CARGO_TARGET_DIR:-target}/release" && pwd)
    fi
    [ -x "$bin/$shim" ] && [ -x "$bin/oci-tar-builder" ] || fail "$bin does not hold $shim and oci-tar-builder"
    if [ "$(id -u)" = 0 ]; then
        show "$bin" "$guests" "$containerd_bin"
    else
        say "containerd has to run as root: sudo"
        exec sudo "$repo/examples/demo.sh" run "$bin" "$guests" "$containerd_bin"
    fi
}

need_cargo() {
    [ -z "${TROUPE_BIN:-}" ] || return 0
    command -v cargo >/dev/null || fail "there is no cargo: install Rust (https://rustup.rs) and try again"
    say "cargo: $(cd "$repo" && cargo --version)"
    command -v cc >/dev/null || install gcc libc6-dev "a C compiler, which Rust links with"
    command -v make >/dev/null || install make "builds the allocator"
    [ -n "${PROTOC:-}" ] || command -v protoc >/dev/null ||
        install protobuf-compiler "protoc, which compiles the messages of containerd's API"
}

need_containerd() {
    containerd_bin=${TROUPE_CONTAINERD_BIN:-}
    if [ -z "$containerd_bin" ]; then
        # A user's PATH often lacks the folders where an administrator's programs are.
        PATH=$PATH:/usr/local/sbin:/usr/sbin
        command -v containerd >/dev/null && command -v ctr >/dev/null ||
            install containerd "runs the containers; the shim is its plug-in"
        containerd_bin=$(dirname "$(command -v containerd)")
    fi
    [ -x "$containerd_bin/containerd" ] && [ -x "$containerd_bin/ctr" ] ||
        fail "$containerd_bin does not hold containerd and ctr: set TROUPE_CONTAINERD_BIN to a folder that does"
    say "containerd: $containerd_bin/containerd $("$containerd_bin/containerd" --version | awk '{print $3}')"
}

# Installs Debian packages; the last argument says what for.
install() {
    local why=${*: -1} packages=("${@:1:$#-1}")
    say "missing: ${packages[*]} ($why)"
    command -v apt-get >/dev/null ||
        fail "there is no apt-get here: install ${packages[*]} in this system's way and try again"
    [ "$(id -u)" = 0 ] || fail "installing needs root; run this, then try again:  sudo apt-get install ${packages[*]}"
    say "apt-get install ${packages[*]}"
    apt-get -qq update || say "apt-get update failed: trying with the lists there are"
    DEBIAN_FRONTEND=noninteractive apt-get -qq --yes --no-install-recommends install "${packages[@]}" ||
        fail "apt-get cannot install ${packages[*]}"
}

# --- Second half, as root ---------------------------------------------------------------------------------------------

show() {
    bin=$1 guests=$2 containerd_bin=$3
    begin
    start_private
    import_image
    run_detached
    look_inside
    share_one_process
    stop_with_sigterm
    run_in_the_foreground
    serve_http
    drain_under_load
    leave_nothing
    printf '\nThe demo worked.\n'
}

start_private() {
    step "Starting a private containerd in $work"
    start_containerd "$bin"
    # Inside another container overlayfs may not be had.
    snapshotter=native
    if ctr plugins ls | awk '$2 == "overlayfs" && $NF == "ok" { ok = 1 } END { exit !ok }'; then snapshotter=overlayfs; fi
    say "pid $containerd_pid, snapshotter $snapshotter"
}

import_image() {
    step "Packing the guest into an image and importing it"
    shown "$bin/oci-tar-builder" --rootfs --repo localhost/troupe --name hello --tag demo --env GREETING=hello \
        --module "$guests/hello.wasm" --module "$guests/hello-component.wasm" --entrypoint /hello.wasm \
        --out-path "$work/hello.tar"
    ctr image import --snapshotter "$snapshotter" "$work/hello.tar" >/dev/null
    ctr image ls | contains "$image" "the image is there"
}

run_detached() {
    step "Running it detached; its log, as \`kubectl logs -f\` would show it"
    start hello /hello.wasm 120 500
    follow hello "step 4 of 120"
    logged hello "hello from wasi/wasm32" "the guest sees WASI, not Linux"
    logged hello "argument 1: 120" "the guest has its arguments"
    logged hello "environment GREETING=hello" "the guest has the image's environment"
    logged hello "environment NAME=hello" "the guest has the environment of --env"
    ! grep -q "environment HOME=\|environment TTRPC_ADDRESS=" "$work/hello.log" || fail "the guest sees the shim's environment"
}

look_inside() {
    step "While it runs: tasks, processes, metrics"
    ctr task ls | tee "$work/ls" | indented
    ctr task ps hello | indented
    ctr task metrics hello | tee "$work/metrics" | indented
    [ "$(status_of hello)" = RUNNING ] || fail "hello does not run"
    awk '$1 ~ /^memory.usage/ && $2 > 65535 { ok = 1 } END { exit !ok }' "$work/metrics" ||
        fail "ctr task metrics shows no memory"
}

share_one_process() {
    step "Two more containers, one of them from a WASI 0.2 component: they share the process of the first"
    start second /hello.wasm 120 500
    start third /hello-component.wasm 4 500
    logged third "hello from wasi/wasm32" "the component runs"
    # The pid of a task is a thread of the daemon.
    local id daemons=()
    for id in hello second third; do
        daemons+=("$(awk '$1 == "Tgid:" { print $2 }' "/proc/$(pid_of "$id")/status")")
        say "$id: task pid $(pid_of "$id"), a thread of process ${daemons[-1]}"
    done
    [ "${daemons[0]}" = "${daemons[1]}" ] && [ "${daemons[0]}" = "${daemons[2]}" ] || fail "they are not in one process"
    say "process ${daemons[0]}: $(tr '\0' '\n' <"/proc/${daemons[0]}/cmdline" | sed 1q), $(
        awk '$1 == "Pss:" { printf "%.1f MiB of memory (PSS)", $2 / 1024 }' "/proc/${daemons[0]}/smaps_rollup") in all"
    within 10 "third ends by itself" stopped third
    ended third 0
}

stop_with_sigterm() {
    step "SIGTERM to the first; SIGKILL to the second"
    shown ctr task kill --signal SIGTERM hello
    within 5 "hello ends" stopped hello
    [ "$(status_of second)" = RUNNING ] || fail "the signal for hello ended its neighbour"
    ended hello 143
    ctr task kill --signal SIGKILL second
    within 5 "second ends" stopped second
    ended second 137
}

run_in_the_foreground() {
    step "In the foreground: the exit code of \`ctr run\` is the guest's (2 steps, then a wrong argument)"
    local code=0
    run --rm "$image" front /hello.wasm 2 100 | tee "$work/front.log" | indented
    contains "done" "the output is complete" <"$work/front.log"
    run --rm "$image" wrong /hello.wasm many 2>&1 | indented || code=$?
    [ "$code" = 2 ] || fail "the exit code is $code, expected 2"
    say "exit code 2"
}

serve_http() {
    step "An http server: a component of wasi:http, a fresh instance for each request"
    shown "$bin/oci-tar-builder" --rootfs --repo localhost/troupe --name web --tag demo \
        --module "$guests/web.wasm" --out-path "$work/web.tar"
    ctr image import --snapshotter "$snapshotter" "$work/web.tar" >/dev/null
    run --detach --net-host --log-uri "file://$work/web.log" --env WASMTIME_HTTP_PROXY_SOCKET_ADDR=127.0.0.1:0 \
        localhost/troupe/web:demo web /web.wasm
    within 10 "the server listens" address_of web
    address=$(address_of web)
    say "curl http://$address/hello"
    curl --silent --fail --show-error --max-time 5 "http://$address/hello" | tee "$work/hello" | indented
    contains "hello" "the answer is the guest's" <"$work/hello"
    local first second
    first=$(curl --silent --max-time 5 "http://$address/static-counter")
    second=$(curl --silent --max-time 5 "http://$address/static-counter")
    [ "$first$second" = 11 ] || fail "a request found what another one left: $first, $second"
    say "a counter in the guest's memory says 1 to every request"
}

drain_under_load() {
    step "SIGTERM under load: eight clients that never pause, until the port is closed"
    local client clients=() answered lost drained
    for client in 1 2 3 4 5 6 7 8; do
        # One line for each request: its status, and curl's exit code (7: the port is closed, nothing was sent).
        curl --silent --fail-early --max-time 20 --write-out '%{http_code} %{exitcode}\n' --output /dev/null \
            "http://$address/sleep?ms=5&[1-100000]" >"$work/client.$client" &
        clients+=($!)
    done
    within 10 "the clients are at work" busy
    shown ctr task kill --signal SIGTERM web
    for client in "${clients[@]}"; do wait "$client" || true; done
    within 30 "the server has drained" stopped web
    ended web 0
    answered=$(cat "$work"/client.* | grep -c "^200 0$")
    lost=$(cat "$work"/client.* | grep -vc "^200 0$\|^000 7$") || true
    drained=$(sed -n 's/.*drained container=demo\/web //p' "$work/containerd.log")
    say "$answered requests answered, $lost lost: $drained"
    # curl tries again where a connection closes before the first byte of an answer; the server knows what it has cut.
    [[ " $drained " == *" cut=0 "* ]] || fail "the server has cut requests: $drained"
    [ "$lost" = 0 ] || fail "requests were lost: $(cat "$work"/client.* | grep -v "^200 0$" | sort | uniq -c)"
}

busy() { [ "$(cat "$work"/client.* | wc -l)" -gt 200 ]; }

leave_nothing() {
    step "Nothing is left: the shim's process ends by itself, the mounts are gone"
    within 20 "the shim's process ends" no_daemon
    ! grep -q " $work/.*/rootfs " /proc/self/mounts || fail "a root filesystem is still mounted"
}

# --- containers -------------------------------------------------------------------------------------------------------

run() {
    ctr run --snapshotter "$snapshotter" --runtime "$runtime" --runtime-config-path "$work/options.toml" "$@"
}

# start ID ARG...: detached, both streams into one log file.
start() {
    local id=$1
    shift
    say "ctr run --detach --runtime $runtime --env NAME=$id $image $id $*"
    run --detach --log-uri "file://$work/$id.log" --env "NAME=$id" "$image" "$id" "$@"
}

# ended ID CODE: deletes the task and the container. ctr tells a code other than 0 in a warning, 1.6 in its exit code too.
ended() {
    local id=$1 code
    code=$(ctr task rm "$id" 2>&1 | sed -n 's/.*exit code \([0-9]*\).*/\1/p') || true
    ctr container rm "$id"
    [ "${code:-0}" = "$2" ] || fail "$id ended with exit code ${code:-0}, expected $2"
    say "$id: exit code $2"
}

pid_of() { ctr task ls | awk -v id="$1" '$1 == id { print $2 }'; }

# Prints the log of a container as it grows, until a line holds the text.
follow() {
    local line part='' deadline=$((SECONDS + 20))
    while [ $SECONDS -lt $deadline ]; do
        if IFS= read -r line; then
            echo "$part$line" | indented
            [[ $part$line != *"$2"* ]] || return 0
            part=''
        else
            part+=$line
            sleep 0.1
        fi
    done <"$work/$1.log"
    fail "the log of $1 never said: $2"
}

logged() { within 10 "$3" grep -qF "$2" "$work/$1.log"; }

# --- telling ----------------------------------------------------------------------------------------------------------

indented() { sed 's/^/   | /'; }

# Runs a command and shows it.
shown() {
    local text=$*
    say "${text//$bin\//}"
    "$@" | indented
}

contains() { grep -qF "$1" || fail "not so: $2"; }

main "$@"
