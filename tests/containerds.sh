#!/usr/bin/env bash
# Fetches Debian's three containerds into DIR/{1.6,1.7,2.1}/usr/bin (containerd, ctr, containerd-shim-runc-v2), side by side,
# installing nothing. Usage: containerds.sh DIR. Needs apt and the package debian-archive-keyring; the mirror is the one of
# apt's sources; where they name none (Ubuntu), TROUPE_DEBIAN_MIRROR. Keeps what is already there.
set -euo pipefail
dir=$(mkdir -p "$1" && cd "$1" && pwd)
mirror=$(cat /etc/apt/sources.list /etc/apt/sources.list.d/* 2>/dev/null | grep -v "^ *#" | grep -oE "https?://[^ ]+/debian/?( |$)" | head -n 1 | tr -d " ") || true
mirror=${TROUPE_DEBIAN_MIRROR:-$mirror}
[ -n "$mirror" ] || { echo "containerds.sh: apt's sources name no Debian mirror; name one: TROUPE_DEBIAN_MIRROR=URL" >&2; exit 1; }
for pair in 1.6:bookworm 1.7:trixie 2.1:sid; do
  want=${pair%%:*} suite=${pair##*:} out=$dir/${pair%%:*}
  [ -x "$out/usr/bin/containerd" ] && continue
  work=$(mktemp -d); mkdir -p "$work/lists/partial" "$work/cache/archives/partial"
  echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $suite main" >"$work/sources.list"
  apt=(apt-get -q -o "Dir::Etc::sourcelist=$work/sources.list" -o Dir::Etc::sourceparts=- -o "Dir::State::lists=$work/lists"
    -o "Dir::Cache=$work/cache" -o APT::Sandbox::User=root)
  "${apt[@]}" update >"$work/log" 2>&1 || { cat "$work/log" >&2; exit 1; }
  (cd "$work" && "${apt[@]}" download containerd/"$suite" >>log 2>&1) || { cat "$work/log" >&2; exit 1; }
  mkdir -p "$out" && dpkg -x "$work"/containerd_*.deb "$out" && rm -rf "$work"
  "$out/usr/bin/containerd" --version | grep -q " v\?$want\." || echo "containerds.sh: $suite has $("$out/usr/bin/containerd" --version), not $want" >&2
done
for v in "$dir"/*/usr/bin/containerd; do echo "$v $("$v" --version | awk '{print $3}')"; done
