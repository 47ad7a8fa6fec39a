"""Weights in the host's memory beside a GPU. All bits are those of a model on the device, in graphs and without,
whatever lies where, after sleep and after a step that failed; bytes are where they were planned.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pd_serve.kv.layout import KVLayout
from pd_serve.models.config import ModelConfig
from pd_serve.models.decoder import Decoder, load_decoder
from pd_serve.models.interface import Ops
from pd_serve.models.offload import Wanted
from pd_serve.wire.link import TokenLogprob
from tests.compute.cuda.device import INTERPRETED, skip_without_gpu
from tests.e2e import tiny_model
from tests.models.fp8_files import quantise

if INTERPRETED:
    pytest.skip("needs a GPU's memory", allow_module_level=True)
skip_without_gpu()
pytest.importorskip("flashinfer")

from pd_serve.compute.cuda import experts, linears  # noqa: E402
from pd_serve.compute.cuda.bus import CudaBus  # noqa: E402
from pd_serve.compute.cuda.executor import CudaExecutor, Settings  # noqa: E402
from pd_serve.compute.cuda.offload import HostWeights  # noqa: E402
from pd_serve.compute.cuda.ops import CudaOps  # noqa: E402
from pd_serve.memory.pinned import should_pin_memory  # noqa: E402
from pd_serve.memory.upload import Upload  # noqa: E402
from pd_serve.memory.usage import KV_CACHE, WEIGHTS  # noqa: E402
from tests.compute.cuda.loop import GREEDY, Line, step_of  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(100)]

BLOCK, EACH, OUTPUT = 16, 12, 24
PROMPTS = ([5, 9, 200, 31], list(range(40, 139)), [7], list(range(100, 120)))
# heads for which FlashInfer's kernels need no compiler
SIZES = {
    "dense": tiny_model.Size(256, 7, 8, 2, 64, 512, 1024),
    "experts": tiny_model.Size(256, 4, 8, 2, 64, 128, 1024, experts=8),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    found = {name: tiny_model.write(folder / name, size) for name, size in SIZES.items()}
    quantise(found["dense"], "compressed-rows", folder / "fp8", folder / "plain")
    return {**found, "fp8": folder / "fp8"}


@pytest.fixture(scope="module", autouse=True)
def few_are_timed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Of kernels in bfloat16: it is enough that all models go the same ways, and matrices as small as a router's here
    are timed for minutes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PD_SERVE_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(linears, "choose", lambda shapes, *_, **__: dict.fromkeys(shapes, ()))
        patch.setitem(experts.choose.__kwdefaults__, "ladder", (8,))
        yield


def load(directory: Path, ops: Ops, device: str, dtype: str = "float32") -> Decoder:
    config = ModelConfig.from_directory(directory, None).for_length(BLOCK * EACH)
    with Upload(torch.device("cuda", 0), pin=should_pin_memory(True, 0)) as upload:
        return load_decoder(
            directory, config, dtype, ops=ops, max_positions=BLOCK * EACH + 1, device=device,
            upload=upload if device != "cpu" else None,
        )  # fmt: skip


Make = Callable[..., CudaExecutor]
Numbers = list[list[TokenLogprob]]


def start(directory: Path, dtype: str, wanted: Wanted | None, **settings: object) -> CudaExecutor:
    config = ModelConfig.from_directory(directory, None).for_length(BLOCK * EACH)
    layout = KVLayout(BLOCK, dtype, config.layer_groups())
    fixed: dict[str, Any] = {
        "max_num_seqs": 8, "max_num_batched_tokens": 128, "max_model_len": BLOCK * EACH, "num_blocks": 100,
        "weight_offload": wanted,
    }  # fmt: skip
    reader = lambda ops, device, _ranks: load(directory, ops, device, dtype)  # noqa: E731
    return CudaExecutor(config, layout, reader, Settings(**fixed | settings))


@pytest.fixture
def make(models: dict[str, Path]) -> Iterator[Make]:
    made: list[CudaExecutor] = []

    def start_one(model: str = "dense", wanted: Wanted | None = None, **settings: object) -> CudaExecutor:
        dtype = "float32" if model == "dense" else "bfloat16"
        made.append(start(models[model], dtype, wanted, **settings))
        return made[-1]

    yield start_one
    while made:
        made.pop().close()
    torch.cuda.set_stream(torch.cuda.default_stream())


def numbers(executor: CudaExecutor, chunk: int = 64) -> Numbers:
    """Tokens and their log-probabilities, with chunks of prompts among decodes, a step ahead."""
    sampling = GREEDY._replace(logprobs=5)
    lines = [Line(list(prompt), 1 + EACH * i, sampling) for i, prompt in enumerate(PROMPTS)]
    found: Numbers = [[] for _ in lines]
    before = None
    for turn in range(300):
        alive = [line for i, line in enumerate(lines) if turn >= i and line.done < line.num_prompt + OUTPUT]
        work = [(line, 1) for line in alive if line.done >= line.num_prompt]
        work += [(line, min(chunk, line.num_prompt - line.done)) for line in alive if line.done < line.num_prompt]
        launched = None
        if work:
            step = step_of(work, BLOCK, 1, EACH)
            launched = executor.launch(step), [line for line, _ in work if line.done >= line.num_prompt]
        if before:
            sampled = executor.collect(before[0])
            for line, token, logprobs in zip(before[1], sampled.tokens, sampled.logprobs, strict=True):
                line.tokens.append(token)
                assert logprobs is not None
                found[lines.index(line)].append(logprobs)
        before = launched
        if before is None:
            break
    return found


@pytest.fixture(scope="module")
def expected() -> dict[tuple[str, bool], Numbers]:
    """Of models on the device, with graphs and without, made when they are first asked for."""
    return {}


@pytest.mark.parametrize(
    ("model", "wanted"),
    [
        ("dense", Wanted("prefetch", "1layers")),
        ("dense", Wanted("prefetch", "5layers")),  # slots do not divide them
        ("dense", Wanted("prefetch", "100%")),
        ("dense", Wanted("prefetch", "40%", ("gate_up", "down"))),
        ("dense", Wanted("uva", "3layers")),
        ("experts", Wanted("uva", "100%", ("experts", "qkv"))),
        ("experts", Wanted("prefetch", "3layers", ("experts",))),
        ("fp8", Wanted("prefetch", "5layers")),
        ("fp8", Wanted("uva", "50%")),
    ],
)
def test_every_bit_is_that_of_a_model_on_the_device(
    make: Make, expected: dict[tuple[str, bool], Numbers], model: str, wanted: Wanted
) -> None:
    for eager in (True, False) if (model, wanted.size) == ("dense", "5layers") else (False,):
        if (model, eager) not in expected:
            expected[model, eager] = numbers(make(model, enforce_eager=eager))
        executor = make(model, wanted, enforce_eager=eager)
        for _ in range(2):
            assert numbers(executor) == expected[model, eager]
    offload = executor._offload
    assert offload is not None
    if offload.ring is not None and len(offload.plan_made.layers) > 1:
        before = offload.ring.copied_bytes
        executor.collect(executor.launch(executor._made_up([1], BLOCK)))
        assert offload.ring.copied_bytes - before == offload.ring.step_bytes > 0


@pytest.mark.parametrize("wanted", [None, Wanted("prefetch", "5layers"), Wanted("uva", "5layers")])
def test_a_graphs_bits_are_those_of_kernels_that_are_launched(make: Make, wanted: Wanted | None) -> None:
    """Of the same rows: in graphs of more rows other kernels multiply."""
    found = []
    for eager in (False, True):
        executor = make(wanted=wanted, enforce_eager=eager)
        for _ in range(3):
            found.append(executor.collect(executor.launch(executor._made_up([1] * 4, BLOCK))))
    assert all(sampled == found[0] for sampled in found)


def test_it_does_without_pinned_memory_and_without_cumem(make: Make) -> None:
    wanted = Wanted("prefetch", "4layers")
    assert numbers(make(wanted=wanted, pin_memory=False, cumem=False)) == numbers(make())


def test_a_step_that_failed_half_way_leaves_the_ring_as_good_as_before(make: Make) -> None:
    executor = make(wanted=Wanted("prefetch", "5layers"))
    before = numbers(executor)
    assert executor._offload is not None and executor._offload.ring is not None
    ring = executor._offload.ring
    for entered in (1, 3, 4):
        for nth in range(entered):
            ring.enter(nth)
            ring.leave(nth)
        ring.enter(entered)
        assert numbers(executor) == before


@pytest.mark.parametrize("mode", ["uva", "prefetch"])
def test_sleep_leaves_it_where_it_is(make: Make, mode: str) -> None:
    executor = make(wanted=Wanted(mode, "5layers"))
    offload = executor._offload
    assert offload is not None
    before, homes = numbers(executor), list(offload.homes)
    kept = [home.bytes.clone() for home in homes]
    for level in (1, 2, 1):
        executor.sleep(level)
        assert sorted(executor.asleep) == sorted([WEIGHTS, KV_CACHE])
        assert all(torch.equal(home.bytes, values) for home, values in zip(homes, kept, strict=True))
        executor.wake([WEIGHTS])
        executor.wake([KV_CACHE])
        assert numbers(executor) == before


def requested_bytes() -> int:
    """Of live tensors, as they were asked for, by torch's allocator."""
    gc.collect()
    torch.cuda.synchronize()
    return int(torch.cuda.memory_stats(0)["requested_bytes.all.current"])


@pytest.mark.parametrize("mode", ["uva", "prefetch"])
def test_as_many_bytes_leave_the_device_as_come_to_the_host(models: dict[str, Path], mode: str) -> None:
    start = requested_bytes()
    whole = load(models["dense"], CudaOps(), "cuda:0")
    whole_bytes = requested_bytes() - start
    del whole
    start = requested_bytes()
    offload = HostWeights(Wanted(mode, "50%"), CudaBus(torch.device("cuda", 0), pin=should_pin_memory(True, 0)))
    decoder = load(models["dense"], CudaOps(offload=offload), "cuda:0")
    offload.attach(decoder.weights.layers)
    slots_bytes = 0 if offload.ring is None else offload.ring.size_bytes
    made = offload.plan_made
    assert whole_bytes - (requested_bytes() - start) == made.host_bytes - slots_bytes
    in_host = sum(home.buffer.size for home in offload.homes)
    assert made.asked_bytes <= made.host_bytes <= in_host <= made.host_bytes + 8192 * len(offload.homes)
    assert all(home.buffer.pinned for home in offload.homes)
    torch.cuda.synchronize()
    del decoder
    offload.close()


@pytest.mark.parametrize("wanted", [None, Wanted("prefetch", "3layers")])
def test_what_is_closed_gives_all_of_its_memory_back(models: dict[str, Path], wanted: Wanted | None) -> None:
    held = []
    for _ in range(3):
        start(models["dense"], "float32", wanted).close()
        gc.collect()
        torch.cuda.empty_cache()
        held.append(torch.cuda.memory_reserved(0))
    assert held[2] == held[1]
    torch.cuda.set_stream(torch.cuda.default_stream())
