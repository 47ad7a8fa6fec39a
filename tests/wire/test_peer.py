"""The peer protocol's bytes: nodes of other builds speak them too. A change here needs another protocol version."""

# ruff: noqa: E501

from __future__ import annotations

import typing

import msgspec
import pytest

from pd_serve.kv.layout import KVLayout, kv_group
from pd_serve.memory.region import Region
from pd_serve.wire import peer as wire

NONCE, MAC = b"n" * 32, b"m" * 32
LAYOUT = KVLayout(16, "float32", (kv_group((0, 1), 2, 64),))
REGIONS = [Region(4096, 65536, 8)]

# fmt: off
GOLDEN: list[tuple[msgspec.Struct, str]] = [
    (wire.Hello(4, 4, NONCE), '84a474797065a568656c6c6fac70726f746f636f6c5f6d696e04ac70726f746f636f6c5f6d617804a56e6f6e6365c4206e6e6e6e6e6e6e6e6e6e6e6e6e6e6e6e6e6e6e6e6e6e6e6e6e6e6e6e6e6e6e6e'),
    (wire.Challenge(4, NONCE, MAC), '84a474797065a96368616c6c656e6765a870726f746f636f6c04a56e6f6e6365c4206e6e6e6e6e6e6e6e6e6e6e6e6e6e6e6e6e6e6e6e6e6e6e6e6e6e6e6e6e6e6e6ea36d6163c4206d6d6d6d6d6d6d6d6d6d6d6d6d6d6d6d6d6d6d6d6d6d6d6d6d6d6d6d6d6d6d6d'),
    (wire.Proof(MAC), '82a474797065a570726f6f66a36d6163c4206d6d6d6d6d6d6d6d6d6d6d6d6d6d6d6d6d6d6d6d6d6d6d6d6d6d6d6d6d6d6d6d'),
    (wire.Introduction("D", "e1", "m", LAYOUT, REGIONS, {"nixl": b"x"}, checksums=True), '88a474797065ac696e74726f64756374696f6ea76e6f64655f6964a144a565706f6368a26531a56d6f64656ca16da66c61796f757484aa626c6f636b5f73697a6510a56474797065a7666c6f61743332a667726f7570739184a66c6179657273920001a6706c616e65739285a5686561647302a364696d40aa66697273745f6865616400ab746f74616c5f686561647300a56474797065a085a5686561647302a364696d40aa66697273745f6865616400ab746f74616c5f686561647300a56474797065a0a677696e646f77c0ac6f70617175655f627974657300a7666f726569676ea0a7726567696f6e739183a761646472657373cd1000ab626c6f636b5f6279746573ce00010000aa6e756d5f626c6f636b7308a56c616e657381a46e69786cc40178a9636865636b73756d73c3'),
    (wire.Welcome("P", "e2", LAYOUT, REGIONS, {"nixl": b"y"}, {"ucx": "no"}, 30.0, checksums=False), '89a474797065a777656c636f6d65a76e6f64655f6964a150a565706f6368a26532a66c61796f757484aa626c6f636b5f73697a6510a56474797065a7666c6f61743332a667726f7570739184a66c6179657273920001a6706c616e65739285a5686561647302a364696d40aa66697273745f6865616400ab746f74616c5f686561647300a56474797065a085a5686561647302a364696d40aa66697273745f6865616400ab746f74616c5f686561647300a56474797065a0a677696e646f77c0ac6f70617175655f627974657300a7666f726569676ea0a7726567696f6e739183a761646472657373cd1000ab626c6f636b5f6279746573ce00010000aa6e756d5f626c6f636b7308a56c616e657381a46e69786cc40179a77768795f6e6f7481a3756378a26e6fa76c656173655f73cb403e000000000000a9636865636b73756d73c2'),
    (wire.Refused("no"), '82a474797065a772656675736564a6726561736f6ea26e6f'),
    (wire.LaneMessage("nixl", b"z"), '83a474797065a46c616e65a46c616e65a46e69786ca77061796c6f6164c4017a'),
    (wire.Chosen("nixl", 1.5, {"ucx": "slow"}), '84a474797065a663686f73656ea46c616e65a46e69786cab62797465735f7065725f73cb3ff8000000000000a77768795f6e6f7481a3756378a4736c6f77'),
    (wire.Claim("k"), '82a474797065a5636c61696da36b6579a16b'),
    (wire.Ready("k", 16, [wire.Blocks(0, 1, b"\1\0\0\0", b"\7" * 8)]), '85a474797065a57265616479a36b6579a16baa6e756d5f746f6b656e7310a6626c6f636b7391940001c40401000000c4080707070707070707a56669727374c0'),
    (wire.Ready("k", 16, [], wire.First(7)), '85a474797065a57265616479a36b6579a16baa6e756d5f746f6b656e7310a6626c6f636b7390a566697273749107'),
    (wire.Heartbeat(1, ["k"]), '83a474797065a9686561727462656174a373657101a46b65797391a16b'),
    (wire.HeartbeatAck(1, ["k"]), '83a474797065ad6865617274626561745f61636ba373657101a4676f6e6591a16b'),
    (wire.Release("k", done=True), '83a474797065a772656c65617365a36b6579a16ba4646f6e65c3'),
    (wire.Released("k", valid=True), '83a474797065a872656c6561736564a36b6579a16ba576616c6964c3'),
    (wire.Cancel("k", "why"), '83a474797065a663616e63656ca36b6579a16ba6726561736f6ea3776879'),
    (wire.Bye("e1"), '82a474797065a3627965a565706f6368a26531'),
]
# fmt: on


@pytest.mark.parametrize(("message", "golden"), GOLDEN)
def test_golden_bytes(message: msgspec.Struct, golden: str) -> None:
    assert wire.encoder.encode(message).hex() == golden
    for union, decode in ((wire.ToPrefill, wire.decode_to_prefill), (wire.ToDecode, wire.decode_to_decode)):
        if type(message) in typing.get_args(union):
            assert decode(bytes.fromhex(golden)) == message


def test_every_message_is_in_the_table() -> None:
    spoken = {*typing.get_args(wire.ToPrefill), *typing.get_args(wire.ToDecode)}
    assert {type(message) for message, _ in GOLDEN} == spoken
    assert (wire.PROTOCOL_MIN, wire.PROTOCOL_MAX) == (4, 4)


@pytest.mark.parametrize("also", [{}, {"nonce": NONCE, "lanes": {}, "node_id": "D"}])
def test_every_hello_says_its_versions(also: dict[str, object]) -> None:
    frame = msgspec.msgpack.encode({"type": "hello", "protocol_min": 1, "protocol_max": 2, **also})
    assert wire.decode_version(frame) == wire.Version(1, 2)
