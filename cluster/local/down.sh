#!/usr/bin/env bash
# Stop the cluster that up.sh started: the processes whose ids it kept, and no others.
set -euo pipefail

state=${RECRAY_CLUSTER:-/tmp/recray-cluster-$(id -u)}
[ -d "$state" ] || exit 0
if [ "${1:-}" != --unlocked ]; then
  exec 9>"$state/lock"
  flock 9
fi
ours() { grep -qz "cluster/local/node.py" "/proc/$1/cmdline" 2>/dev/null; } # a number may be another's by now
gone() { # seconds
  for _ in $(seq $(($1 * 10))); do
    for pid in "${pids[@]}"; do ours "$pid" && sleep 0.1 && continue 2; done
    return 0
  done
}
pids=()
if [ -f "$state/pids" ]; then
  while read -r pid; do ours "$pid" && pids=("$pid" "${pids[@]}"); done <"$state/pids" # workers first
fi
if [ ${#pids[@]} -gt 0 ]; then
  kill -TERM "${pids[@]}" 2>/dev/null || true
  gone 5
  for pid in "${pids[@]}"; do kill -KILL -- "-$pid" 2>/dev/null || true; done # each node is a process group
  gone 5
fi
rm -rf "$state/pids" "$state/env" "$state/token" "$state/ray"
