#!/usr/bin/env bash
# Submit `recray VERB ARGUMENTS` as a Ray job: this checkout's code is shipped, the job runs on the head's machine.
#
# A job runs in a folder that is thrown away, on another machine: every path must be absolute, or a URI that all
# nodes reach. Exits as the job does.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
[ $# -gt 0 ] || { echo "usage: $0 VERB ARGUMENTS…" >&2; exit 2; }
[ -n "${RAY_API_SERVER_ADDRESS:-}" ] || {
  echo "no cluster: set RAY_API_SERVER_ADDRESS, for example  source \"\$(cluster/local/up.sh)\"" >&2
  exit 2
}
out=
for ((i = 1; i <= $#; i++)); do
  case "${!i}" in
    --out) next=$((i + 1)) && out=${!next:-} ;;
    --out=*) out=${!i#--out=} ;;
  esac
done
case "$out" in
  /* | *://*) ;;
  *) echo "--out must be given, absolute or a URI: the job's own folder is temporary" >&2 && exit 2 ;;
esac
ray=$root/.venv/bin/ray
[ -x "$ray" ] || ray=ray
# RAY_ADDRESS is for clients of the cluster; the job gets its own
exec env -u RAY_ADDRESS "$ray" job submit --working-dir "$root" -- python -m recray "$@"
