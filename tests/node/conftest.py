"""Real node processes with a scripted engine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from tests import nursery
from tests.node.harness import NodeUnderTest, StartNode
from tests.ports import free_port


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a node reads of a model: enough for --load-format dummy and GET /model."""
    directory = tmp_path_factory.mktemp("model") / "tiny"
    directory.mkdir()
    (directory / "config.json").write_text('{"model_type": "llama"}')
    Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a")).save(str(directory / "tokenizer.json"))
    return directory


@pytest.fixture
def start_node(model_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartNode]:
    """``start_node("behaviour of the engine", "--flag", ...)``; ready unless ``ready=False``."""
    started: list[NodeUnderTest] = []

    def start(
        behaviour: str,
        *flags: str,
        role: str = "decode",
        ready: bool = True,
        port: int = 0,
        variables: dict[str, str] | None = None,
    ) -> NodeUnderTest:
        port = port or free_port()
        arguments = [behaviour, role, "--model", str(model_directory), "--load-format", "dummy", "--port", str(port)]
        environ = {name: value for name, value in os.environ.items() if not name.startswith("PD_SERVE_")}
        log = tmp_path_factory.mktemp("node") / "log"
        process = nursery.start("tests.node.run_node", [*arguments, *flags], log, environ | (variables or {}))
        node = NodeUnderTest(process, port, log)
        started.append(node)
        if ready:
            node.until_ready()
        return node

    yield start
    for node in started:
        node.close()
