"""The executor on a GPU: a start with its memory counted, texts that are the CPU's, and sleep with graphs alive."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from pd_serve.compute.step import Step
from pd_serve.kv.layout import KVLayout
from pd_serve.models.config import ModelConfig
from pd_serve.models.decoder import Decoder, load_decoder
from pd_serve.models.interface import Ops, Ranks
from tests.compute.cuda.device import INTERPRETED, skip_without_gpu
from tests.e2e import tiny_model

if INTERPRETED:
    pytest.skip("needs a GPU's memory", allow_module_level=True)
skip_without_gpu()
pytest.importorskip("flashinfer")

from pd_serve.compute.cpu import ops as cpu_ops  # noqa: E402
from pd_serve.compute.cpu.runner import Runner as CpuRunner  # noqa: E402
from pd_serve.compute.cuda.executor import CudaExecutor, Settings  # noqa: E402
from pd_serve.memory.ledger import GRAPHS  # noqa: E402
from pd_serve.memory.usage import KV_CACHE, WEIGHTS  # noqa: E402
from tests.compute.cuda.loop import Line, step_of  # noqa: E402

pytestmark = pytest.mark.gpu

BLOCK, EACH, OUTPUT = 16, 12, 60
PROMPTS = ([5, 9, 200, 31], list(range(40, 139)), [7], list(range(100, 120)), [3, 4, 5])
MIB = 1 << 20


class Model:
    def __init__(self, directory: Path, dtype: str) -> None:
        self.directory, self.dtype = directory, dtype
        self.config = ModelConfig.from_directory(directory, None).for_length(BLOCK * EACH)
        self.layout = KVLayout(BLOCK, dtype, self.config.layer_groups())

    def load(self, ops: Ops, device: str, ranks: Ranks | None = None) -> Decoder:
        return load_decoder(
            self.directory, self.config, self.dtype, ops=ops, max_positions=BLOCK * EACH + 1, device=device
        )

    def executor(self, **settings: object) -> CudaExecutor:
        fixed = {"max_num_seqs": 8, "max_num_batched_tokens": 128, "max_model_len": BLOCK * EACH}
        return CudaExecutor(self.config, self.layout, self.load, Settings(**fixed, **settings))  # type: ignore[arg-type]

    def expected(self, prompt: list[int]) -> list[int]:
        size = (1 + EACH) * self.layout.block_bytes(0)
        runner = CpuRunner(
            self.load(cpu_ops, "cpu"), self.config, self.layout, [torch.zeros(size, dtype=torch.uint8)], 4
        )
        line = Line(list(prompt), 1)
        while len(line.tokens) < len(prompt) + OUTPUT:
            step = step_of([(line, len(line.tokens) - line.done)], BLOCK, 1, EACH)
            line.tokens.append(int(runner.execute(step).argmax()))
        return line.tokens[len(prompt) :]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # heads for which FlashInfer's kernels need no compiler
    return tiny_model.write(tmp_path_factory.mktemp("model"), tiny_model.Size(256, 3, 8, 2, 64, 512, 1024))


Make = Callable[..., CudaExecutor]


@pytest.fixture
def make(directory: Path) -> Iterator[Make]:
    made: list[CudaExecutor] = []

    def start(dtype: str = "float32", **settings: object) -> CudaExecutor:
        made.append(Model(directory, dtype).executor(**settings))
        return made[-1]

    yield start
    while made:
        made.pop().close()
    gc.collect()
    torch.cuda.set_stream(torch.cuda.default_stream())
    torch.cuda.empty_cache()


def texts(executor: CudaExecutor, chunk: int = 64) -> list[list[int]]:
    """As an engine with an executor of depth 1: what a step sampled is booked when the next is launched already."""
    lines = [Line(list(prompt), 1 + EACH * i) for i, prompt in enumerate(PROMPTS)]
    before = None
    for turn in range(300):
        alive = [line for i, line in enumerate(lines) if turn >= i and line.done < line.num_prompt + OUTPUT]
        work = [(line, 1) for line in alive if line.done >= line.num_prompt]
        work += [(line, min(chunk, line.num_prompt - line.done)) for line in alive if line.done < line.num_prompt]
        launched = None
        if work:
            step: Step = step_of(work, BLOCK, 1, EACH)
            launched = executor.launch(step), [line for line, _ in work if line.done >= line.num_prompt]
        if before:
            tokens = executor.collect(before[0]).tokens
            for line, token in zip(before[1], tokens, strict=True):
                line.tokens.append(token)
        before = launched
        if before is None:
            break
    return [line.tokens[line.num_prompt :][:OUTPUT] for line in lines]


def used_bytes() -> int:
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info(0)
    return total - free


@pytest.mark.parametrize("enforce_eager", [True, False])
def test_the_cpus_texts(make: Make, directory: Path, enforce_eager: bool) -> None:
    executor = make(enforce_eager=enforce_eager, num_blocks=100)
    model = Model(directory, "float32")
    found = texts(executor)
    assert found == [model.expected(list(prompt)) for prompt in PROMPTS]
    assert texts(executor, 7) == found


@pytest.mark.timeout(300)
def test_bfloat16_in_graphs_and_without(make: Make) -> None:
    assert texts(make("bfloat16", num_blocks=100)) == texts(make("bfloat16", num_blocks=100, enforce_eager=True))


def test_the_pool_takes_what_is_left(make: Make) -> None:
    torch.cuda.empty_cache()
    executor = make(gpu_memory_utilization=0.5)
    total = torch.cuda.mem_get_info(0)[1]
    assert abs(used_bytes() - 0.5 * total) <= 256 * MIB
    (pool,) = executor.memory()
    assert pool.regions[0].num_blocks == executor.num_blocks
    assert len(texts(executor)[0]) == OUTPUT


def test_plain_memory_takes_no_more(make: Make, directory: Path) -> None:
    torch.cuda.empty_cache()
    executor = make(gpu_memory_utilization=0.5, cumem=False)
    total = torch.cuda.mem_get_info(0)[1]
    assert abs(used_bytes() - 0.5 * total) <= 256 * MIB
    assert executor.memory()[0].segments == ()
    assert texts(executor)[1] == Model(directory, "float32").expected(list(PROMPTS[1]))
    assert executor.report().tags[KV_CACHE].reserved_bytes >= executor.memory()[0].regions[0].size_bytes


@pytest.mark.parametrize("cumem", [True, False])
def test_graphs_that_are_not_counted_come_on_top(make: Make, caplog: pytest.LogCaptureFixture, cumem: bool) -> None:
    torch.cuda.empty_cache()
    executor = make(gpu_memory_utilization=0.5, profile_cuda_graphs=False, cumem=cumem)
    assert executor._ledger is not None
    graphs = executor._ledger.phases[GRAPHS]
    total = torch.cuda.mem_get_info(0)[1]
    assert graphs > 0
    assert abs(used_bytes() - 0.5 * total - graphs) <= 256 * MIB
    assert "beyond --gpu-memory-utilization" in caplog.text
    assert len(texts(executor)[0]) == OUTPUT


@pytest.mark.timeout(200)
def test_it_sleeps_and_wakes_with_its_graphs(make: Make) -> None:
    executor = make("bfloat16", num_blocks=30_000)
    before, addresses = texts(executor), [r.address for r in executor.memory()[0].regions]
    levels = []
    for level in (1, 2, 1, 2):
        awake = used_bytes()
        executor.sleep(level)
        assert sorted(executor.asleep) == sorted([WEIGHTS, KV_CACHE])
        assert used_bytes() < awake - 500 * MIB
        executor.wake([WEIGHTS])
        executor.wake([KV_CACHE])
        assert executor.asleep == []
        assert texts(executor) == before
        assert [r.address for r in executor.memory()[0].regions] == addresses
        levels.append(used_bytes())
    assert max(levels) - min(levels) <= 16 * MIB
