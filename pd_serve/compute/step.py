"""One step's work as plain data: everything that a rank's model, attention and sampler need, and what comes of it.

The engine builds a :class:`Step` out of sequences; whoever computes it sees no sequence. It can be encoded, so that it
reaches other processes, and a CUDA graph is fed from its arrays. Sequences with exactly one new token whose prompt is
computed come first (``num_decode`` of them), then prefill chunks. T = new tokens, B = sequences, N = rows of logits
wanted, S = rows of these that are sampled from, G = layer groups. No torch here.
"""

from __future__ import annotations

from typing import Any, NamedTuple, get_args

import msgspec
import numpy as np
import numpy.typing as npt

from pd_serve.wire.link import TokenLogprob

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
F32 = npt.NDArray[np.float32]
Rows = npt.NDArray[np.void]

NO_LINE = -1


class SamplingRow(NamedTuple):
    """How one token is sampled: an element of ``Step.sampling``. Meanings are those of ``wire.link.SamplingParams``."""

    seed: int
    temperature: float
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    top_k: int
    logprobs: int
    history: int = NO_LINE  # line of the sampler's histories, where there is a penalty
    bias: int = NO_LINE  # line of its biases
    mask: int = NO_LINE  # line of the step's masks, where not all tokens may come
    output_index: int = 0  # of the token


_FORMATS = "<u8 <f8 <f8 <f8 <f4 <f4 <f4 <i4 <i4 <i4 <i4 <i4 <i4".split()
SAMPLING = np.dtype(list(zip(SamplingRow._fields, _FORMATS, strict=True)))


class PromptRows(msgspec.Struct, array_like=True):
    """Rows ``first`` … of N, whose log-probabilities of the prompt's next tokens ``targets`` are wanted."""

    first: int
    targets: I32
    k: int  # so many of the most likely beside


class History(msgspec.Struct, array_like=True):
    """A line of the sampler's histories starts anew with these tokens. What it samples later it adds by itself."""

    line: int
    prompt: I32
    output: I32


class Bias(msgspec.Struct, array_like=True):
    """A line of the sampler's biases is this from now on: ``values`` are added, minus infinity forbids."""

    line: int
    tokens: I32
    values: F32
    only: bool = False  # all other tokens are forbidden


class Step(msgspec.Struct, array_like=True):
    tokens: I64  # [T] token ids
    positions: I64  # [T] position of each token in its sequence
    query_start: I32  # [B + 1] first row of each sequence in T
    seq_lens: I32  # [B] context length of each sequence, this step's tokens included
    slots: list[I64]  # a group: [T] block * block_size + offset, where the token's K and V go
    block_tables: list[I32]  # a group: [B, max blocks of this step], 0 = no block (before a window, or padding)
    logits_rows: I64  # [N] rows of T whose logits are wanted
    num_decode: int
    # For executors of depth 1: [num_decode] a row's token is the sample of this index of the step launched before; -1:
    # it is in ``tokens``. Empty where all are.
    from_samples: I32 = msgspec.field(default_factory=lambda: np.empty(0, np.int32))
    sampled_rows: I64 = msgspec.field(default_factory=lambda: np.empty(0, np.int64))  # [S] rows of N
    sampling: Rows = msgspec.field(default_factory=lambda: np.empty(0, SAMPLING))  # [S] of dtype SAMPLING
    prompt_rows: list[PromptRows] = []
    histories: list[History] = []  # before anything is sampled
    biases: list[Bias] = []
    # [M, ceil(vocab / 32)], flat: a bit a token, 1 where it may be sampled
    masks: I32 = msgspec.field(default_factory=lambda: np.empty(0, np.int32))

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_seqs(self) -> int:
        return len(self.seq_lens)


class Sampled(NamedTuple):
    """What a step led to, on the host."""

    tokens: list[int]  # [S]
    logprobs: list[TokenLogprob | None]  # [S]
    prompt_logprobs: list[list[TokenLogprob]]  # of each of ``prompt_rows``


def _encoded(array: object) -> bytes:
    assert isinstance(array, np.ndarray)
    return array.tobytes()


def _decoded(kind: Any, data: bytes) -> npt.NDArray[Any]:
    (element,) = get_args(get_args(kind)[1])
    return np.frombuffer(data, SAMPLING if element is np.void else np.dtype(element).newbyteorder("<")).copy()


encode = msgspec.msgpack.Encoder(enc_hook=_encoded).encode
_decode = msgspec.msgpack.Decoder(Step, dec_hook=_decoded).decode


def decode(data: bytes) -> Step:
    """The step that ``encode`` made bytes of: arrays are little-endian, without shape, of their fields' types."""
    step = _decode(data)
    step.block_tables = [table.reshape(step.num_seqs, -1) for table in step.block_tables]
    return step
