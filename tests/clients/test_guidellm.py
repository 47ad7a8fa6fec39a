"""GuideLLM: synthetic prompts, streamed answers."""

from __future__ import annotations

import json
from pathlib import Path

from tools import run


def test_guidellm(base: str, model: str, tokenizer: str, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    run(
        *("guidellm", "run", "--backend", f"kind=openai_http,target={base},model={model}"),
        *("--profile", "kind=synchronous", "--constraint", "kind=max_requests,count=3"),
        *("--tokenizer", f"kind=huggingface_auto,model={tokenizer}"),
        *("--data", "kind=synthetic_text,prompt_tokens=32,output_tokens=8"),
        *("--disable-console-interactive", "--output", f"kind=json,path={report}"),
    )
    (benchmark,) = json.loads(report.read_text())["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    assert (totals["successful"], totals["errored"]) == (3, 0)
