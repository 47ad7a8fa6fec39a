"""The board and the alert rules ask for what a running router and its nodes export, with labels that are there."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.cluster import HTTP, Cluster, wait_for

pytestmark = pytest.mark.slow
GRAFANA = Path(__file__).parents[2] / "deploy" / "grafana"
SCRAPED = {"instance", "job"}  # labels that Prometheus adds
# Series that are there after something has gone wrong, and not before.
LATER = {"pd_serve_retries_total", "pd_serve_aborts_total", "pd_serve_unfit_pair"}

NAME = re.compile(r"\b(pd_serve_[a-z0-9_]+|vllm:[a-z0-9_]+)\s*(\{[^}]*\})?")
GROUPED = re.compile(r"\bby\s*\(([^)]*)\)")


def expressions() -> list[str]:
    board = json.loads((GRAFANA / "pd-serve.json").read_text())
    found = [target["expr"] for panel in board["panels"] for target in panel.get("targets", [])]
    rules = yaml.safe_load((GRAFANA / "alerts.yaml").read_text())
    return found + [rule["expr"] for group in rules["groups"] for rule in group["rules"]]


class Exported:
    """By name of series: labels of its samples, and the family's type."""

    def __init__(self) -> None:
        self.labels: defaultdict[str, set[str]] = defaultdict(set)
        self.types: dict[str, str] = {}
        self.series: dict[str, str] = {}  # as promtool's tests write them, and their values

    def read(self, text: str) -> None:
        for family in text_string_to_metric_families(text):
            ends = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}.get(family.type, [""])
            self.types |= {family.name + end: family.type for end in ends}
            for sample in family.samples:
                self.labels[sample.name] |= set(sample.labels)
                labels = ", ".join(f"{name}={json.dumps(value)}" for name, value in sample.labels.items())
                counts = family.type in ("counter", "histogram")
                self.series[f"{sample.name}{{{labels}}}"] = "0+1x40" if counts else f"{sample.value:g}+0x40"


@pytest.fixture(scope="module")
def exported(smol: Cluster) -> Exported:
    smol.complete(list(range(1000, 1200)), 4)
    assert HTTP.post(smol.url + "/v1/completions", json={"model": "nobody's", "prompt": "x"}).status_code == 404

    def pulled() -> bool:
        text = HTTP.get(smol.url + "/metrics").text
        return re.search(r"^pd_serve_router_node_pulls_total\{.*\} [1-9]", text, re.M) is not None

    wait_for(pulled, 10, "a status after the transfer")
    found = Exported()
    for server in (smol.router, *smol.nodes):
        found.read(HTTP.get(server.url + "/metrics").text)
    return found


def test_every_metric_asked_for_is_exported_with_its_labels(exported: Exported) -> None:
    asked = set()
    for expression in expressions():
        names = NAME.findall(expression)
        assert names, expression
        grouped = {name.strip() for part in GROUPED.findall(expression) for name in part.split(",")}
        known = set(SCRAPED)
        for name, matchers in names:
            asked.add(name)
            assert name in exported.types, f"{name} is not exported: {expression}"
            known |= exported.labels[name]
            if name not in LATER:
                assert exported.labels[name] or exported.types[name] == "gauge", f"{name} has no series"
                matched = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers))
                assert matched <= exported.labels[name] | SCRAPED, f"{name} has no {matched}: {expression}"
        if not any(name in LATER for name, _ in names):
            assert grouped <= known, f"no series has {grouped - known}: {expression}"
    assert len(asked) > 25


def test_histograms_are_asked_for_by_bucket(exported: Exported) -> None:
    for expression in expressions():
        for inner in re.findall(r"histogram_quantile\((.*)\)", expression):
            (name,) = {name for name, _ in NAME.findall(inner)}
            assert name.endswith("_bucket") and exported.types[name] == "histogram", expression
            assert re.search(r"by \(le\b", inner), f"quantiles need le: {expression}"
        for name, kind in ((name, exported.types[name]) for name, _ in NAME.findall(expression)):
            if kind == "counter":
                assert re.search(rf"(rate|increase)\({name}", expression), f"a counter without rate: {expression}"


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (Debian's package prometheus)")
def test_every_panel_shows_something(exported: Exported, tmp_path: Path) -> None:
    """Prometheus' own evaluation of each query, over the series that a router and its nodes have."""
    board = json.loads((GRAFANA / "pd-serve.json").read_text())
    queries = [target["expr"] for panel in board["panels"] for target in panel.get("targets", [])]
    shown = [query for query in queries if not LATER & {name for name, _ in NAME.findall(query)}]
    assert len(shown) > len(queries) - 4
    asked = [query.replace("$__rate_interval", "1m").replace("$model", ".*") for query in shown]
    test = {
        "interval": "15s",
        "input_series": [{"series": name, "values": values} for name, values in exported.series.items()],
        "promql_expr_test": [
            {"expr": f"count({query}) > bool 0", "eval_time": "9m", "exp_samples": [{"labels": "{}", "value": 1}]}
            for query in asked
        ],
    }
    (tmp_path / "board.yaml").write_text(yaml.safe_dump({"tests": [test]}))
    done = subprocess.run(
        ["promtool", "test", "rules", "board.yaml"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
