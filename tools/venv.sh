#!/usr/bin/env bash
# venv.sh FOLDER [EXTRA]: make the virtual environment, and install torch and, editable, recray with an extra.
# Without EXTRA torch is all there is: what a peer of the benchmarks starts from.
# PYTHON      which python makes it (default python3)
# TORCH_INDEX index of torch wheels to use instead of choosing (PyTorch has one for CPUs and one a CUDA version)
set -eu
cd "$(dirname "$0")/.."
venv=$1 extra=${2:-} python=${PYTHON:-python3}

fail() { echo "venv.sh: $*" >&2; exit 2; }

command -v "$python" > /dev/null || fail "there is no $python; install Python 3.10 or newer, or set PYTHON"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
    || fail "$python is older than 3.10; set PYTHON to a newer one"
if [ ! -x "$venv/bin/pip" ]; then
    "$python" -c 'import ensurepip, venv' 2> /dev/null \
        || fail "$python cannot make virtual environments; on Debian: apt-get install python3-venv"
    "$python" -m venv "$venv"
fi
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

# torch first: on Linux the usual index gives the CUDA build, gigabytes that a machine without a GPU
# cannot use. Where pip itself would take a CPU build (+cpu, or another system), nothing is special.
torch=$(grep -m1 '^torch==' constraints.txt)
if [ -n "${TORCH_INDEX:-}" ]; then
    pip install --quiet -c constraints.txt "$torch" --extra-index-url "$TORCH_INDEX"
elif ! "$venv/bin/python" -c 'from importlib.metadata import version; version("torch")' 2> /dev/null \
    && [ "$(uname -sm)" = "Linux x86_64" ] && ! nvidia-smi > /dev/null 2>&1 \
    && ! pip install --quiet --dry-run --no-deps --report - "$torch" 2> /dev/null | grep -q '"version": "[^"]*+cpu"'
then
    pip install --quiet -c constraints.txt uv  # it knows where PyTorch keeps its CPU wheels
    "$venv/bin/uv" pip install --quiet --python "$venv/bin/python" --torch-backend cpu -c constraints.txt "$torch" \
        || echo "venv.sh: the CPU build of torch cannot be reached; installing the usual one" >&2
fi
[ -n "$extra" ] || exec "$venv/bin/python" -m pip install --quiet "$torch"
echo "venv.sh: installing recray[$extra] into $venv (a few minutes the first time)" >&2
pip install --quiet -c constraints.txt -e ".[$extra]"
