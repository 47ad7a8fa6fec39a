#!/bin/bash
# Tests against real vLLM servers: run.sh PYTHON DIRECTORY [pytest arguments]. Used by `make test-peers`; two cores and 12 GB of
# memory are enough. PEER_VLLM names a version of vLLM; its environment is installed into DIRECTORY first.
set -euo pipefail
cd "$(dirname "$0")/../.."
vllm=${PEER_VLLM:-0.32.0}
tests/peers/install.sh "$1" "$2/$vllm" "$vllm"
PEER_VENV=$(realpath -s "$2/$vllm")
export PEER_VENV
exec "$1" -m pytest -m peer tests/peers -p no:cacheprovider --timeout 900 --durations 5 "${@:3}"
