"""Both halves of the handshake, face to face, without a socket."""

from __future__ import annotations

import dataclasses

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pd_serve.errors import HandshakeError
from pd_serve.kv.layout import KVLayout, LayerGroup, Plane, kv_group
from pd_serve.memory.region import PROBE_BLOCK_BYTES, PROBE_BLOCKS, Region
from pd_serve.transfer.session.handshake import Greeting, Identity, Reception, check_protocol, pair_of, shortened
from pd_serve.wire import peer as wire
from tests.transfer.harness import SMALL

HALF = kv_group((0, 1, 2), 2, 16, first_head=2, total_kv_heads=4)
WHOLE = kv_group((0, 1, 2), 4, 16)


def regions(layout: KVLayout, num_blocks: int = 8) -> tuple[Region, ...]:
    found = [Region(4096 * (g + 1), layout.block_bytes(g), num_blocks) for g in range(len(layout.groups))]
    return (*found, Region(1 << 40, PROBE_BLOCK_BYTES, PROBE_BLOCKS))


def node(node_id: str, layout: KVLayout = SMALL, **other: object) -> Identity:
    return Identity(**{"node_id": node_id, "epoch": f"e{node_id}", "model": "m", "layout": layout, **other})  # type: ignore[arg-type]


class Two:
    """A prefill node P and a decode node D, up to where a test wants to look."""

    def __init__(self, p: Identity | None = None, d: Identity | None = None) -> None:
        self.p, self.d = p or node("P"), d or node("D")
        self.greeting = Greeting(self.d, regions(self.d.layout), {"nixl": b"d"})
        hello = wire.decode_to_source(self.greeting.hello)
        assert isinstance(hello, wire.Hello)
        self.reception = Reception(self.p, hello, self.greeting.hello)

    def prove(self) -> wire.Introduction:
        self.reception.check(self.greeting.prove(self.reception.challenge))
        return self.greeting.introduction()

    def welcome(self) -> wire.Welcome:
        them = self.greeting.introduction()
        return self.reception.welcome(them, regions(self.p.layout, 9), {"nixl": b"p"}, {"ucx": "x" * 10_000}, 12.0)


@pytest.mark.parametrize("secret", [b"", b"s3cret"])
def test_two_that_know_the_same_secret(secret: bytes) -> None:
    two = Two(node("P", secret=secret), node("D", secret=secret, checksums=False))
    pair = two.reception.pair(two.prove(), regions(SMALL, 9))
    about = two.welcome()
    same = two.greeting.accept(about)
    for sender, receiver in ((two.greeting, two.reception), (two.reception, two.greeting)):
        sealed = sender.outgoing.close(b"x")
        assert len(sealed) - 1 == (16 if secret else 0) and receiver.incoming.open(sealed) == b"x"
    assert (about.node_id, about.epoch, about.lease_s, about.lanes) == ("P", "eP", 12.0, {"nixl": b"p"})
    assert not about.checksums  # one of them wants none
    assert len(about.why_not["ucx"]) == 4096
    assert same.source == pair.source == regions(SMALL, 9) and same.reader == pair.reader == regions(SMALL)
    assert [s.piece_bytes for s in same.slicings] == [*map(SMALL.block_bytes, range(2)), PROBE_BLOCK_BYTES]


def test_the_secret_is_in_nothing_that_is_printed() -> None:
    assert "s3cret" not in repr(node("P", secret=b"s3cret"))


@pytest.mark.parametrize(
    ("p", "d", "why"),
    [
        (b"a", b"b", "its secret is another one"),
        (b"a", b"", "it has a secret and this process has none"),
        (b"", b"b", "it has no secret and this process has one"),
    ],
)
def test_the_reader_finds_out_first(p: bytes, d: bytes, why: str) -> None:
    two = Two(node("P", secret=p), node("D", secret=d))
    with pytest.raises(HandshakeError, match=rf"{why}.*--secret-file"):
        two.greeting.prove(two.reception.challenge)
    assert not two.greeting.challenged  # nothing that follows is believed


def test_hello_tells_nothing_of_who_says_it() -> None:
    """It goes to whatever address a router named."""
    assert set(msgspec.msgpack.decode(Two().greeting.hello)) == {"type", "protocol_min", "protocol_max", "nonce"}


@pytest.mark.parametrize("change", [{"protocol": 5}, {"nonce": bytes(32)}, {"mac": bytes(32)}])
def test_a_challenge_that_was_changed_on_its_way(change: dict[str, object]) -> None:
    two = Two(node("P", secret=b"s"), node("D", secret=b"s"))
    with pytest.raises(HandshakeError, match="could not prove"):
        two.greeting.prove(msgspec.structs.replace(two.reception.challenge, **change))


def test_a_proof_of_another_connection_does_not_hold() -> None:
    one, other = Two(), Two()
    proof = one.greeting.prove(one.reception.challenge)
    with pytest.raises(HandshakeError, match="could not prove"):
        other.reception.check(proof)
    with pytest.raises(HandshakeError, match="could not prove"):
        other.greeting.prove(one.reception.challenge)


def test_the_sources_proof_is_not_the_readers() -> None:
    two = Two()
    with pytest.raises(HandshakeError, match="could not prove"):
        two.reception.check(wire.Proof(two.reception.challenge.mac))


@pytest.mark.parametrize(("low", "high"), [(5, 9), (1, 3)])
def test_protocols_that_do_not_overlap(low: int, high: int) -> None:
    with pytest.raises(HandshakeError, match=rf"4\.\.4.*{low}\.\.{high}"):
        check_protocol(node("P"), wire.Version(low, high))


def test_a_protocol_that_was_not_asked_for() -> None:
    two = Two(node("P", protocol_max=5), node("D", protocol_max=5))
    two.greeting._me = dataclasses.replace(two.d, protocol_max=4)
    with pytest.raises(HandshakeError, match="settled on peer protocol 5"):
        two.prove()


@pytest.mark.parametrize(
    ("p", "d", "why"),
    [
        (
            {"rank": 1, "ranks": 2},
            {"rank": 0, "ranks": 2},
            "rank 0 of 2 of the decode node reads nothing from rank 1 of 2",
        ),
        ({"rank": 2, "ranks": 2}, {}, "reads nothing from rank 2 of 2"),
        ({"ranks": 2}, {"rank": 2, "ranks": 2}, "rank 2 of 2 of the decode node reads nothing"),
        ({"model": "m1"}, {}, "models differ: prefill node P serves m1, decode node D serves m"),
        ({}, {"layout": dataclasses.replace(SMALL, dtype="bfloat16")}, "KV data types differ"),
        ({}, {"layout": dataclasses.replace(SMALL, block_size=6)}, "block sizes do not fit: 4 tokens .* 6"),
        (
            {"layout": KVLayout(4, "float32", (HALF,))},
            {"layout": KVLayout(4, "float32", (WHOLE,))},
            r"2\.\.3 of 0\.\.3",
        ),
    ],
)
def test_pools_that_do_not_fit(p: dict[str, object], d: dict[str, object], why: str) -> None:
    two = Two(node("P", **p), node("D", **d))
    them = two.prove()
    with pytest.raises(HandshakeError, match=why):
        two.reception.pair(them, regions(two.p.layout))


@pytest.mark.parametrize(
    ("p", "d"),
    [
        (SMALL, dataclasses.replace(SMALL, block_size=16)),
        (dataclasses.replace(SMALL, block_size=16), SMALL),
        (KVLayout(4, "float32", (WHOLE,)), KVLayout(8, "float32", (HALF,))),  # all of the reader's heads are there
    ],
)
def test_pools_that_differ_and_fit(p: KVLayout, d: KVLayout) -> None:
    two = Two(node("P", p), node("D", d))
    two.reception.pair(two.prove(), regions(p))
    two.greeting.accept(two.welcome())


APART = KVLayout(4, "float32", (LayerGroup((0,), opaque_bytes=3 * 4096),), "another engine")


def placed(*places: int) -> tuple[KVLayout, tuple[Region, ...]]:
    """One group whose blocks lie in several places."""
    probe = Region(1 << 40, PROBE_BLOCK_BYTES, PROBE_BLOCKS)
    return APART, (Region(4096, 3 * 4096 // max(1, len(places)), 8, places), probe)


def test_blocks_in_several_places_pair_with_as_many_wherever_they_lie() -> None:
    pair = pair_of(placed(0, 1 << 20, 2 << 20), placed(5 << 20, 0, 1 << 20))
    slicing = pair.slicings[0]
    assert (slicing.row_bytes, slicing.piece_bytes) == (4096, 3 * 4096)
    assert slicing.source.rows.tolist() == [0, 1 << 20, 2 << 20]
    assert slicing.reader.rows.tolist() == [5 << 20, 0, 1 << 20]
    with pytest.raises(HandshakeError, match="3 places of 4096 bytes at the prefill node, in 1 of 12288"):
        pair_of(placed(0, 1 << 20, 2 << 20), placed(0))


@pytest.mark.parametrize("places", [(), (1, 2 << 20, 3 << 20), (0, 4096, 1 << 20), (-(1 << 20), 0, 1 << 20)])
def test_places_that_cannot_be(places: tuple[int, ...]) -> None:
    for ends in ((placed(*places), placed(0, 1 << 20, 2 << 20)), (placed(0, 1 << 20, 2 << 20), placed(*places))):
        with pytest.raises(HandshakeError, match="regions do not fit its KV layout"):
            pair_of(*ends)


@pytest.mark.parametrize(
    "change",
    [
        {"regions": []},
        {"layout": {"block_size": 16, "dtype": "float32", "groups": []}},
        {
            "layout": {
                "block_size": -4,
                "dtype": "float32",
                "groups": [{"layers": [], "planes": [{"heads": 0, "dim": 0}]}],
            }
        },
    ],
)
def test_a_source_that_makes_no_sense(change: dict[str, object]) -> None:
    """It knows the secret; its words may still be anything."""
    two = Two()
    two.prove()
    fields = msgspec.msgpack.decode(wire.encoder.encode(two.welcome()))
    welcome = wire.decode_to_reader(msgspec.msgpack.encode({**fields, **change}))
    assert isinstance(welcome, wire.Welcome)
    with pytest.raises(HandshakeError, match="the same version on both nodes"):
        two.greeting.accept(welcome)


@pytest.mark.parametrize("change", [{"lease_s": 0.0}, {"lease_s": float("nan")}, {"node_id": ""}, {"lanes": 7}])
def test_a_welcome_that_cannot_be_read(change: dict[str, object]) -> None:
    two = Two()
    two.prove()
    fields = msgspec.msgpack.decode(wire.encoder.encode(two.welcome()))
    with pytest.raises(msgspec.DecodeError):
        wire.decode_to_reader(msgspec.msgpack.encode({**fields, **change}))


numbers = st.integers(-(1 << 63), (1 << 64) - 1) | st.integers(-4, 64)
dtypes = st.sampled_from(["float32", "bfloat16", "smoke", ""])
planes = st.builds(Plane, numbers, numbers, numbers, numbers, dtypes)
layouts = st.builds(
    KVLayout,
    numbers,
    dtypes,
    st.lists(
        st.builds(
            LayerGroup,
            st.lists(numbers, max_size=3).map(tuple),
            st.lists(planes, max_size=3).map(tuple),
            st.none() | numbers,
            st.just(0) | numbers,
        ),
        max_size=3,
    ).map(tuple),
    st.sampled_from(["", "theirs"]),
)
many_regions = st.lists(st.builds(Region, numbers, numbers, numbers), max_size=4).map(tuple)


@given(layouts, many_regions)
@settings(max_examples=150, deadline=None)
def test_whatever_a_reader_says_is_refused_or_fits(layout: KVLayout, said: tuple[Region, ...]) -> None:
    me = node("D", layout)
    them = wire.Introduction(me.node_id, me.epoch, 0, 1, me.model, layout, list(said), {}, checksums=True)
    with pytest.raises(HandshakeError):
        Two().reception.pair(them, regions(SMALL))


@given(st.binary(max_size=200))
def test_garbage_is_a_decode_error(frame: bytes) -> None:
    for decode in (wire.decode_to_source, wire.decode_to_reader, wire.decode_version):
        try:
            decode(frame)
        except msgspec.DecodeError:
            pass


def test_shortened() -> None:
    assert shortened("short") == "short"
    assert len(shortened("x" * 10_000)) < 1600
