"""The lines that ``up`` prints to be typed are whole, for models with and without a chat template."""

from __future__ import annotations

import json
import shlex

import pytest

from pd_serve import introduction
from pd_serve.config import UpConfig


@pytest.mark.parametrize("chat", [True, False])
def test_lines_to_type(chat: bool) -> None:
    config = UpConfig(served_model_name="it's", api_key=("k",))
    rows = [("process", "endpoint"), ("router", "http://h:1")]
    shown = introduction.text(config, "http://h:1", {"Live": "http://h:2/dashboard"}, rows, 1.5, chat=chat)
    assert "it's at http://h:1/v1" in shown and "Live: http://h:2/dashboard" in shown
    command = shlex.split(next(line for line in shown.splitlines() if line.startswith("  curl")))
    path = "chat/completions" if chat else "completions"
    assert command[1] == f"http://h:1/v1/{path}" and "Authorization: Bearer YOUR_KEY" in command
    body = json.loads(command[-1])
    assert body["model"] == "it's" and body["temperature"] == 0 and ("messages" in body) is chat
    code = "\n".join(line.strip() for line in shown.splitlines() if line.startswith(("  import", "  print")))
    compile(code, "shown", "exec")
    assert code.count("\n") == 1 and "YOUR_KEY" in code and f".{path.replace('/', '.')}.create(" in code
