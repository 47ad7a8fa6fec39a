"""Whole steps on a GPU in float32: texts are the CPU's, token for token, chunked, mixed, in graphs, a step ahead."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pd_serve.compute.step import PromptRows
from pd_serve.kv.layout import KVLayout
from pd_serve.models.config import ModelConfig
from pd_serve.models.decoder import load_decoder
from tests.compute.cuda.device import DEVICE, INTERPRETED, skip_without_gpu
from tests.e2e import tiny_model

skip_without_gpu()

from pd_serve.compute.cpu import ops as cpu_ops  # noqa: E402
from pd_serve.compute.cpu.runner import Runner as CpuRunner  # noqa: E402
from pd_serve.compute.cuda.inputs import Inputs  # noqa: E402
from pd_serve.compute.cuda.ops import CudaOps  # noqa: E402
from pd_serve.compute.cuda.paged import PagedAttention, shapes  # noqa: E402
from pd_serve.compute.cuda.pieces import piece_sizes  # noqa: E402
from pd_serve.compute.cuda.runner import Limits, Runner, ladder  # noqa: E402
from tests.compute.cuda.loop import GREEDY, Line, step_of  # noqa: E402

pytestmark = pytest.mark.gpu

BLOCK, EACH = 16, 4  # tokens; blocks of a sequence
LIMITS = Limits(tokens=96, seqs=6, blocks=EACH)
PROMPTS = ([5, 9, 200, 31], list(range(40, 73)), [7], list(range(100, 120)))
OUTPUT = 4 if INTERPRETED else 20


@pytest.fixture(scope="module", params=["dense", "experts"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    size = tiny_model.SPARSE if request.param == "experts" else tiny_model.TINY
    return tiny_model.write(tmp_path_factory.mktemp("model"), size)


class Both:
    """The model on the CPU and on the GPU, each over a pool of its own."""

    def __init__(self, directory: Path) -> None:
        self.config = ModelConfig.from_directory(directory, None).for_length(BLOCK * EACH)
        self.layout = KVLayout(BLOCK, "float32", self.config.layer_groups())
        size = (1 + EACH * LIMITS.seqs) * self.layout.block_bytes(0)
        model = load_decoder(directory, self.config, "float32", ops=cpu_ops, max_positions=BLOCK * EACH)
        self.cpu = CpuRunner(model, self.config, self.layout, [torch.zeros(size, dtype=torch.uint8)], 1)
        model = load_decoder(
            directory, self.config, "float32", ops=CudaOps(), max_positions=BLOCK * EACH, device=str(DEVICE)
        )
        inputs = Inputs(LIMITS.tokens, LIMITS.seqs, 1, DEVICE)
        region = torch.zeros(size, dtype=torch.uint8, device=DEVICE)
        groups = shapes(self.config, self.layout, torch.float32)
        paged = PagedAttention(self.layout, [region], groups, inputs.slots, LIMITS.seqs, LIMITS.blocks)
        self.gpu = Runner(model, paged, inputs, LIMITS)

    def expected(self, prompt: list[int]) -> list[int]:
        line = Line(list(prompt), 1)
        while len(line.tokens) < len(prompt) + OUTPUT:
            step = step_of([(line, len(line.tokens) - line.done)], BLOCK, 1, EACH)
            line.tokens.append(int(self.cpu.execute(step).argmax()))
        return line.tokens[len(prompt) :]


@pytest.fixture(scope="module")
def both(directory: Path) -> Both:
    return Both(directory)


def texts(runner: Runner, chunk: int) -> list[list[int]]:
    """All prompts, each begun two steps after the one before, by chunks; what was sampled reaches us a step late."""
    lines = [Line(list(prompt), 1 + EACH * i) for i, prompt in enumerate(PROMPTS)]
    late: list[tuple[Line, torch.Tensor]] = []
    for turn in range(200):
        alive = [line for i, line in enumerate(lines) if turn >= 2 * i and line.done < line.num_prompt + OUTPUT]
        if not alive:
            break
        work = [(line, 1) for line in alive if line.done >= line.num_prompt]
        work += [(line, min(chunk, line.num_prompt - line.done)) for line in alive if line.done < line.num_prompt]
        queued = runner.queue(step_of(work, BLOCK, 1, EACH))
        sampled = [line for line, _ in work if line.done >= line.num_prompt]
        for line, token in late:  # of the step before: only now
            line.tokens.append(int(token))
        late = list(zip(sampled, queued.tokens.clone(), strict=True))
    return [line.tokens[line.num_prompt :][:OUTPUT] for line in lines]


@pytest.mark.parametrize("chunk", [64, 5])
def test_the_cpus_texts(both: Both, chunk: int) -> None:
    assert texts(both.gpu, chunk) == [both.expected(list(prompt)) for prompt in PROMPTS]


def test_prompt_and_own_log_probabilities(both: Both) -> None:
    prompt = list(PROMPTS[1])
    step = step_of([(Line(prompt, 1, GREEDY._replace(logprobs=2)), len(prompt))], BLOCK, 1, EACH)
    step.logits_rows = np.arange(len(prompt), dtype=np.int64)
    step.sampled_rows = np.array([len(prompt) - 1], np.int64)
    step.prompt_rows = [PromptRows(0, np.array(prompt[1:], np.int32), 3)]
    queued = both.gpu.queue(step)
    expected = both.cpu.execute(step).double().log_softmax(-1)
    (found,) = queued.prompts
    wanted = expected[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
    assert torch.allclose(found.chosen.double().cpu(), wanted, atol=1e-4)
    assert found.top_tokens.shape == (len(prompt) - 1, 3)
    assert queued.logprobs is not None
    assert queued.logprobs.top_tokens.tolist() == [expected[-1].topk(2).indices.tolist()]
    assert queued.tokens.tolist() == [int(expected[-1].argmax())]


def test_a_chunk_that_samples_nothing(both: Both) -> None:
    line = Line(list(PROMPTS[1]), 1)
    assert both.gpu.queue(step_of([(line, 9)], BLOCK, 1, EACH)).tokens.tolist() == []
    queued = both.gpu.queue(step_of([(line, len(line.tokens) - 9)], BLOCK, 1, EACH))
    assert queued.tokens.tolist() == both.expected(list(PROMPTS[1]))[:1]


@pytest.mark.skipif(INTERPRETED, reason="needs CUDA graphs")
def test_graphs_give_the_same(directory: Path) -> None:
    both = Both(directory)
    eager = texts(both.gpu, 64)
    said: list[int] = []
    with torch.cuda.stream(torch.cuda.Stream()):
        both.gpu.capture(ladder(LIMITS.seqs), piece_sizes(LIMITS.tokens), said.append)
        assert said == [6, 4, 2, 1, 96, 64, 32]
        for chunk in (64, 5, 33):
            assert texts(both.gpu, chunk) == eager


def test_sizes_of_graphs() -> None:
    assert ladder(1) == [1]
    assert ladder(3) == [3, 2, 1]
    assert ladder(40) == [40, 32, 24, 16, 8, 4, 2, 1]
    assert ladder(256)[:3] == [256, 224, 192]
    assert piece_sizes(20) == [20]
    assert piece_sizes(300) == [300, 256, 224, 192, 160, 128, 96, 64, 32]
    assert piece_sizes(8192)[:3] == [1024, 896, 768]
