#!/bin/bash
# Tests against real vLLM servers: run.sh PYTHON DIRECTORY [pytest arguments]. Used by `make test-peers`; two cores and 12 GB of
# memory are enough. The environment of vLLM is installed into DIRECTORY first.
set -euo pipefail
cd "$(dirname "$0")/../.."
tests/peers/install.sh "$1" "$2"
PEER_VENV=$(realpath -s "$2")
export PEER_VENV
exec "$1" -m pytest -m peer tests/peers -p no:cacheprovider --timeout 900 --durations 5 "${@:3}"
