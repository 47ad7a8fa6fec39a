"""The engine process from its first line to its last: configuration in, parts built, loop, parts closed.

``python -m pd_serve.prefill`` and ``python -m pd_serve.decode`` call :func:`main` with what makes them
one or the other. Torch is imported only after threads and cores are set, and errors that a user can
mend reach the node as ``EngineFailed``.
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
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import zmq

from pd_serve import logs
from pd_serve.config import EngineConfig
from pd_serve.engine.channel import Channel
from pd_serve.engine.pulse import Pulse
from pd_serve.errors import PDServeError, TransferError
from pd_serve.wire.engine import EngineFailed, EngineReady
from pd_serve.wire.link import Load, ModelInfo

if TYPE_CHECKING:
    from pd_serve.engine.core import Engine
    from pd_serve.engine.role import Role
    from pd_serve.engine.scheduler import Scheduler
    from pd_serve.kv.layout import KVLayout
    from pd_serve.kv.manager import KVManager
    from pd_serve.memory.region import PoolMemory
    from pd_serve.models.decoder import Decoder
    from pd_serve.transfer.lanes import Lanes
    from pd_serve.transfer.session.handshake import Identity

log = logging.getLogger(__name__)

# oneDNN and torch's layer over it each keep a compiled kernel, 0.4 MiB and more, for every number of rows a matrix was
# multiplied with: 1024 of them, unless told otherwise. A step uses about five, and a new one costs a millisecond.
KERNELS_KEPT = 128

# A CPU core multiplies 256 rows of bfloat16 as fast, a row, as any number of them.
SATURATING_TOKENS = 256


@dataclass(frozen=True)
class Parts:
    """What a role is built from: the same for every role of an engine, but for the identity's epoch."""

    config: EngineConfig
    identity: Identity
    layout: KVLayout
    kv: KVManager
    scheduler: Scheduler
    memory: PoolMemory

    def lanes(self, *, reads_only: bool) -> Lanes:
        """What the role's transfer thread will start. ``reads_only``: no other node reads this one's memory."""
        from pd_serve.transfer.choice import lanes_for

        config = self.config
        return lanes_for(
            config.transport,
            f"{self.identity.node_id}-{self.identity.epoch}",
            self.memory,
            reads_only=reads_only,
            nixl_backend=config.nixl_backend,
            nixl_options=config.nixl_backend_options(),
            nvlink_socket_dir=config.nvlink_socket_dir,
        )


# Starts the role's transfer thread; Role.wait_ready is called when the model is loaded.
RoleFactory = Callable[[Parts], "Role"]


class Roles:
    """The roles of one engine, one after another (see :class:`pd_serve.engine.lifecycle.Roles`)."""

    def __init__(self, make: RoleFactory, parts: Parts, info: ModelInfo) -> None:
        self._make = make
        self._parts = parts
        self._info = info

    def open(self) -> Role:
        self._parts = replace(self._parts, identity=replace(self._parts.identity, epoch=uuid.uuid4().hex))
        return self._make(self._parts)

    def introduce(self, role: Role, load: Load, start_s: dict[str, float]) -> EngineReady:
        parts = self._parts
        address = role.wait_ready(parts.config.transport_timeout_s)
        return EngineReady(
            model=self._info,
            layout=parts.layout.kin(),
            layout_text=parts.layout.describe(),
            epoch=parts.identity.epoch,
            peer_addresses=(address,) if address else (),
            transport=role.transport,
            load=load,
            start_s=start_s,
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
    config = msgspec.json.decode(sys.stdin.buffer.read(), type=EngineConfig)
    logs.configure(config.log_level, f"{config.role}-engine")
    for ignored in (signal.SIGINT, signal.SIGTERM):  # the node decides when the engine ends
        signal.signal(ignored, signal.SIG_IGN)
    if config.cpus:
        os.sched_setaffinity(0, config.cpus)
    os.environ["OMP_NUM_THREADS"] = str(config.threads)
    bound_caches()

    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    with contextlib.ExitStack() as stack:
        stack.callback(context.term)
        pulse = Pulse(context, config.pulse_address, config.engine_timeout_s, config.step_timeout_s)
        stack.callback(pulse.close)
        pulse.start()  # before all that takes time
        channel = stack.enter_context(Channel(context, config.address))
        try:
            engine, ready = build(config, channel, pulse, make_role)
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


def bound_caches() -> None:
    """Bounds what torch's matrix kernels keep for each batch size that ever came. Before torch is imported."""
    for variable in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(variable, str(KERNELS_KEPT))


def build(config: EngineConfig, channel: Channel, pulse: Pulse, make_role: RoleFactory) -> tuple[Engine, EngineReady]:
    """Loads the model, allocates the pool, starts the transfer thread. Raises PDServeError."""
    # long: every part of an engine once, in the order in which they need each other
    watch = Stopwatch()
    import torch

    torch.set_num_threads(config.threads)
    torch.set_grad_enabled(False)

    from pd_serve.compute.cpu import ops
    from pd_serve.compute.cpu.executor import LocalExecutor
    from pd_serve.compute.cpu.runner import Runner
    from pd_serve.compute.cpu.sampler import Sampler
    from pd_serve.engine.core import Engine
    from pd_serve.engine.lifecycle import Lifecycle
    from pd_serve.engine.scheduler import Limits, Scheduler
    from pd_serve.kv.manager import KVManager
    from pd_serve.memory.pool import HostPool
    from pd_serve.memory.switches import check_expandable_segments
    from pd_serve.models.config import fingerprint
    from pd_serve.models.decoder import load_decoder
    from pd_serve.models.sizes import sizes
    from pd_serve.transfer.session.handshake import Identity

    watch.lap("import")
    directory = Path(config.model)
    fit = sizes(config, directory, config.template)
    model, layout, max_model_len = fit.model, fit.layout, fit.max_model_len
    counts = (fit.num_blocks,) * len(layout.groups)
    pool = HostPool(layout, counts)
    check_expandable_segments(on_gpu=pool.memory().device is not None, cumem=bool(config.enable_cumem_allocator))
    kv = KVManager(layout, counts, max_model_len + 1, prefix_caching=config.prefix_caching)
    limits = Limits(
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        saturating_tokens=SATURATING_TOKENS,
        max_queue=config.max_queue,
        max_queue_wait_s=config.max_queue_wait_s,
        max_model_len=max_model_len,
    )
    scheduler = Scheduler(kv, limits)
    info = ModelInfo(
        name=config.served_model_name,
        fingerprint=fingerprint(
            directory, config.dtype, config.load_format, long_rope=any(rope.long for rope in model.ropes)
        ),
        max_model_len=max_model_len,
        vocab_size=model.vocab_size,
        eos_token_ids=list(model.eos_token_ids),
    )
    # every role opens under an epoch of its own
    identity = Identity(
        node_id=config.node_id,
        epoch="",
        model=info.fingerprint,
        layout=layout,
        secret=config.secret.encode(),
        checksums=config.checksums,
    )
    roles = Roles(make_role, Parts(config, identity, layout, kv, scheduler, pool.memory()), info)

    def read_weights() -> Decoder:
        return load_decoder(
            directory, model, config.dtype, config.load_format, ops=ops, max_positions=max_model_len + 1
        )

    role = roles.open()  # the transport starts on its own thread while the model loads
    try:
        watch.lap("pool")
        runner = Runner(None, model, layout, pool.tensors(), config.threads)
        executor = LocalExecutor(pool, runner, Sampler(model.vocab_size), read_weights)
        executor.load()
        watch.lap("load")
        executor.warm_up()
        watch.lap("warm_up")
        role.wait_ready(config.transport_timeout_s)
        pool.populate()
        watch.lap("transfer")
    except BaseException:
        role.close()
        raise
    engine = Engine(
        kv=kv,
        scheduler=scheduler,
        executor=executor,
        lifecycle=Lifecycle(roles, role, kv, executor, pulse),
        channel=channel,
        pulse=pulse,
        eos_token_ids=model.eos_token_ids,
        vocab_size=model.vocab_size,
    )
    return engine, roles.introduce(role, engine.load(), watch.phases)
