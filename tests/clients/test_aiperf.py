"""AIPerf: synthetic prompts, streamed answers."""

from __future__ import annotations

import json
from pathlib import Path

from tools import run


def test_aiperf(base: str, model: str, tokenizer: str, tmp_path: Path) -> None:
    run(
        *("aiperf", "profile", "--model", model, "--url", base, "--endpoint-type", "chat", "--streaming"),
        *("--tokenizer", tokenizer, "--isl", "32", "--osl", "8", "--request-count", "6"),
        *("--concurrency", "2", "--ui", "none", "--artifact-dir", str(tmp_path)),
    )
    found = json.loads((tmp_path / "profile_export_aiperf.json").read_text())
    assert found["request_count"]["avg"] == 6 and found["time_to_first_token"]["avg"] > 0
    assert not found.get("error_summary")
