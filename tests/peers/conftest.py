"""Tests against real servers of vLLM: only where ``make test-peers`` has installed it (see run.sh)."""

from __future__ import annotations

import os

collect_ignore_glob = [] if "PEER_VENV" in os.environ else ["test_*.py"]
