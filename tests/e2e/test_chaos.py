"""The quick form of the chaos run: nothing is lost, wrong, hung or leaked, and strangers get nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e import tiny_model
from tests.e2e.chaos import Chaos

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def test_requests_under_faults(tmp_path: Path) -> None:
    chaos = Chaos(tmp_path, tiny_model.write(tmp_path / "model"), seed=1)
    try:
        report = chaos.run(240, faults=5, clients=6, rest_s=0.3)
    except BaseException:
        for log in sorted(tmp_path.glob("*.log")):
            print(f"--- {log.name}\n{log.read_text()[-2000:]}")
        raise
    finally:
        chaos.close()
    print(report)
    assert not report.failures(), report.failures()
