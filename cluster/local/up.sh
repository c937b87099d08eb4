#!/usr/bin/env bash
# Start a Ray cluster of three nodes on this machine: a head and two workers, each a raylet of its own.
#
#   cluster/local/up.sh                 start (a cluster that is up already is left alone)
#   source "$(cluster/local/up.sh)"     start and let this shell speak to it
#   cluster/local/down.sh               stop exactly what was started here
#
# All nodes live on 127.0.0.1, so nothing listens outside this machine, and every client
# needs the token. Prints the path of a file to `source`: address, API address, token.
#
# RECRAY_CLUSTER  folder for the state (default /tmp/recray-cluster-$UID; keep it short: sockets lie in it)
# WORKERS         how many workers (default 2)      CPUS  logical CPUs a node (default 2)
# PYTHON          the Python that has Ray (default .venv/bin/python of this checkout, else python3)
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
state=${RECRAY_CLUSTER:-/tmp/recray-cluster-$(id -u)}
python=${PYTHON:-$root/.venv/bin/python}
[ -x "$python" ] || python=$(command -v python3)
workers=${WORKERS:-2}
cpus=${CPUS:-2}
store=$((128 << 20)) # bytes of object store a node

umask 077
mkdir -p "$state"
exec 9>"$state/lock"
flock 9

lives() { # process id; a process that ended has no command line
  grep -qz "cluster/local/node.py" "/proc/$1/cmdline" 2>/dev/null
}
all_live() {
  local pid
  [ -s "$state/pids" ] || return 1
  while read -r pid; do lives "$pid" || return 1; done <"$state/pids"
}
if [ -f "$state/env" ] && all_live; then
  echo "$state/env"
  exit 0
fi
"$root/cluster/local/down.sh" --unlocked >&2

PATH=$(dirname "$python"):$PATH # jobs run `recray` and `python` of the same environment
read -r port dashboard client < <("$python" - <<'PY'
import socket
held = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
print(*(s.getsockname()[1] for s in held))
PY
)
"$python" -c 'import secrets; print(secrets.token_hex(32), end="")' >"$state/token"
cat >"$state/env" <<ENV
export RAY_AUTH_MODE=token
export RAY_AUTH_TOKEN_PATH=$state/token
export RAY_ADDRESS=127.0.0.1:$port
export RAY_API_SERVER_ADDRESS=http://127.0.0.1:$dashboard
export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 # the address of this machine is 127.0.0.1 to Ray here
ENV

export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$state/token RAY_USAGE_STATS_ENABLED=0
export RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0 GLOO_SOCKET_IFNAME=lo
unset RAY_ADDRESS RAY_API_SERVER_ADDRESS

node() { # name, arguments of `ray start`. One at a time, and again if need be: Ray gives a node 30 s to start
  local name=$1 pid
  shift
  for _ in 1 2 3; do
    setsid "$python" "$root/cluster/local/node.py" --block --disable-usage-stats --num-cpus "$cpus" \
      --object-store-memory "$store" --min-worker-port 0 --max-worker-port 0 --dashboard-agent-listen-port 0 \
      --node-ip-address 127.0.0.1 "$@" >"$state/$name.log" 2>&1 9>&- </dev/null &
    pid=$!
    disown
    echo $pid >>"$state/pids"
    sleep 0.5 # until setsid has become the node
    while lives $pid; do
      grep -q "Ray runtime started" "$state/$name.log" && return 0
      sleep 0.3
    done
    kill -KILL -- "-$pid" 2>/dev/null || true # what it left
    sed -i '$d' "$state/pids"
  done
  tail -n 20 "$state/$name.log" >&2
  echo "the cluster did not come up: its $name ended; see $state/*.log" >&2
  "$root/cluster/local/down.sh" --unlocked >&2
  exit 1
}

rm -f "$state"/*.log
: >"$state/pids"
node head --head --port "$port" --ray-client-server-port "$client" --dashboard-host 127.0.0.1 \
  --dashboard-port "$dashboard" --temp-dir "$state/ray"
for i in $(seq "$workers"); do
  node "worker$i" --address "127.0.0.1:$port"
done
until (: >"/dev/tcp/127.0.0.1/$dashboard") 2>/dev/null; do # jobs are submitted there
  all_live || { echo "a node ended; see $state/*.log" >&2 && exit 1; }
  sleep 0.3
done
echo "$state/env"
