#!/bin/bash
# Tries clients against the default model: run.sh PD_SERVE_PYTHON DIRECTORY [CLIENT ...], all of them without names. Used by
# `make test-clients`.
#
# Each client has an environment of its own in DIRECTORY, because some hold others back to old versions. Of torch, which guidellm
# wants, the build for CPUs is taken; UV_TORCH_BACKEND says otherwise (empty: PyPI's).
set -euo pipefail
mkdir -p "$2"
python=$(realpath -s "$1") directory=$(realpath "$2")
shift 2
cd "$(dirname "$0")"
declare -A packages=(
    [openai]=openai [anthropic]=anthropic [instructor]=instructor [langchain]=langchain-openai [litellm]=litellm
    [llama_index]=llama-index-llms-openai-like [pydantic_ai]="pydantic-ai-slim[openai,anthropic]" [openai_agents]=openai-agents
    [lm_eval]="lm-eval[api]" [guidellm]=guidellm [aiperf]=aiperf
)
names=("$@")
[[ $# -gt 0 ]] || names=(openai anthropic instructor langchain litellm llama_index pydantic_ai openai_agents lm_eval guidellm aiperf npm)
export UV_TORCH_BACKEND=${UV_TORCH_BACKEND-cpu}
[[ -n $UV_TORCH_BACKEND ]] || unset UV_TORCH_BACKEND
uv=$directory/uv/bin/uv
[ -x "$uv" ] || { "$python" -m venv "$directory/uv"; "$directory/uv/bin/python" -m pip install --quiet --disable-pip-version-check uv; }

port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
log=$(mktemp)
"$python" -m pd_serve.cli up --port "$port" >"$log" 2>&1 &
up=$!
trap 'kill "$up" 2>/dev/null && wait "$up" || true; rm -f "$log"' EXIT
export PD_SERVE_URL=http://127.0.0.1:$port
until "$python" -c "import urllib.request as r; r.urlopen('$PD_SERVE_URL/ready', timeout=5)" 2>/dev/null; do
    kill -0 "$up" 2>/dev/null || { cat "$log" >&2; exit 1; }
    sleep 0.5
done
PD_SERVE_MODEL_NAME=$("$python" -c "import json, urllib.request as r; print(json.load(r.urlopen('$PD_SERVE_URL/v1/models'))['data'][0]['id'])")
PD_SERVE_TOKENIZER=$("$python" -c "from pd_serve.paths import cache_directory as c; print(next(c().glob('models/$PD_SERVE_MODEL_NAME/*/tokenizer.json')).parent)")
export PD_SERVE_MODEL_NAME PD_SERVE_TOKENIZER

try_python() {
    local one=$directory/$1
    "$uv" venv --quiet --clear --python "$python" "$one"
    "$uv" pip install --quiet --python "$one/bin/python" pytest pytest-timeout "${packages[$1]}"
    "$uv" pip list --python "$one/bin/python" 2>/dev/null |
        grep -E '^(openai|anthropic|instructor|langchain-openai|litellm|llama-index-core|pydantic-ai-slim|openai-agents|lm-eval|guidellm|aiperf) '
    "$one/bin/python" -m pytest -c /dev/null --rootdir . --confcutdir . -p no:cacheprovider -q --timeout 180 "test_$1.py"
}

try_npm() {
    command -v node >/dev/null && command -v npm >/dev/null || { echo "SKIPPED: there is no node, or no npm, on PATH"; return; }
    mkdir -p "$directory/npm"
    cp npm/* "$directory/npm"
    (cd "$directory/npm" && npm install --silent --no-audit --no-fund && npm ls --depth 0 && node --test --test-reporter=tap clients.test.mjs)
}

failed=()
for name in "${names[@]}"; do
    echo "== $name"
    if [[ $name == npm ]]; then run=(try_npm); else run=(try_python "$name"); fi
    # in a shell of its own, where a command that fails ends it
    set +e
    (set -e; "${run[@]}")
    (($? == 0)) || failed+=("$name")
    set -e
done
((${#failed[@]} == 0)) || { echo "failed: ${failed[*]}" >&2; exit 1; }
