"""A step reaches another process as it was."""

from __future__ import annotations

import numpy as np

from pd_serve.compute.step import SAMPLING, Bias, History, PromptRows, SamplingRow, Step, decode, encode

GOLDEN = bytes.fromhex(
    "9fc418090000000000000004000000000000000500000000000000c418070000000000000000000000000000000100000000"
    "000000c40c000000000100000003000000c408080000000200000092c4180b00000000000000040000000000000005000000"
    "00000000c41803000000000000000800000000000000090000000000000092c41001000000020000000100000000000000c4"
    "1000000000000000000200000000000000c41800000000000000000100000000000000020000000000000001c40402000000"
    "c41000000000000000000200000000000000c488ffffffffffffffff666666666666e63fcdccccccccccec3f9a9999999999"
    "a93f0000c03f0000803e000000bf280000000300000001000000000000000000000006000000000000000000000066666666"
    "6666e63fcdccccccccccec3f9a9999999999a93f0000c03f0000803e000000bf2800000003000000ffffffff000000000000"
    "000006000000919301c4040500000002919301c4080100000002000000c40403000000919400c40408000000c404000080ff"
    "c2c40805000000ffffffff"
)


def step() -> Step:
    i32, i64 = np.int32, np.int64
    row = SamplingRow(2**64 - 1, 0.7, 0.9, 0.05, 1.5, 0.25, -0.5, 40, 3, history=1, bias=0, mask=0, output_index=6)
    return Step(
        tokens=np.array([9, 4, 5], i64),
        positions=np.array([7, 0, 1], i64),
        query_start=np.array([0, 1, 3], i32),
        seq_lens=np.array([8, 2], i32),
        slots=[np.array([11, 4, 5], i64), np.array([3, 8, 9], i64)],
        block_tables=[np.array([[1, 2], [1, 0]], i32), np.array([[0, 0], [2, 0]], i32)],
        logits_rows=np.array([0, 1, 2], i64),
        num_decode=1,
        from_samples=np.array([2], i32),
        sampled_rows=np.array([0, 2], i64),
        sampling=np.array([row, row._replace(seed=0, history=-1)], SAMPLING),
        prompt_rows=[PromptRows(1, np.array([5], i32), 2)],
        histories=[History(1, np.array([1, 2], i32), np.array([3], i32))],
        biases=[Bias(0, np.array([8], i32), np.array([-np.inf], np.float32))],
        masks=np.array([5, -1], i32),
    )


def same(a: object, b: object) -> bool:
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    if hasattr(a, "__struct_fields__"):
        return type(a) is type(b) and all(same(getattr(a, f), getattr(b, f)) for f in a.__struct_fields__)
    return a == b


def test_a_step_is_what_it_was_after_the_wire() -> None:
    found = decode(encode(step()))
    assert same(found, step())
    found.tokens[0] = 1  # whoever computes may write to it
    other = step()
    other.biases[0].values[0] = 0
    assert not same(other, step())


def test_its_bytes_are_golden() -> None:
    assert encode(step()).hex() == GOLDEN.hex()
