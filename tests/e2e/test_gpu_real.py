"""Real models on a GPU: in float32 the served text is transformers', in bfloat16 it is wherever rounding cannot decide.

``REAL_MODELS``: a directory of cut models (:mod:`tests.e2e.packed`), where there is no network for the whole.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e import reference
from tests.e2e.cluster import Cluster, cluster
from tests.e2e.packed import prompts_of

DEVICE = os.environ.get("REAL_MODELS_DEVICE", "cuda")
if DEVICE == "cuda" and not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.timeout(400)]

TOKENS = 48
NAMES = ("smollm2", "gemma3")


@pytest.fixture(scope="module", params=NAMES)
def directory(request: pytest.FixtureRequest) -> Path:
    cut = os.environ.get("REAL_MODELS")
    found: Path = Path(cut) / request.param if cut else request.getfixturevalue(request.param)
    return found


def pair(tmp_path_factory: pytest.TempPathFactory, directory: Path, dtype: str) -> Iterator[Cluster]:
    flags: dict[str, object] = {"device": DEVICE, "dtype": dtype, "max_model_len": 2048, "max_queue_wait_s": 300}
    folder = tmp_path_factory.mktemp(f"{directory.name}-{dtype}")
    with cluster(folder, model=directory, served_model_name="m", **flags) as running:
        yield running


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory, directory: Path) -> Iterator[Cluster]:
    yield from pair(tmp_path_factory, directory, "float32")


@pytest.fixture(scope="module")
def rounded(tmp_path_factory: pytest.TempPathFactory, directory: Path) -> Iterator[Cluster]:
    yield from pair(tmp_path_factory, directory, "bfloat16")


def outputs(running: Cluster, prompts: list[list[int]]) -> list[list[int]]:
    """Tokens, all prompts at once."""

    def one(prompt: list[int]) -> list[int]:
        answer = running.complete(prompt, TOKENS, ignore_eos=True, return_token_ids=True)
        ids: list[int] = answer["choices"][0]["token_ids"]
        return ids

    with ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(one, prompts))


def test_float32_is_transformers_text(exact: Cluster, directory: Path) -> None:
    prompts = prompts_of(directory)
    answers = outputs(exact, prompts)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert reference.first_difference(directory, prompt, answer) is None, (len(prompt), answer)
    exact.assert_idle()
    lengths = [len(prompt) for prompt in prompts]
    print(
        f"RESULT {directory} float32: {len(prompts)} prompts of {min(lengths)} to {max(lengths)} tokens, {TOKENS} "
        f"greedy tokens each, all transformers'"
    )
    assert max(lengths) > 512  # beyond Gemma's window


def test_float32_has_transformers_log_probabilities(exact: Cluster, directory: Path) -> None:
    """Of each token of the prompts: a cut model's greedy text repeats itself, real text does not."""
    apart, number = 0.0, 0
    for prompt in prompts_of(directory):
        answer = exact.complete(prompt, 1, echo=True, logprobs=1)["choices"][0]["logprobs"]["token_logprobs"]
        found = torch.tensor(answer[1 : len(prompt)])
        rows = reference.logprobs(directory, prompt[:1], prompt[1:])
        expected = rows.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
        apart, number = max(apart, float((found - expected).abs().max())), number + len(expected)
    print(f"RESULT {directory} float32: log-probabilities of {number} tokens of prompts within {apart:.1e} nats")
    assert apart < 1e-3


@torch.inference_mode()
def in_bfloat16(model: Any, prompt: list[int], output: list[int]) -> torch.Tensor:
    """Log-probabilities as :func:`reference.logprobs` has them, of transformers' model in bfloat16."""
    ids = torch.tensor([prompt + output[:-1]], device=model.device)
    return model(ids, logits_to_keep=len(output)).logits[0].float().log_softmax(-1).cpu()


def test_bfloat16_differs_where_rounding_decides(rounded: Cluster, directory: Path) -> None:
    """Noise: how far the log-probabilities of the ten most likely tokens move when transformers rounds."""
    from transformers import AutoModelForCausalLM

    device = "cuda" if DEVICE == "cuda" else "cpu"
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval().to(device)
    prompts = prompts_of(directory)
    answers = outputs(rounded, prompts)
    expected = [reference.logprobs(directory, *each) for each in zip(prompts, answers, strict=True)]
    noise, sure, same, places = 0.0, 0, 0, 0
    for prompt, answer, exact in zip(prompts, answers, expected, strict=True):
        tops = exact.topk(10, -1)
        noise = max(
            noise, float((in_bfloat16(theirs, prompt, answer).gather(1, tops.indices) - tops.values).abs().max())
        )
    for answer, exact in zip(answers, expected, strict=True):
        tops = exact.topk(2, -1)
        for token, (first, second), (best, _) in zip(answer, tops.values.tolist(), tops.indices.tolist(), strict=True):
            places, same = places + 1, same + (token == best)
            if first - second > 2 * noise:  # each of the two may move
                sure += 1
                assert token == best, (directory.name, first - second, noise)
    print(
        f"RESULT {directory} bfloat16: noise {noise:.3f} nats; {sure} of {places} tokens lead by more than twice that, "
        f"all of them transformers'; {same} are in all"
    )
    assert sure > places // 10
    rounded.assert_idle()
