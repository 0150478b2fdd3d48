#!/bin/sh
# Cleans up after a run of the tests whose process died without doing it. Standard input is a pipe whose other end only
# the test process holds: its end means that the process is gone. $1 is the base folder of that run; whatever was
# started there runs a program from it or is named on its command line, so nothing else is touched.
base=$1
trap '' INT TERM HUP
cat >/dev/null
[ -d "$base" ] || exit 0
# Again until nothing is found: what is killed may just have started something.
for round in 1 2 3 4 5; do
  found=
  for process in /proc/[0-9]*; do
    pid=${process#/proc/}
    [ "$pid" != $$ ] || continue
    case "$(readlink "$process/exe" 2>/dev/null) $(tr '\0' ' ' <"$process/cmdline" 2>/dev/null)" in
      *"$base/"*)
        # A shim says on its command line where it listens; that is not below the base.
        socket=$(tr '\0' ' ' <"$process/cmdline" 2>/dev/null | sed -n 's/.*"socket":"\([^"]*\)".*/\1/p')
        found=yes
        kill -9 "$pid" 2>/dev/null
        [ -z "$socket" ] || rm -f "$socket"
        ;;
    esac
  done
  [ -n "$found" ] || break
  sleep 0.2
done
cut -d' ' -f2 /proc/self/mounts | grep "^$base/" | sort -r | while read -r mount; do umount -l "$mount"; done
rm -rf "$base"
