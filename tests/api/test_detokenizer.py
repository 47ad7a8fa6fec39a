"""Any split of tokens gives the text of all at once; any stop string is found where it ends first."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pd_serve.api.detokenizer import Detokenizer, StopMatcher
from pd_serve.api.tokenizer import TextTokenizer
from tests.api import tiny

BYTE_LEVEL = TextTokenizer(tiny.byte_level())
SENTENCEPIECE = TextTokenizer(tiny.sentencepiece())
STRIPPING = TextTokenizer(tiny.sentencepiece(strip=True))
WORDPIECE = TextTokenizer(tiny.wordpiece())
text = st.text(st.sampled_from(list("stop the fox. STOP\n" + tiny.EMOJI + "東é")), max_size=40)


def pieces(items: list[int], cuts: list[int]) -> list[list[int]]:
    bounds = [0, *sorted(cut % (len(items) + 1) for cut in cuts), len(items)]
    return [items[a:b] for a, b in itertools.pairwise(bounds)]


def streamed(tokenizer: TextTokenizer, ids: list[int], cuts: list[int], **options: bool) -> str:
    detokenizer = Detokenizer(tokenizer, **options)
    return "".join([detokenizer.push(part) for part in pieces(ids, cuts)]) + detokenizer.finish()


def test_kinds_are_told_apart() -> None:
    assert BYTE_LEVEL.exact and SENTENCEPIECE.exact and STRIPPING.exact
    assert not WORDPIECE.exact


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(0, tiny.vocab_size(tiny.byte_level()) + 3), max_size=30),
    st.lists(st.integers(0)),
    st.booleans(),
)
def test_byte_level_any_tokens_in_any_steps(ids: list[int], cuts: list[int], skip: bool) -> None:
    """Whatever the ids: broken characters, special tokens, ids without a token."""
    whole = BYTE_LEVEL.decode(ids, skip_special_tokens=skip)
    assert streamed(BYTE_LEVEL, ids, cuts, skip_special_tokens=skip) == whole


@settings(max_examples=100, deadline=None)
@given(text, st.lists(st.integers(0)))
@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, SENTENCEPIECE])
def test_text_survives(tokenizer: TextTokenizer, text: str, cuts: list[int]) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert streamed(tokenizer, ids, cuts) == text


@settings(max_examples=100, deadline=None)
@given(text, text, st.lists(st.integers(0)))
def test_output_keeps_the_space_that_a_whole_text_would_lose(prompt: str, text: str, cuts: list[int]) -> None:
    """Llama 2's decoder strips the first word's space: of the prompt, not of what follows it."""
    before = STRIPPING.encode("x" + prompt, add_special_tokens=False)
    ids = STRIPPING.encode(text, add_special_tokens=False)
    both = STRIPPING.decode(before + ids, skip_special_tokens=True)
    assert "x" + prompt + streamed(STRIPPING, ids, cuts) == both


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(3, 10), min_size=1, max_size=12), st.lists(st.integers(0)))
def test_a_decoder_with_context_gets_it(ids: list[int], cuts: list[int]) -> None:
    prompt = [WORDPIECE.encode("fox", add_special_tokens=False)[0]]
    detokenizer = Detokenizer(WORDPIECE, prompt)
    shown = "".join(detokenizer.push(part) for part in pieces(ids, cuts)) + detokenizer.finish()
    assert "fox" + shown == WORDPIECE.decode(prompt + ids, skip_special_tokens=True)


def test_half_a_character_is_never_shown() -> None:
    ids = BYTE_LEVEL.encode("🦊", add_special_tokens=False)
    assert len(ids) > 1
    detokenizer = Detokenizer(BYTE_LEVEL)
    assert [detokenizer.push([id]) for id in ids] == [""] * (len(ids) - 1) + ["🦊"]
    detokenizer = Detokenizer(BYTE_LEVEL)
    assert detokenizer.push(ids[:1]) + detokenizer.finish() == "\ufffd"


# --- stop strings -------------------------------------------------------------------------------------


def first_stop(text: str, stops: list[str]) -> tuple[int, int, str] | None:
    """End, start and string of the occurrence that ends first, the longest of those: by brute force."""
    found = [(end, end - len(s), s) for end in range(len(text) + 1) for s in stops if text[:end].endswith(s)]
    return min(found, default=None)


few = st.text("abc", max_size=24)
stop_lists = st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=4)


@settings(max_examples=500, deadline=None)
@given(few, stop_lists, st.lists(st.integers(0)), st.booleans())
def test_stop_strings_end_the_text_at_their_first_occurrence(
    text: str, stops: list[str], cuts: list[int], include: bool
) -> None:
    matcher = StopMatcher(stops, include=include)
    shown = ""
    for part in pieces([ord(c) for c in text], cuts):
        shown += matcher.push("".join(map(chr, part)))
        if matcher.matched is not None:
            break
    else:
        shown += matcher.finish()
    expected = first_stop(text, stops)
    if expected is None:
        assert (matcher.matched, shown) == (None, text)
    else:
        end, start, stop = expected
        assert (matcher.matched, shown) == (stop, text[: end if include else start])


@settings(max_examples=300, deadline=None)
@given(few, stop_lists)
def test_only_what_may_become_a_stop_string_is_held_back(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    shown = ""
    for place, character in enumerate(text):
        shown += matcher.push(character)
        if matcher.matched is not None:
            return
        seen = text[: place + 1]
        held = max((n for n in range(len(seen) + 1) if n and any(s.startswith(seen[-n:]) for s in stops)), default=0)
        assert shown == seen[: len(seen) - held]


def test_min_tokens_lets_early_stop_strings_pass() -> None:
    matcher = StopMatcher(["ab"])
    assert matcher.push("xa", armed=False) == "x"
    assert matcher.push("b", armed=False) == "ab"
    assert matcher.push("-a") == "-"
    assert matcher.push("b+") == ""
    assert matcher.matched == "ab"


def test_a_stop_string_that_began_before_min_tokens_counts_when_it_ends_after() -> None:
    matcher = StopMatcher(["abc"])
    assert matcher.push("xab", armed=False) == "x"
    assert matcher.push("c") == ""
    assert matcher.matched == "abc"
