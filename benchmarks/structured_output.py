"""What a grammar costs a step: decodes of a batch that are all constrained, against the same ones free, in turns.

    python benchmarks/structured_output.py [MODEL] [--batch 8] [--threads 1] [--steps 200]

MODEL is taken as `pd-serve up` takes it. A step is the model and the sampler; with a grammar also what the engine adds:
tokens to the grammar process, waiting for its masks, and their use. A step of each kind follows the other, so that a
busy machine is busy for both. Prints medians and the parts of the difference.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import numpy as np
import torch
from engine_step import BLOCK_SIZE, step_of

from pd_serve.compute.cpu import ops
from pd_serve.compute.cpu.runner import Runner
from pd_serve.compute.cpu.sampler import Sampler
from pd_serve.compute.step import SAMPLING, SamplingRow, Step
from pd_serve.grammar.constraints import Constraint, Constraints
from pd_serve.kv.layout import KVLayout
from pd_serve.memory.pool import HostPool
from pd_serve.models.config import ModelConfig
from pd_serve.models.decoder import load_decoder
from pd_serve.models.source import resolve
from pd_serve.wire.link import Grammar

CONTEXT = 256
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "city": {"enum": ["Berlin", "Paris", "Warszawa"]},
        "notes": {"type": "array", "items": {"type": "object", "properties": {"text": {"type": "string"}}}},
    },
    "required": ["name", "age", "city", "notes"],
}


class Batch:
    """Outputs under one grammar; one that ends begins anew."""

    def __init__(self, constraints: Constraints, size: int) -> None:
        self._constraints = constraints
        self._outputs: list[list[int]] = [[] for _ in range(size)]
        self._open = [self._begin() for _ in range(size)]

    def _begin(self) -> Constraint:
        constraint = self._constraints.open(Grammar("json_schema", json.dumps(SCHEMA)), [])
        while not constraint.heard:
            time.sleep(1e-4)
            self._constraints.receive()
        return constraint

    def masks(self) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
        """As the engine gets them before a step: those of what was told are waited for."""
        while not all(constraint.heard for constraint in self._open):
            self._constraints.wait(self._open)
        return np.concatenate([c.mask for c in self._open if c.mask is not None])

    def tell(self, tokens: list[int]) -> None:
        for constraint, output, token in zip(self._open, self._outputs, tokens, strict=True):
            output.append(token)
            self._constraints.tell(constraint, [token])

    def renew(self, eos: tuple[int, ...]) -> None:
        for i, output in enumerate(self._outputs):
            if output and output[-1] in eos:
                self._constraints.close(self._open[i])
                output.clear()
                self._open[i] = self._begin()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dtype", default="auto", choices=["auto", "bfloat16", "float32"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()

    files = resolve(args.model, args.dtype)
    config = ModelConfig.from_directory(files.directory)
    layout = KVLayout(BLOCK_SIZE, files.dtype, config.layer_groups())
    pool = HostPool(layout, (args.batch * layout.blocks_for(CONTEXT) + 1,) * len(layout.groups))
    for region in pool.tensors():
        region.view(getattr(torch, files.dtype)).normal_()
    torch.set_num_threads(args.threads)
    model = load_decoder(files.directory, config, files.dtype, files.load_format, ops=ops, max_positions=CONTEXT)
    runner = Runner(model, config, layout, pool.tensors(), args.threads)
    sampler = Sampler(config.vocab_size)
    runner.warm_up()
    sampler.warm_up()
    constraints = Constraints(files.directory / "tokenizer.json", config.vocab_size, config.eos_token_ids)
    try:
        measure(args, Batch(constraints, args.batch), runner, sampler, len(layout.groups), config.eos_token_ids)
    finally:
        constraints.shut()


def measure(
    args: argparse.Namespace, batch: Batch, runner: Runner, sampler: Sampler, groups: int, eos: tuple[int, ...]
) -> None:
    row = SamplingRow(0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0, -1)
    free, bound = step_of(groups, args.batch, 1, CONTEXT), step_of(groups, args.batch, 1, CONTEXT)
    for step in (free, bound):
        step.sampled_rows = np.arange(args.batch)
        step.sampling = np.array([tuple(row._replace(seed=i)) for i in range(args.batch)], SAMPLING)
    bound.sampling["mask"] = np.arange(args.batch)
    plain, constrained, waited = [], [], []
    for number in range(args.steps + 1):
        for step in (free, bound):
            step.sampling["output_index"] = number
        plain.append(seconds_of(free, runner, sampler)[0])
        began_s = time.perf_counter()
        bound.masks = batch.masks()
        waited.append(time.perf_counter() - began_s)
        took_s, tokens = seconds_of(bound, runner, sampler)
        began_s = time.perf_counter()
        batch.tell(tokens)
        waited[-1] += time.perf_counter() - began_s
        constrained.append(took_s + waited[-1])
        batch.renew(eos)
    base, whole, masks = (1e3 * statistics.median(times[1:]) for times in (plain, constrained, waited))
    print(
        f"{args.model}, batch {args.batch}, {args.threads} threads: free {base:.2f} ms a step, constrained "
        f"{whole:.2f} ms ({100 * (whole / base - 1):+.1f}%), of which {masks:.2f} ms to tell tokens and wait for masks"
    )


def seconds_of(step: Step, runner: Runner, sampler: Sampler) -> tuple[float, list[int]]:
    began_s = time.perf_counter()
    tokens = sampler.sample(step, runner.execute(step)).tokens
    return time.perf_counter() - began_s, tokens


if __name__ == "__main__":
    main()
