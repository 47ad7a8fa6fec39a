"""From "ready" to "usable": one request of 2,048 tokens of an 8B model (256 MiB), and eight at once.

    python benchmarks/usable.py [--device cuda|host] [--transport auto] [--mib 256] [--block-kib 2048]

A real outbox and a real inbox in two processes, with handshake, self-test, leases and checksums; blocks are random ones
of pools of bytes. *ready to usable* counts on the decode side, from the announcement's arrival; *publish to usable*
from the prefill node's call, its checksums and both ways included.
"""

from __future__ import annotations

import argparse
import multiprocessing
import select
import statistics
import time
import uuid
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from pd_serve.decode.inbox import Arrived, Failed, Inbox, Offered
from pd_serve.kv.layout import KVLayout, kv_group
from pd_serve.prefill.outbox import Outbox
from pd_serve.transfer.choice import lanes_for
from pd_serve.transfer.session.handshake import Identity
from pd_serve.transfer.worker import TransferWorker
from pd_serve.wire.link import Source
from pd_serve.wire.peer import Blocks

HEADS, DIM = 8, 128


def layout(block_kib: int) -> KVLayout:
    """16 tokens a block in bfloat16, with as many layers as the block has room for."""
    return KVLayout(16, "bfloat16", (kv_group(tuple(range(block_kib // 64)), HEADS, DIM),))


def make_pool(kv: KVLayout, num_blocks: int, device: int | None) -> Any:
    if device is None:
        from pd_serve.memory.pool import HostPool

        pool = HostPool(kv, (num_blocks,))
        pool.tensors()[0].random_()
        return pool
    import torch

    from pd_serve.memory.sleep import DeviceMemory

    torch.cuda.set_device(device)
    pool = DeviceMemory(device, pin=True).kv_pool(kv, (num_blocks,))
    pool.tensors()[0].random_()
    torch.cuda.synchronize()
    return pool


def make_identity(name: str, kv: KVLayout, checksums: bool, secret: str) -> Identity:
    epoch = uuid.uuid4().hex
    return Identity(node_id=name, epoch=epoch, model="bytes", layout=kv, secret=secret.encode(), checksums=checksums)


def source(pipe: Connection, options: argparse.Namespace, checksums: bool) -> None:
    kv = layout(options.block_kib)
    pool = make_pool(kv, options.blocks, options.devices[0] if options.device == "cuda" else None)
    me = make_identity("P", kv, checksums, options.secret)
    lanes = lanes_for(options.transport, f"p-{me.epoch}", pool.memory(), reads_only=False)
    worker = TransferWorker(lanes)
    outbox = Outbox(me, worker, host="127.0.0.1", lease_s=30.0)
    worker.start()
    worker.wait_ready()
    pipe.send((me.epoch, outbox.listen(60.0)))
    rng = np.random.default_rng(1)
    while (keys := pipe.recv()) is not None:
        count = options.mib * 1024 // options.block_kib
        for key in keys:
            outbox.open(key)
        ids = [(1 + rng.permutation(options.blocks - 1)[:count]).astype("<i4").tobytes() for _ in keys]
        time.sleep(options.pause_ms / 1e3)  # claims have arrived
        start = time.monotonic()
        for key, blocks in zip(keys, ids, strict=True):
            outbox.publish(key, count * 16, [Blocks(0, 0, blocks)], 7)
        pipe.send(start)
    worker.close()


def measure(options: argparse.Namespace, checksums: bool) -> None:
    spawn = multiprocessing.get_context("spawn")
    pipe, theirs = spawn.Pipe()
    process = spawn.Process(target=source, args=(theirs, options, checksums), daemon=True)
    process.start()
    kv = layout(options.block_kib)
    pool = make_pool(kv, options.blocks, options.devices[1] if options.device == "cuda" else None)
    me = make_identity("D", kv, checksums, options.secret)
    lanes = lanes_for(options.transport, f"d-{me.epoch}", pool.memory(), reads_only=True)
    worker = TransferWorker(lanes)
    inbox = Inbox(me, worker, pull_timeout_s=30.0)
    worker.start()
    worker.wait_ready()
    epoch, addresses = pipe.recv()
    peer = Source("P", epoch, addresses)
    count = options.mib * 1024 // options.block_kib
    rng = np.random.default_rng(2)
    for requests in (1, 8):
        seen: dict[str, list[float]] = {"ready": [], "publish": [], "moving": []}
        for turn in range(options.repeats + 2):
            keys = [uuid.uuid4().hex for _ in range(requests)]
            for key in keys:
                inbox.expect(key, peer)
            pipe.send(keys)
            tables = (
                (1 + rng.permutation(options.blocks - 1)[: count * requests]).astype(np.int32).reshape(requests, -1)
            )
            offered_s, usable_s, moving = 0.0, 0.0, 0.0
            ended = 0
            while ended < requests:
                select.select([inbox.fileno()], [], [])
                for event in inbox.events():
                    match event:
                        case Offered():
                            offered_s = offered_s or time.monotonic()
                            inbox.accept(event.key, [tables[keys.index(event.key)]], [0])
                        case Arrived():
                            usable_s, moving, ended = time.monotonic(), event.seconds, ended + 1
                        case Failed():
                            raise SystemExit(f"{event.kind}: {event.message}")
            published_s = pipe.recv()
            if turn >= 2:
                seen["ready"].append(usable_s - offered_s)
                seen["publish"].append(usable_s - published_s)
                seen["moving"].append(moving)
        ms = {name: f"{statistics.median(values) * 1e3:.3f}" for name, values in seen.items()}
        print(
            f"RESULT {requests} x {options.mib} MiB, blocks of {options.block_kib} KiB, checksums "
            f"{'on' if checksums else 'off'}: ready to usable {ms['ready']} ms, publish to usable {ms['publish']} ms "
            f"(medians of {options.repeats}; bytes of the last moved for {ms['moving']} ms)",
            flush=True,
        )
    pipe.send(None)
    worker.close()
    process.join(10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "host"))
    parser.add_argument(
        "--devices", default=(0, 1), type=lambda text: tuple(map(int, text.split(","))), help="source, reader"
    )
    parser.add_argument("--transport", default="auto")
    parser.add_argument("--mib", type=int, default=256, help="of one request")
    parser.add_argument("--block-kib", type=int, default=2048)
    parser.add_argument("--blocks", type=int, default=2048, help="of each pool")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--secret", default="", help="of both; messages then carry MACs")
    parser.add_argument("--pause-ms", type=float, default=2.0, help="between requests; after a longer one CPUs sleep")
    options = parser.parse_args()
    for checksums in (True, False):
        measure(options, checksums)


if __name__ == "__main__":
    main()
