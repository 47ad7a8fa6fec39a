"""What the scheduler side tells the worker sides with a step: plain data, which vLLM pickles between its processes."""

from __future__ import annotations

from dataclasses import dataclass, field

from pd_serve.integrations.vllm.params import Held

Ids = list[int]  # of blocks, in the order of the prompt


@dataclass
class Announcement:
    """Computed with this step: of each group, the blocks from logical block ``first`` on. ``num_tokens``: in all."""

    key: str
    num_tokens: int
    blocks: list[tuple[int, int, Ids]]  # group, first, ids
    last: bool


@dataclass
class Fetch:
    """A prompt to be read into these blocks. ``tables``: one a group; ``first``: the first logical block wanted."""

    request_id: str
    held: Held
    tables: list[Ids]
    first: int

    @property
    def num_tokens(self) -> int:
        """About: in whole blocks."""
        blocks = max(map(len, self.tables))
        return self.held.num_tokens * (blocks - self.first) // max(1, blocks)


@dataclass
class Orders:
    """``opened``: keys of prompts whose computation begins with this step. ``kept``: requests that are finished and
    whose blocks vLLM keeps until they are reported, by key. ``cancelled``: keys and why. ``dropped``: requests whose
    fetching may end. ``declined``: prompts that nobody here wants any more. ``computes``: the step has tokens to
    compute.
    """

    opened: list[str] = field(default_factory=list)
    announced: list[Announcement] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    cancelled: list[tuple[str, str]] = field(default_factory=list)
    fetched: list[Fetch] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    declined: list[Held] = field(default_factory=list)
    computes: bool = False
