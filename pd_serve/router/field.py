"""The nodes of one role of a group as placement sees them: a view of each, and lists of loads to find the least in.

Plain data, filled by whoever knows the nodes (the router's groups, a simulator); knows no node, clock or network. A
decision looks at about a dozen views, however many nodes there are: some at random, the least loaded of all, and those
that its caller names.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Mapping
from itertools import islice

import msgspec

from pd_serve.router.prefixes import Prefixes

_ANY_LENGTH = 1 << 62
_KV_HEADROOM_MIN = 0.02  # a full pool counts as fifty times its queue
_NOTHING = float("inf")
_SCORE = 20
_MET = 4  # one in so many of those that a decode node is connected to
_RECENT = 256  # choices that are remembered
_SEQUENCE_TOKENS = 128
_CROWD_TOKENS = 32  # what a request that was sent to a prefill node lately counts for
_CROWD_SEQUENCES = 1 / 64  # the same at a decode node
FEW = 8  # so many are all looked at
FULL = 1e15  # what a full queue adds to a load: it comes after all others, and before those that take nothing


class NodeView(msgspec.Struct, frozen=True, gc=False):
    """What the router knows of a node now: its last status and what was sent to it since.

    A struct, as one is made whenever a node's books change, and placement reads a hundred of its fields a decision: a
    NamedTuple takes ten times as long to make, and eight times to read a field of."""

    id: str
    layout: str  # only nodes of equal layout exchange KV
    sequences: int  # waiting, running and pulling; with those sent since the status
    waiting_tokens: int  # prompt tokens not computed; with those sent since the status
    kv_used: float  # 0 ... 1, of the fullest layer group
    draining: bool
    local_prefill_tokens: int  # decode: prompts up to this length are computed there
    max_model_len: int = _ANY_LENGTH  # prompt and output tokens of one sequence
    full: bool = False  # its queue was full when it last spoke
    queueing: bool = False  # what comes now waits for memory there
    queue_wait_s: float = 0.0  # how long, as it says
    met: Collection[str] = ()  # decode: the last sources that it was told of, and so is connected to; in order
    tokens_a_second: float = 0.0  # of prompts that it computes; 0: not known
    lanes: Mapping[str, float] = {}  # decode: prompt tokens a second that it reads from sources, where it was measured


def sources() -> Field:
    """Of prefill nodes: loads are tokens."""
    return Field(prefill_load, _CROWD_TOKENS)


def targets() -> Field:
    """Of decode nodes: loads are sequences."""
    return Field(decode_load, _CROWD_SEQUENCES)


def prefill_load(node: NodeView) -> float:
    """Tokens before ours; a sequence that has all of its prompt cached takes time as well: a step, and its transfer."""
    return node.waiting_tokens + node.sequences * _SEQUENCE_TOKENS


def decode_load(node: NodeView) -> float:
    """Sequences per share of free KV memory: a batch that is about to be preempted is no place to go."""
    return (node.sequences + 1) / max(1.0 - node.kv_used, _KV_HEADROOM_MIN)


Entry = tuple[float, NodeView]  # its load, and the node


class _Loads:
    """A list of loads whose least is found without looking at all of them: that of each score is kept beside them, and
    of each score of these."""

    __slots__ = ("_levels", "_loads")

    def __init__(self) -> None:
        self._loads: list[float] = []
        self._levels: tuple[list[float], ...] = (self._loads, [], [])

    def append(self, load: float) -> None:
        row = len(self._loads)
        for level in self._levels:
            if row == len(level):
                level.append(_NOTHING)
            row //= _SCORE
        self[len(self._loads) - 1] = load

    def pop(self) -> float:
        row = len(self._loads) - 1
        load, self[row] = self._loads[row], _NOTHING
        for level in self._levels:
            level.pop()
            if row % _SCORE:
                break
            row //= _SCORE
        return load

    def __getitem__(self, row: int) -> float:
        return self._loads[row]

    def __setitem__(self, row: int, load: float) -> None:
        below = self._loads
        old, below[row] = below[row], load
        for level in self._levels[1:]:
            row //= _SCORE
            least = level[row]
            if load > least:
                if old != least:
                    return
                load = min(below[row * _SCORE : (row + 1) * _SCORE])
            if load == least:
                return
            old, level[row] = least, load
            below = level

    def least(self) -> int | None:
        """The first row of the least load; None where all are infinite."""
        loads, scores, top = self._levels
        load = min(top, default=_NOTHING)
        if load == _NOTHING:
            return None
        return loads.index(load, _SCORE * scores.index(load, _SCORE * top.index(load)))


class _Part:
    """Nodes of one layout, in rows."""

    __slots__ = ("entries", "load", "rows")

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.rows: dict[str, int] = {}
        self.load = _Loads()  # infinite for nodes that take nothing

    def put(self, view: NodeView, load: float) -> None:
        row = self.rows.get(view.id)
        if row is None:
            row = self.rows[view.id] = len(self.entries)
            self.entries.append((load, view))
            self.load.append(_NOTHING)
        else:
            self.entries[row] = load, view
        self.load[row] = _NOTHING if view.draining else load + FULL if view.full else load

    def drop(self, id: str) -> None:
        """The last row takes its place."""
        row, last, load = self.rows.pop(id), self.entries.pop(), self.load.pop()
        if last[1].id != id:
            self.entries[row] = last
            self.rows[last[1].id] = row
            self.load[row] = load

    def least(self, without: Collection[str]) -> int | None:
        """The row of the least load, of those that take anything."""
        if not without:
            return self.load.least()
        kept = [(row, self.load[row]) for id in without if (row := self.rows.get(id)) is not None]
        for row, _ in kept:
            self.load[row] = _NOTHING
        least = self.load.least()
        for row, load in kept:
            self.load[row] = load
        return least


class Field:
    """``load``: of a view; the smaller, the better. ``crowd``: what being chosen lately adds to it, each time."""

    def __init__(self, load: Callable[[NodeView], float], crowd: float) -> None:
        # How many there are of each (layout, longest sequence, whether they drain).
        self.kinds: Counter[tuple[str, int, bool]] = Counter()
        self._all_take = -1  # tokens of the longest sequence that each of them takes
        self.prefixes = Prefixes()  # what these nodes have cached
        self._load = load
        self._crowd = crowd
        self._recent: deque[str] = deque()  # the last that were chosen
        self._times: Counter[str] = Counter()  # how often each is among them
        self._parts: dict[str, _Part] = {}

    def put(self, view: NodeView) -> None:
        """A node that is new, or of which something has changed. Its layout never does."""
        part = self._parts.get(view.layout)
        if part is None:
            part = self._parts[view.layout] = _Part()
        row = part.rows.get(view.id)
        if row is None:
            self._count(view, 1)
        elif (old := part.entries[row][1]).draining != view.draining or old.max_model_len != view.max_model_len:
            self._count(old, -1)
            self._count(view, 1)
        part.put(view, self._load(view) + self._crowd * self._times.get(view.id, 0))

    def chosen(self, id: str) -> None:
        """It was placed on: whoever serves all of one prompt at low load still shares it some time."""
        self._recent.append(id)
        self._times[id] += 1
        if len(self._recent) > _RECENT:
            old = self._recent.popleft()
            self._times[old] -= 1
            if not self._times[old]:
                del self._times[old]
            if (view := self.get(old)) is not None:
                self.put(view)

    def drop(self, id: str) -> None:
        """Does nothing where it is not known."""
        self.prefixes.forget(id)
        for layout, part in self._parts.items():
            if id in part.rows:
                self._count(part.entries[part.rows[id]][1], -1)
                part.drop(id)
                if not part.entries:
                    del self._parts[layout]
                return

    def _count(self, view: NodeView, change: int) -> None:
        kind = view.layout, view.max_model_len, view.draining
        self.kinds[kind] += change
        if not self.kinds[kind]:
            del self.kinds[kind]
        self._all_take = min((-1 if draining else length for _, length, draining in self.kinds), default=-1)

    def takes(self, total_tokens: int) -> bool:
        """Whether every node takes a sequence of this length, and none drains."""
        return total_tokens <= self._all_take

    def get(self, id: str) -> NodeView | None:
        for part in self._parts.values():
            if (row := part.rows.get(id)) is not None:
                return part.entries[row][1]
        return None

    def staying(self) -> int:
        """How many do not drain."""
        return sum(count for (_, _, draining), count in self.kinds.items() if not draining)

    def lengths(self) -> list[tuple[str, int]]:
        """Layout and limit of each kind; of those that drain only where there are no others."""
        staying = [(layout, length) for layout, length, draining in self.kinds if not draining]
        return staying or [(layout, length) for layout, length, _ in self.kinds]

    def all(self, layout: str | None = None) -> list[Entry]:
        if layout is not None:
            part = self._parts.get(layout)
            return part.entries if part is not None else []
        return [entry for part in self._parts.values() for entry in part.entries]

    def some(
        self,
        turn: int,
        layout: str | None = None,
        *,
        without: Collection[str] = (),
        named: Iterable[str] = (),
        met: Collection[str] = (),
    ) -> list[Entry]:
        """All where they are few, in an order that ``turn`` rotates; else the least loaded that is not in ``without``,
        one at random, the ``named``, and some of ``met``. Of a layout, or of all."""
        if layout is None:
            parts: Iterable[_Part] = self._parts.values()
        else:
            part = self._parts.get(layout)
            parts = (part,) if part is not None else ()
        found: list[Entry] = []
        for part in parts:
            entries, row_of = part.entries, part.rows.get
            count = len(entries)
            if count <= FEW:
                start = turn % count
                found += entries[start:] + entries[:start]
                continue
            at = turn * 0x9E3779B97F4A7C15 >> 7
            rows = {
                at % count,
                (part.least(without) if without else part.load.least()),
                *map(row_of, named),
                *map(row_of, islice(met, at % _MET, None, _MET)),
            }
            found += [entries[row] for row in rows if row is not None]
        return found

    def open(self, without: Collection[str]) -> bool:
        """Whether some node is neither in ``without``, nor full, nor draining."""
        for part in self._parts.values():
            row = part.least(without)
            if row is not None and part.load[row] < FULL:
                return True
        return False
