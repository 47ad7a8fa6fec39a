"""How an engine starts: in which order, what it says of itself, and what is left of a start that fails."""

from __future__ import annotations

import io
import json
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import zmq

from pd_serve.compute import backend
from pd_serve.config import EngineConfig
from pd_serve.engine import boot
from pd_serve.engine.pulse import Pulse
from pd_serve.errors import ModelError, PDServeError
from pd_serve.models.sizes import Sizes
from pd_serve.wire import engine as wire
from tests.models.reference import SIZES

STEPS = ["executor", "open", "load", "warm up", "ready"]


class Start:
    """A backend and a role that note what is asked of them, in order. ``broken``: the step that fails."""

    SATURATING_TOKENS = 8
    depth = 0
    transport = "nixl"

    def __init__(self, directory: Path) -> None:
        (directory / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], **SIZES}))
        self.config = EngineConfig(
            role="prefill", node_id="n", model=str(directory), served_model_name="m", dtype="float32",
            load_format="dummy", kv_cache_memory=1 << 20, threads=1, secret="s3cret", template="",
            address=f"ipc://{directory}/engine", pulse_address=f"ipc://{directory}/pulse",
        )  # fmt: skip
        self.said: list[str] = []
        self.broken = ""
        self.parts: list[boot.Parts] = []

    def note(self, step: str) -> None:
        self.said.append(step)
        if step == self.broken:
            raise PDServeError(f"no {step}")

    # --- backend and executor -------------------------------------------------------------------------

    def make_executor(self, config: EngineConfig, fit: Sizes, meet: object) -> Start:
        self.note("executor")
        self.regions = [SimpleNamespace(num_blocks=fit.num_blocks)] * len(fit.layout.groups)
        return self

    def memory(self) -> list[Any]:
        return [SimpleNamespace(device=None, regions=self.regions)]

    def load(self) -> None:
        self.note("load")

    def warm_up(self) -> None:
        self.note("warm up")

    def report(self) -> None:
        return None

    # --- role -----------------------------------------------------------------------------------------

    def make_role(self, parts: boot.Parts) -> Any:
        self.parts.append(parts)
        self.note("open")
        return self

    def wait_ready(self, timeout_s: float) -> str:
        if "ready" not in self.said:
            self.note("ready")
        return "tcp://here"

    def listen(self, timeout_s: float) -> tuple[str, ...]:
        return ("tcp://here",)

    def close(self) -> bool:
        self.said.append("close")
        return True

    queued = leases = pulling = 0

    def counters(self) -> dict[str, float]:
        return {}

    def lanes(self) -> dict[str, float]:
        return {}

    def misfits(self) -> dict[str, str]:
        return {}

    def build(self) -> wire.EngineReady:
        channel: Any = SimpleNamespace()
        _, ready = boot.build(
            self.config, channel, Pulse(zmq.Context(), self.config.pulse_address, 5, 5), self.make_role, None
        )
        return ready


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    made = Start(tmp_path)
    monkeypatch.setattr(backend, "backend_for", lambda _: made)
    return made


def test_an_engine_is_ready_when_its_model_and_its_transfer_thread_are(start: Start) -> None:
    ready = start.build()
    assert start.said == STEPS
    assert (ready.model.name, ready.model.max_model_len, ready.model.vocab_size) == ("m", 256, 320)
    assert ready.peer_addresses == ("tcp://here",) and ready.transport == "nixl"
    assert list(ready.start_s) == ["import", "pool", "load", "warm_up", "transfer"]
    (parts,) = start.parts
    assert ready.epoch == parts.identity.epoch and len(ready.epoch) == 32
    assert ready.layout == parts.layout.kin() and parts.identity.model == ready.model.fingerprint
    assert parts.identity.secret == b"s3cret" and parts.kv.layout == parts.layout


def test_every_role_has_an_epoch_of_its_own(start: Start) -> None:
    ready = start.build()
    roles = boot.Roles(start.make_role, start.parts[0], ready.model)
    epochs = [roles.introduce(roles.open(), ready.load, {}).epoch for _ in range(3)]
    assert len({ready.epoch, *epochs}) == 4
    assert epochs == [parts.identity.epoch for parts in start.parts[1:]]


@pytest.mark.parametrize("broken", STEPS)
def test_a_start_that_fails_leaves_no_transfer_thread(start: Start, broken: str) -> None:
    start.broken = broken
    with pytest.raises(PDServeError, match=f"no {broken}"):
        start.build()
    opened = STEPS.index(broken) > STEPS.index("open")
    assert start.said == [*STEPS[: STEPS.index(broken) + 1], *["close"] * opened]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ModelError("there is no model"), "there is no model"),
        (ValueError("oh"), "the engine cannot start: ValueError: oh"),
    ],
)
def test_the_node_hears_why_an_engine_cannot_start(
    start: Start, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(boot, "build", fail)
    monkeypatch.setattr(boot, "bound_caches", lambda: None)
    monkeypatch.setattr(boot.logs, "configure", lambda *_, **__: None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(msgspec.json.encode(start.config))))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    with context.socket(zmq.DEALER) as node, context.socket(zmq.PULL) as pulse:
        node.bind(start.config.address)
        pulse.bind(start.config.pulse_address)
        assert boot.main(start.make_role) == 1
        assert node.poll(5000)
        origin, payload = node.recv_multipart()
        assert origin == wire.NODE
        assert wire.decode_from_engine(payload) == wire.EngineFailed(said)
    context.term()
