"""The texts of PyTorch's allocator settings, against PyTorch's own parser."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from pd_serve.memory import alloc_conf

ROUNDUP = "roundup_power2_divisions:[256:1,512:2,>:4]"


@pytest.mark.parametrize(
    "text",
    [
        "expandable_segments:True",
        " expandable_segments : True ",
        "expandable_segments:true",
        "expandable_segments:1",
        "EXPANDABLE_SEGMENTS:TRUE",
        "max_split_size_mb:64,expandable_segments:True",
        f"{ROUNDUP}, expandable_segments:True, garbage_collection_threshold:0.8",
        "expandable_segments:False,expandable_segments:True",
        "expandable_\tsegments:\nTrue",
    ],
)
def test_expandable_segments_are_found(text: str) -> None:
    assert alloc_conf.has_expandable_segments(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "expandable_segments:False",
        "expandable_segments:0",
        "expandable_segments",
        "expandable_segments:",
        "max_split_size_mb:64",
        "expandable_segments:True,expandable_segments:False",
        "my_expandable_segments:True",
        "backend:[expandable_segments:True]",
        ":,[]",
    ],
)
def test_and_not_where_they_are_off(text: str) -> None:
    assert not alloc_conf.has_expandable_segments(text)


def test_one_option_is_replaced_and_the_others_stay() -> None:
    text = f"max_split_size_mb : 64, Expandable_Segments:1 ,{ROUNDUP}"
    off = alloc_conf.with_expandable_segments(text, False)
    assert off == f"max_split_size_mb:64,{ROUNDUP},expandable_segments:False"
    assert alloc_conf.with_expandable_segments(off, True) == f"max_split_size_mb:64,{ROUNDUP},expandable_segments:True"
    assert alloc_conf.with_expandable_segments("", False) == "expandable_segments:False"


def test_pairs_are_read_in_order() -> None:
    assert alloc_conf.parse(f"a:1,{ROUNDUP},b:[x") == [
        ("a", "1"),
        ("roundup_power2_divisions", "[256:1,512:2,>:4]"),
        ("b", "[x"),
    ]


def test_torch_takes_what_is_made_of_a_text() -> None:
    before = torch._C._accelerator_getAllocatorSettings()
    try:
        text = alloc_conf.with_expandable_segments(f" max_split_size_mb:64 , {ROUNDUP}, expandable_segments:1", False)
        torch._C._accelerator_setAllocatorSettings(text)
        assert torch._C._accelerator_getAllocatorSettings() == text
    finally:
        torch._C._accelerator_setAllocatorSettings(before)


def test_either_variable_counts() -> None:
    old, new = alloc_conf.VARIABLES
    on, off = "expandable_segments:True", "expandable_segments:False"
    assert alloc_conf.from_environment({}) == ("", "")
    assert alloc_conf.from_environment({new: off}) == (new, off)
    assert alloc_conf.from_environment({old: "max_split_size_mb:64", new: off}) == (old, "max_split_size_mb:64")
    assert alloc_conf.from_environment({old: on}) == (old, on)
    assert alloc_conf.from_environment({old: off, new: on}) == (new, on)
    assert alloc_conf.from_environment({old: on, new: off}) == (old, on)


@pytest.mark.parametrize("variable", alloc_conf.VARIABLES)
def test_torch_reads_both_variables(variable: str) -> None:
    others = {name: value for name, value in os.environ.items() if name not in alloc_conf.VARIABLES}
    seen = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", "import torch; print(torch._C._accelerator_getAllocatorSettings())"],
        env=others | {variable: "max_split_size_mb:64"},
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    assert seen == "max_split_size_mb:64"
