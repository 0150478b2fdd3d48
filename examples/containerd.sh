# A containerd of a script's own, and what goes with it; to be sourced, not run. The system's containerd is never touched: this
# one has its root, state and socket in a folder of /tmp. A script says first
#
#     shim             the file name of the shim
#     me               its own name: before its messages, and the namespace of its containers
#     containerd_bin   the folder of `containerd` and `ctr`, before it starts one
work=
containerd_pid=

# Makes the folder `work`. Whatever ends the script, processes, mounts and folder are gone afterwards.
begin() {
    # Short, because the path of a Unix socket may have 104 bytes.
    work=$(mktemp -d /tmp/troupe.XXXXXX)
    trap clean_up EXIT
    trap 'exit 130' INT TERM HUP
}

# start_containerd BIN: BIN is where it finds the shim.
start_containerd() {
    cat >"$work/config.toml" <<-END
		version = 2
		root = "$work/root"
		state = "$work/state"
		# All that would leave this folder or that these scripts have no use for.
		disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime",
		  "io.containerd.podsandbox.controller.v1.podsandbox", "io.containerd.internal.v1.opt", "io.containerd.nri.v1.nri",
		  "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs"]
		[grpc]
		address = "$work/c.sock"
	END
    # The settings of the shim, as they would stand in containerd's configuration.
    cat >"$work/options.toml" <<-END
		cache_dir = "$work/cache"
		idle_timeout = "1s"
	END
    # containerd finds the shim in its PATH. A session of its own: Ctrl-C must reach us first.
    PATH=$1:$containerd_bin:$PATH setsid "$containerd_bin/containerd" --config "$work/config.toml" \
        >"$work/containerd.log" 2>&1 </dev/null &
    containerd_pid=$!
    # The shell would tell of its end among our own lines.
    disown "$containerd_pid"
    within 20 "containerd answers" ctr version
}

ctr() {
    # ctr does not mind SIGTERM; and it must not read from a terminal, or it would be stopped as a background job.
    timeout -s KILL 60 "$containerd_bin/ctr" --address "$work/c.sock" --namespace "$me" "$@" </dev/null
}

status_of() { ctr task ls | awk -v id="$1" '$1 == id { print $3 }'; }
stopped() { [ "$(status_of "$1")" = STOPPED ]; }

# address_of ID: where a server listens. The system may have chosen the port; the daemon's log, which is containerd's, tells it.
address_of() {
    sed -n "s/.*listening container=$me\/$1 addr=\([0-9.:]*\).*/\1/p" "$work/containerd.log" | grep .
}

# The daemons of our containerd: its socket is in their arguments.
daemons() {
    local process
    for process in /proc/[0-9]*; do
        if tr '\0' ' ' <"$process/cmdline" | grep -q "^[^ ]*$shim serve .*\"$work/"; then echo "${process#/proc/}"; fi
    done 2>/dev/null
}

no_daemon() { [ -z "$(daemons)" ]; }

clean_up() {
    local code=$? pid
    trap '' INT TERM HUP
    if [ "$code" = 130 ]; then
        echo "$me: interrupted; cleaning up" >&2
    elif [ "$code" != 0 ] && [ -e "$work/containerd.log" ]; then
        echo "$me: failed; the end of containerd's log:" >&2
        tail -n 15 "$work/containerd.log" >&2 || true
    fi
    for pid in $(daemons) $containerd_pid; do end "$pid"; done
    awk -v work="$work/" 'index($2, work) == 1 { print $2 }' /proc/self/mounts | sort -r | while read -r mount; do
        umount -l "$mount"
    done
    rm -rf "$work"
    exit "$code"
}

# SIGTERM, and SIGKILL five seconds later.
end() {
    local tries=50
    kill "$1" 2>/dev/null || return 0
    while [ $((tries--)) -gt 0 ] && kill -0 "$1" 2>/dev/null; do sleep 0.1; done
    kill -9 "$1" 2>/dev/null || true
}

number=0
step() { number=$((number + 1)) && printf '\n%s. %s\n' "$number" "$*"; }
say() { echo "   $*"; }
fail() { echo "$me: $*" >&2 && exit 1; }

# within SECONDS WHAT COMMAND...: tries the command until it succeeds.
within() {
    local deadline=$((SECONDS + $1)) what=$2
    shift 2
    until "$@" >/dev/null 2>&1; do
        [ $SECONDS -lt $deadline ] || fail "not so: $what"
        [ -z "$containerd_pid" ] || kill -0 "$containerd_pid" 2>/dev/null || fail "containerd ended: $what"
        sleep 0.1
    done
}
