#!/bin/bash
# Tries clients against the default model: run.sh PD_SERVE_PYTHON ENVIRONMENT [pytest's arguments]. Used by `make test-clients`.
set -euo pipefail
cd "$(dirname "$0")"
python=$(realpath -s "$1") environment=$2
shift 2
[ -x "$environment/bin/python" ] || "$python" -m venv "$environment"
environment=$(realpath "$environment")
echo "Installing the clients into $environment (some 400 MB) ..."
"$environment/bin/python" -m pip install --quiet --disable-pip-version-check -r requirements.txt

port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
log=$(mktemp)
"$python" -m pd_serve.cli up --port "$port" >"$log" 2>&1 &
up=$!
trap 'kill "$up" 2>/dev/null && wait "$up" || true; rm -f "$log"' EXIT
url=http://127.0.0.1:$port
until "$python" -c "import urllib.request as r; r.urlopen('$url/ready', timeout=5)" 2>/dev/null; do
    kill -0 "$up" 2>/dev/null || { cat "$log" >&2; exit 1; }
    sleep 0.5
done
name=$("$python" -c "import json, urllib.request as r; print(json.load(r.urlopen('$url/v1/models'))['data'][0]['id'])")
"$environment/bin/python" -m pip list --disable-pip-version-check 2>/dev/null | grep -E '^(openai|anthropic|instructor|langchain-openai|litellm|pydantic-ai-slim) '
PD_SERVE_URL=$url PD_SERVE_MODEL_NAME=$name "$environment/bin/python" -m pytest -c /dev/null --rootdir . --confcutdir . \
    -p no:cacheprovider -q --timeout 120 test_clients.py "$@"
