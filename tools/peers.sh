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

# RecBole asks for an old Ray that it needs for tuning only, and does not start on today's setuptools and numpy.
peer=recbole
echo "peers.sh: installing $peer into $folder (minutes the first time)" >&2
tools/venv.sh "$folder/$peer" \
    && pip setuptools==80.9.0 numpy==1.26.4 pandas==2.2.3 scipy==1.11.4 scikit-learn==1.5.2 tensorboard==2.19.0 \
        colorlog==4.7.2 colorama==0.4.4 pyyaml texttable tabulate psutil plotly tqdm \
    && pip --no-deps recbole==1.2.1 thop==0.1.1.post2209072238 \
    && python -W ignore -c "import recbole.trainer" || missing

[ -z "$made" ] || touch "$folder/.installed"
