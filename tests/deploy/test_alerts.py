"""The alert rules in Prometheus' own tool: they are valid, and fire when they have to and not otherwise."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

GRAFANA = Path(__file__).parents[2] / "deploy" / "grafana"
PROMTOOL = shutil.which("promtool")


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed (Debian's package prometheus)")
def test_alerts_fire_when_they_have_to() -> None:
    for what, file in (("check", "alerts.yaml"), ("test", "alerts_test.yaml")):
        done = subprocess.run(
            [str(PROMTOOL), what, "rules", file], cwd=GRAFANA, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_to_fire_once() -> None:
    rules = yaml.safe_load((GRAFANA / "alerts.yaml").read_text())
    tests = yaml.safe_load((GRAFANA / "alerts_test.yaml").read_text())
    wanted = [case for test in tests["tests"] for case in test["alert_rule_test"] if case.get("exp_alerts")]
    assert {case["alertname"] for case in wanted} == {rule["alert"] for g in rules["groups"] for rule in g["rules"]}
