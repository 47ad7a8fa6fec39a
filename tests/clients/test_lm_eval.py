"""lm-eval: log-likelihoods of given texts and generated ones, tokenised by the server."""

from __future__ import annotations

import json
from pathlib import Path

from tools import run

CAPITALS = {"France": ("Paris", "Rome"), "Italy": ("Rome", "Paris"), "Germany": ("Berlin", "Oslo")}
TASK = """\
task: capitals_{kind}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
"""
CHOICE = """\
doc_to_choice: "{{[good, bad]}}"
doc_to_target: 0
target_delimiter: ""
metric_list: [{metric: acc}]
"""
TEXT = """\
doc_to_target: "{{good}}"
generation_kwargs: {until: [".", ","], max_gen_toks: 8}
metric_list: [{metric: exact_match, aggregation: mean}]
"""


def test_lm_eval(url: str, model: str, tmp_path: Path) -> None:
    data = tmp_path / "capitals.jsonl"
    rows = [
        {"question": f"The capital of {land} is", "good": f" {good}", "bad": f" {bad}"}
        for land, (good, bad) in CAPITALS.items()
    ]
    data.write_text("\n".join(map(json.dumps, rows)))
    for kind, rest in (("multiple_choice", CHOICE), ("generate_until", TEXT)):
        (tmp_path / f"{kind}.yaml").write_text(TASK.format(kind=kind, data=data) + rest)
    where = f"model={model},base_url={url}/completions,tokenizer_backend=remote,num_concurrent=2"
    out = tmp_path / "out"
    tasks = ["--include_path", str(tmp_path), "--tasks", "capitals_multiple_choice,capitals_generate_until"]
    run("lm-eval", "run", "--model", "local-completions", "--model_args", where, *tasks, "--output_path", str(out))
    (found,) = out.rglob("results*.json")
    results = json.loads(found.read_text())["results"]
    assert results["capitals_multiple_choice"]["acc,none"] == 1
    assert results["capitals_generate_until"]["exact_match,none"] == 1
