#!/usr/bin/env bash
# peers.sh FOLDER: an environment each for the benchmarks' peers whose pins clash with ours.
# One that cannot be made is said, and reported as missing by the benchmark; this never fails.
set -u
cd "$(dirname "$0")/.."
folder=$1 made=1
python() { "$folder/$peer/bin/python" "$@"; }
pip() { python -m pip --disable-pip-version-check install --quiet "$@"; }
missing() { made=; echo "peers.sh: $peer cannot be installed; the benchmarks will say that it is missing" >&2; }

# torchrec asks for fbgemm-gpu, which does not load without CUDA; its build for CPUs takes the place.
peer=torchrec
echo "peers.sh: installing $peer into $folder (minutes the first time)" >&2
tools/venv.sh "$folder/$peer" \
    && pip --no-deps torchrec==1.8.0 fbgemm-gpu-cpu==1.8.0 \
    && pip numpy tensordict torchmetrics==1.0.3 tqdm pyre-extensions 2> /dev/null \
    && python -W ignore -c "import torchrec" || missing

peer=rectools
echo "peers.sh: installing $peer into $folder (minutes the first time)" >&2
tools/venv.sh "$folder/$peer" && pip "rectools[torch]==0.19.0" numpy==1.26.4 \
    && python -W ignore -c "import rectools.models" || missing

[ -z "$made" ] || touch "$folder/.installed"
