"""Other ranks of an engine that cannot start: the node hears why, though rank 0 waits elsewhere."""

from __future__ import annotations

from pathlib import Path

import msgspec
import zmq

from pd_serve.config import EngineConfig
from pd_serve.wire import engine as wire
from tests.nursery import start


def test_what_a_rank_says_that_cannot_start(tmp_path: Path) -> None:
    config = EngineConfig(
        role="prefill",
        model=str(tmp_path / "gone"),
        tp=2,
        threads=2,
        device="cpu",
        dtype="float32",
        node_id="n",
        address=f"ipc://{tmp_path}/engine",
        pulse_address="",
        template="",
    )
    with zmq.Context() as context, context.socket(zmq.DEALER) as node:
        node.bind(config.address)
        (tmp_path / "config").write_bytes(msgspec.json.encode(config))
        rank_0 = start("tests.engine.lonely_rank", [str(tmp_path / "config")], tmp_path / "log")
        assert rank_0.wait(60) == 1
        assert node.poll(5000)
        said = msgspec.msgpack.decode(node.recv_multipart()[1], type=wire.FromEngine)
    assert isinstance(said, wire.EngineFailed)
    assert said.message.startswith("rank 1: ") and "gone" in said.message
