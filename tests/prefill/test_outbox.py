"""The outbox's leases over its real socket, spoken to by a bare client; time passes when the test says so."""

from __future__ import annotations

import dataclasses
import threading
import uuid

import numpy as np
import pytest

from pd_serve.errors import TransferError
from pd_serve.transfer.session.reader_session import Session
from pd_serve.wire import peer as wire
from tests.prefill.client import LEASE_S, Client, hold
from tests.transfer.harness import SMALL, Clock, PrefillEnd, until
from tests.transfer.scripted import copy_lanes

TABLES = [[3, 4, 5], [7, 8, 9]]


def test_chunks_go_out_as_they_come_and_the_release_is_valid(end: PrefillEnd, client: Client) -> None:
    end.outbox.open("k")
    client.say(wire.Claim("k"))
    assert client.sync(["k"]) == []
    end.publish("k", 4, [[3], [7]])
    ready = client.hear()
    assert isinstance(ready, wire.Ready) and ready.num_tokens == 4 and ready.first is None
    end.publish("k", 10, TABLES, first=1, token=42)
    last = client.hear()
    assert isinstance(last, wire.Ready) and last.first == wire.First(42)
    assert [(b.group, b.first, len(b.ids), len(b.checksums)) for b in last.blocks] == [(0, 1, 8, 16), (1, 1, 8, 16)]
    client.say(wire.Release("k", done=True))
    assert client.hear() == wire.Released("k", valid=True)
    assert until(lambda: end.why("k")) == "released"
    assert end.outbox.num_leases == 0


def test_a_door_that_does_not_open_in_time_is_an_error(end: PrefillEnd) -> None:
    go_on = threading.Event()
    end.worker.call(go_on.wait)
    with pytest.raises(TransferError, match=r"could not be let in within 0\.01 s"):
        end.outbox.listen(0.01)
    go_on.set()
    assert end.outbox.listen(10) == end.source.addresses


def test_claim_before_the_request(end: PrefillEnd, client: Client) -> None:
    client.say(wire.Claim("k"))
    assert client.sync(["k"]) == []
    end.outbox.open("k")
    end.publish("k", 10, TABLES, token=1)
    assert isinstance(client.hear(), wire.Ready)


def test_claim_after_everything(end: PrefillEnd, client: Client) -> None:
    end.outbox.open("k")
    end.publish("k", 4, [[3], [7]])
    end.publish("k", 10, TABLES, first=1, token=1)
    client.say(wire.Claim("k"))
    assert [client.hear().num_tokens for _ in range(2)] == [4, 10]  # type: ignore[union-attr]


def test_expiry(end: PrefillEnd, client: Client, clock: Clock) -> None:
    for key in ("kept", "left"):
        end.outbox.open(key)
        client.say(wire.Claim(key))
        client.sync()
        end.publish(key, 10, TABLES, token=1)
        client.hear()
    clock.now_s += 20
    assert client.sync(["kept"]) == []
    clock.now_s += 11
    end.worker.wake()
    assert until(lambda: end.why("left")) == "expired"
    assert client.sync(["kept", "left"]) == ["left"]
    client.say(wire.Release("left", done=True))
    assert client.hear() == wire.Released("left", valid=False)
    client.say(wire.Release("kept", done=True))
    assert client.hear() == wire.Released("kept", valid=True)
    assert until(lambda: end.why("kept")) == "released"


def test_a_lease_that_ran_out_unnoticed_is_not_valid(end: PrefillEnd, client: Client, clock: Clock) -> None:
    end.outbox.open("k")
    client.say(wire.Claim("k"))
    client.sync()
    end.publish("k", 10, TABLES, token=1)
    client.hear()
    clock.now_s += LEASE_S  # nobody wakes the outbox: the release itself does
    client.say(wire.Release("k", done=True))
    assert client.hear() == wire.Released("k", valid=False)
    assert until(lambda: end.why("k")) == "expired"


def test_nobody_claims(end: PrefillEnd, clock: Clock) -> None:
    end.outbox.open("k")
    end.publish("k", 10, TABLES, token=1)
    published = threading.Event()
    end.worker.call(published.set)  # after the publication, which starts the lease anew
    assert published.wait(5)
    clock.now_s += LEASE_S
    end.worker.wake()
    assert until(lambda: end.why("k")) == "expired"


def test_declined(end: PrefillEnd, client: Client) -> None:
    end.outbox.open("k")
    client.say(wire.Claim("k"))
    client.sync()
    client.say(wire.Release("k", done=False))
    assert until(lambda: end.why("k")) == "declined"
    end.publish("k", 10, TABLES, token=1)  # the main thread had not heard yet
    assert client.sync(["k"]) == ["k"]


def test_declined_before_admission(end: PrefillEnd, client: Client) -> None:
    client.say(wire.Claim("k"))
    client.say(wire.Release("k", done=False))
    client.sync()
    end.outbox.open("k")
    assert until(lambda: end.why("k")) == "declined"


def test_cancel_reaches_early_and_late_claimants(end: PrefillEnd, client: Client) -> None:
    client.say(wire.Claim("early"))
    client.sync()
    end.outbox.cancel("early", "refused")
    assert client.hear() == wire.Cancel("early", "refused")
    end.outbox.open("late")
    end.outbox.cancel("late", "finished")
    until(lambda: end.outbox.counters()["leases_cancelled"])
    client.say(wire.Claim("late"))
    assert client.hear() == wire.Cancel("late", "finished")
    assert end.why("late") is None


def test_a_new_epoch_ends_the_old_ones_leases(end: PrefillEnd, client: Client) -> None:
    hold(end, client, "k")
    again = Client(end, epoch=uuid.uuid4().hex)
    again.greet()
    assert until(lambda: end.why("k")) == "peer_lost"
    again.close()


def test_another_node_does_not(end: PrefillEnd, client: Client) -> None:
    hold(end, client, "k")
    other = Client(end, "D2")
    other.greet()
    assert client.sync(["k"]) == []
    other.say(wire.Claim("k"))
    assert isinstance(other.hear(), wire.Cancel)
    other.close()


def test_bye_ends_leases(end: PrefillEnd, client: Client) -> None:
    hold(end, client, "k")
    client.say(wire.Bye(client.identity.epoch))
    assert until(lambda: end.why("k")) == "peer_lost"


def test_a_lost_connection_ends_leases_at_once(end: PrefillEnd) -> None:
    client = Client(end)
    client.greet()
    hold(end, client, "k")
    client.close()
    assert until(lambda: end.why("k"), 2.0) == "peer_lost"


# --- checksums


def sums_of(ready: wire.ToReader) -> list[int]:
    assert isinstance(ready, wire.Ready)
    return [int(s) for b in ready.blocks for s in np.frombuffer(b.checksums, "<u8")]


def naive_sum(block: np.ndarray) -> int:
    words = block.view("<u4")
    return sum(int(x) * ((i * 0x9E3779B1 & 0xFFFFFFFF) | 1) for i, x in enumerate(words)) % 2**64


def test_announced_blocks_carry_their_checksums(end: PrefillEnd, client: Client) -> None:
    end.outbox.open("k")
    client.say(wire.Claim("k"))
    end.publish("k", 10, TABLES, token=1)
    expected = [naive_sum(end.pool.groups[g][i]) for g in range(2) for i in TABLES[g]]
    assert sums_of(client.hear()) == expected
    end.outbox.open("late")  # and when it is claimed afterwards
    end.publish("late", 10, TABLES, token=1)
    client.say(wire.Claim("late"))
    assert sums_of(client.hear()) == expected
    assert end.outbox.counters()["checksum_bytes"] == 6 * sum(SMALL.block_bytes(g) for g in range(2))


@pytest.mark.parametrize("what", ["announce", "next_ready"])
@pytest.mark.parametrize("error", [TransferError("transfer", "the device is on fire"), IndexError("a mistake of ours")])
def test_a_session_whose_blocks_cannot_be_announced_ends_alone(
    what: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its decode node learns so at once, instead of waiting for an announcement that never comes."""
    end = PrefillEnd(lease_s=LEASE_S, lanes=copy_lanes)
    clients = {name: Client(end, name) for name in ("bad", "good")}
    honest = getattr(Session, what)

    def failing(session: Session, *announced: wire.Ready) -> object:
        if session.node_id == "bad" and (announced or session.announcing):
            raise error
        return honest(session, *announced)

    monkeypatch.setattr(Session, what, failing)
    for name, client in clients.items():
        assert isinstance(client.greet(), wire.Welcome)
        hold(end, client, name)
        end.publish(name, 10, TABLES, token=1)
    assert isinstance(clients["bad"].hear(), wire.Bye)
    assert until(lambda: end.why("bad")) == "peer_lost"
    assert isinstance(clients["good"].hear(), wire.Ready)
    assert clients["good"].sync(["good"]) == []
    assert end.worker.internal_errors == isinstance(error, IndexError)
    for client in clients.values():
        client.close()
    end.close()


def test_pieces_of_a_reader_with_smaller_blocks_are_summed(end: PrefillEnd) -> None:
    small = Client(end, "small", layout=dataclasses.replace(SMALL, block_size=2))
    assert isinstance(small.greet(), wire.Welcome)
    end.outbox.open("k")
    end.publish("k", 4, [[3], []])
    small.say(wire.Claim("k"))
    block = end.pool.groups[0][3].reshape(4, 2, 32 * 2)  # [layer and K|V][piece][token and dim]
    assert sums_of(small.hear()) == [naive_sum(np.ascontiguousarray(block[:, p]).ravel()) for p in range(2)]
    small.close()


def test_no_checksums_where_either_end_wants_none(end: PrefillEnd) -> None:
    client = Client(end, checksums=False)
    welcome = client.greet()
    assert isinstance(welcome, wire.Welcome) and not welcome.checksums
    end.outbox.open("k")
    client.say(wire.Claim("k"))
    end.publish("k", 10, TABLES, token=1)
    assert sums_of(client.hear()) == []
    client.close()
