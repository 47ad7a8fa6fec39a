"""The engine process from its first line to its last: configuration in, parts built, loop, parts closed.

``python -m pd_serve.engine`` calls :func:`main` with what makes its role. Torch is imported only after
threads and cores are set, and errors that a user can mend reach the node as ``EngineFailed``.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import msgspec
import zmq

from pd_serve import interpreter, logs
from pd_serve.config import EngineConfig
from pd_serve.engine.channel import Channel
from pd_serve.engine.pulse import Pulse
from pd_serve.errors import PDServeError, TransferError
from pd_serve.wire.engine import EngineFailed, EngineReady
from pd_serve.wire.link import Load, ModelInfo

if TYPE_CHECKING:
    from pd_serve.engine.arrivals import Copies
    from pd_serve.engine.core import Engine
    from pd_serve.engine.ranks import Ranks
    from pd_serve.engine.role import Role
    from pd_serve.engine.scheduler import Scheduler
    from pd_serve.kv.layout import KVLayout
    from pd_serve.kv.manager import KVManager
    from pd_serve.memory.region import PoolMemory
    from pd_serve.models.sizes import Sizes
    from pd_serve.transfer.relay import Relays
    from pd_serve.transfer.session.handshake import Identity

log = logging.getLogger(__name__)

# oneDNN and torch's layer over it each keep a compiled kernel, 0.4 MiB and more, for every number of rows a matrix was
# multiplied with: 1024 of them, unless told otherwise. A step uses about five, and a new one costs a millisecond.
KERNELS_KEPT = 128


@dataclass(frozen=True)
class Parts:
    """What a role is built from: the same for every role of an engine, but for the identity's epoch."""

    config: EngineConfig
    identity: Identity
    layout: KVLayout
    kv: KVManager
    scheduler: Scheduler
    memory: PoolMemory
    relays: Relays | None = None  # where there are other ranks


# Starts the role's transfer thread; Role.wait_ready is called when the model is loaded.
RoleFactory = Callable[[Parts], "Role"]


class Roles:
    """The roles of one engine, one after another (see :class:`pd_serve.engine.lifecycle.Roles`)."""

    def __init__(self, make: RoleFactory, parts: Parts, info: ModelInfo) -> None:
        self._make = make
        self._parts = parts
        self._info = info
        self._start_s: dict[str, float] = {}
        self.lets_in = parts.config.role != "decode"

    def open(self) -> Role:
        self._parts = replace(self._parts, identity=replace(self._parts.identity, epoch=uuid.uuid4().hex))
        return self._make(self._parts)

    def introduce(self, role: Role, load: Load, start_s: dict[str, float]) -> EngineReady:
        parts, timeout_s = self._parts, self._parts.config.transport_timeout_s
        role.wait_ready(timeout_s)
        self._start_s = start_s or self._start_s
        return EngineReady(
            model=self._info,
            layout=parts.layout.kin(),
            layout_text=parts.layout.describe(),
            epoch=parts.identity.epoch,
            peer_addresses=role.listen(timeout_s) if self.lets_in else (),
            transport=role.transport,
            load=load,
            start_s=self._start_s,
        )


class Stopwatch:
    """Seconds of each phase of the start, since the process began."""

    def __init__(self) -> None:
        self.phases: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.phases[name] = round(now - self._last, 3)
        self._last = now


def main(make_role: RoleFactory) -> int:
    """Runs one engine; its configuration is JSON on standard input. Returns the exit status."""
    whole = msgspec.json.decode(sys.stdin.buffer.read(), type=EngineConfig)
    config = share_of(whole, 0)
    set_up(config, "engine")

    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    with contextlib.ExitStack() as stack:
        stack.callback(context.term)
        ranks = start_ranks(whole, stack)  # while this process has no other threads
        pulse = Pulse(context, config.pulse_address, config.engine_timeout_s, config.step_timeout_s)
        stack.callback(pulse.close)
        pulse.start()  # before all that takes time
        channel = stack.enter_context(Channel(context, config.address))
        try:
            engine, ready = build(config, channel, pulse, make_role, ranks)
        except PDServeError as error:
            channel.send_node(EngineFailed(str(error)))
            return 1
        except Exception as error:
            log.exception("the engine cannot start")
            channel.send_node(EngineFailed(f"the engine cannot start: {type(error).__name__}: {error}"))
            return 1
        stack.callback(engine.close)
        # what a start leaves, 0.2 million objects, is for good: each look at them would stop all threads for 0.1 s
        gc.freeze()
        channel.send_node(ready)
        try:
            engine.run()
        except TransferError as error:
            log.critical("the engine ends: %s", error)
            return 1
    return 0


def set_up(config: EngineConfig, name: str) -> None:
    """What a process that computes does first: before torch is imported."""
    logs.configure(config.log_level, name, form=config.log_format)
    for ignored in (signal.SIGINT, signal.SIGTERM):  # the node decides when the engine ends
        signal.signal(ignored, signal.SIG_IGN)
    if config.device == "cuda":
        interpreter.switch_often()
    if config.cpus:
        os.sched_setaffinity(0, config.cpus)
    os.environ["OMP_NUM_THREADS"] = str(config.threads)
    bound_caches()
    leave_out_shapes(config)


def share_of(config: EngineConfig, rank: int) -> EngineConfig:
    """What is a rank's: of cores and threads its part, or all of the cores where there are too few to deal."""
    if config.tp == 1:
        return config
    cpus = config.cpus[rank :: config.tp] if len(config.cpus) >= config.tp else config.cpus
    return replace(config, cpus=cpus, threads=max(1, config.threads // config.tp))


def start_ranks(config: EngineConfig, stack: contextlib.ExitStack) -> Ranks | None:
    """The engine's other ranks, side by side with this one; they end with ``stack``."""
    if config.tp == 1:
        return None
    from pd_serve.engine.ranks import Ranks

    return stack.enter_context(contextlib.closing(Ranks(config)))


def bound_caches() -> None:
    """Bounds what torch's matrix kernels keep for each batch size that ever came. Before torch is imported."""
    for variable in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(variable, str(KERNELS_KEPT))


def leave_out_shapes(config: EngineConfig) -> None:
    """Of what ``import torch`` (2.13) imports, operators' shapes without memory: a quarter of its time.

    Compilers need them; an engine on cores has torch compile nothing. Before torch is imported, and for the version
    that this was tried with: the module is private.
    """
    if config.device == "cpu" and "torch" not in sys.modules and version("torch").startswith("2.13."):
        sys.modules.setdefault("torch._meta_registrations", ModuleType("torch._meta_registrations"))


def build(
    config: EngineConfig, channel: Channel, pulse: Pulse, make_role: RoleFactory, ranks: Ranks | None
) -> tuple[Engine, EngineReady]:
    """Loads the model, allocates the pool, starts the transfer thread. ``ranks``: the others. Raises PDServeError."""
    watch = Stopwatch()
    import torch

    torch.set_grad_enabled(False)

    from pd_serve.compute.backend import backend_for
    from pd_serve.engine.core import Engine
    from pd_serve.engine.lifecycle import Lifecycle
    from pd_serve.engine.ranks import RankedExecutor
    from pd_serve.engine.tier import arrivals_of, open_tier
    from pd_serve.grammar.constraints import Constraints
    from pd_serve.models.sizes import sizes

    backend = backend_for(config)
    watch.lap("import")
    fit = sizes(config, Path(config.model), config.template)
    weights = "in FP8" if fit.model.quantization else f"in {config.dtype}"
    log.info("the checkpoint's weights are %s, activations %s, K and V %s", weights, config.dtype, fit.layout.dtype)
    executor = backend.make_executor(config, fit, None if ranks is None else ranks.meet)
    own = open_tier(config, backend, fit.layout, executor.memory()[0])
    copies: Copies | None = own if own is None or ranks is None else ranks.copies(own)
    parts, info = _parts(config, fit, executor.memory()[0], backend.SATURATING_TOKENS, copies)
    arrivals = None if copies is None else arrivals_of(parts.kv, parts.scheduler, copies)
    if ranks is not None:
        parts = replace(parts, relays=ranks.relays())
        executor = RankedExecutor(executor, ranks)
    roles = Roles(make_role, parts, info)
    role = roles.open()  # the transport starts on its own thread while the model loads
    try:
        watch.lap("pool")
        executor.load()
        watch.lap("load")
        executor.warm_up()
        watch.lap("warm_up")
        role.wait_ready(config.transport_timeout_s)
        watch.lap("transfer")
    except BaseException:
        role.close()
        raise
    engine = Engine(
        kv=parts.kv,
        scheduler=parts.scheduler,
        executor=executor,
        lifecycle=Lifecycle(roles, role, parts.kv, executor, pulse, arrivals),
        channel=channel,
        pulse=pulse,
        eos_token_ids=fit.model.eos_token_ids,
        vocab_size=fit.model.vocab_size,
        status_interval_s=pulse.interval_s,
        arrivals=arrivals,
        constraints=Constraints(Path(config.model) / "tokenizer.json", fit.model.vocab_size, fit.model.eos_token_ids),
    )
    return engine, roles.introduce(role, engine.load(), watch.phases)


def _parts(
    config: EngineConfig, fit: Sizes, memory: PoolMemory, saturating_tokens: int, copies: Copies | None
) -> tuple[Parts, ModelInfo]:
    """The engine's books over its pool and its host tier, and what others are told of the model."""
    from pd_serve.engine.scheduler import Limits, Scheduler
    from pd_serve.engine.tier import kv_manager
    from pd_serve.memory.switches import check_expandable_segments

    check_expandable_segments(on_gpu=memory.device is not None, cumem=bool(config.enable_cumem_allocator))
    model, layout = fit.model, fit.layout
    counts = tuple(region.num_blocks for region in memory.regions[: len(layout.groups)])
    identity = identity_of(config, fit, rank=0)
    kv = kv_manager(config, layout, counts, fit.max_model_len + 1, identity.model, copies)
    limits = Limits(
        max_num_seqs=config.batch_limit,
        max_num_batched_tokens=config.token_budget,
        saturating_tokens=saturating_tokens,
        max_queue=config.max_queue,
        max_queue_wait_s=config.max_queue_wait_s,
        max_model_len=fit.max_model_len,
    )
    info = ModelInfo(
        name=config.served_model_name,
        fingerprint=identity.model,
        max_model_len=fit.max_model_len,
        vocab_size=model.vocab_size,
        eos_token_ids=list(model.eos_token_ids),
    )
    return Parts(config, identity, layout, kv, Scheduler(kv, limits), memory), info


def identity_of(config: EngineConfig, fit: Sizes, *, rank: int) -> Identity:
    """What a rank says of itself to peers. Every role opens under an epoch of its own."""
    from pd_serve.models.config import fingerprint
    from pd_serve.transfer.session.handshake import Identity

    long_rope = any(rope.long for rope in fit.model.ropes)
    return Identity(
        node_id=config.node_id,
        epoch="",
        model=fingerprint(Path(config.model), config.dtype, config.load_format, long_rope=long_rope),
        layout=fit.layout,
        secret=config.secret.encode(),
        checksums=config.checksums,
        rank=rank,
        ranks=config.tp,
    )
