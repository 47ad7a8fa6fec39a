"""TLS between engines: the same frames, and who is kept out."""

from __future__ import annotations

import os
import shutil
import socket
import time
from pathlib import Path

import pytest

from pd_serve.decode.inbox import Arrived, Failed, Offered
from pd_serve.errors import ConfigError, FailureKind
from pd_serve.transfer.session.connection import Connection, Listener, dial, resolve
from pd_serve.transfer.session.tls import Tls
from tests.transfer.certificates import Certificate, issue
from tests.transfer.harness import DecodeEnd, PrefillEnd, until
from tests.transfer.scripted import copy_lanes
from tests.transfer.session.test_connection import wait

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="certificates are made by openssl")

TABLES = [[1, 2, 3, 4], [5, 6, 7, 8]]


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return issue(tmp_path_factory.mktemp("tls"), "ours")


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return issue(tmp_path_factory.mktemp("tls"), "others")


def loaded(certificate: Certificate) -> Tls:
    tls = Tls.load(certificate.certfile, certificate.keyfile, certificate.ca)
    assert tls is not None
    return tls


def exchange(a: Connection, b: Connection, to_a: int, to_b: int) -> tuple[list[bytes], list[bytes]]:
    """Moves both on until so many frames have come."""
    at_a: list[bytes] = []
    at_b: list[bytes] = []
    deadline_s = time.monotonic() + 20
    while len(at_a) < to_a or len(at_b) < to_b:
        assert time.monotonic() < deadline_s and not (a.ended or b.ended), (a.ended, b.ended)
        at_a += a.advance()
        at_b += b.advance()
    return at_a, at_b


def test_frames_of_any_size_in_both_directions(ours: Certificate) -> None:
    tls = loaded(ours)
    listener = Listener("127.0.0.1", tls)
    a = dial(resolve(listener.address), tls)
    sent = [b"", b"before it is connected", os.urandom(100_000)]
    for frame in sent:
        a.send(frame)
    wait(listener)
    (b,) = listener.accept()
    assert exchange(a, b, 0, 3) == ([], sent)
    large = os.urandom(12 << 20)
    b.send(large)
    a.send(b"meanwhile")
    assert exchange(a, b, 1, 1) == ([large], [b"meanwhile"])
    assert a.interest == b.interest, "nothing is left to be sent"
    b.send(b"bye")
    b.close()
    heard: list[bytes] = []
    while not a.ended:
        wait(a)
        heard += a.advance()
    assert heard == [b"bye"] and not a.untrusted
    a.close()
    listener.close()


def test_what_travels_cannot_be_read(ours: Certificate) -> None:
    tls = loaded(ours)
    with socket.create_server(("127.0.0.1", 0)) as server:
        a = dial(resolve(f"tcp://127.0.0.1:{server.getsockname()[1]}"), tls)
        a.send(b"a secret word")
        wait(a)
        a.advance()
        stranger = server.accept()[0]
    assert b"a secret word" not in stranger.recv(1 << 16)
    a.close()
    stranger.close()


@pytest.mark.parametrize("secret", [b"", b"s3cret"])
def test_a_request_over_tls(ours: Certificate, secret: bytes) -> None:
    p = PrefillEnd(me={"secret": secret}, lanes=copy_lanes, tls=loaded(ours))
    d = DecodeEnd(me={"secret": secret}, lanes=copy_lanes, tls=loaded(ours))
    p.outbox.open("k")
    d.inbox.expect("k", p.source)
    p.publish("k", 16, TABLES, token=5)
    d.wait("k", Offered)
    d.accept("k", TABLES)
    assert d.wait("k", Arrived).first_token == 5
    assert until(lambda: p.why("k")) == "released"
    d.close()
    p.close()


@pytest.mark.parametrize(("source", "reader"), [("ours", "others"), ("ours", ""), ("", "ours")])
def test_who_has_no_certificate_of_the_authority_is_kept_out(
    source: str, reader: str, ours: Certificate, others: Certificate
) -> None:
    has = {"": None, "ours": loaded(ours), "others": loaded(others)}
    p = PrefillEnd(lanes=copy_lanes, tls=has[source])
    d = DecodeEnd(lanes=copy_lanes, tls=has[reader])
    d.inbox.expect("k", p.source)
    failed = d.wait("k", Failed)
    assert "--ssl-ca" in failed.message
    if reader:  # else the source may just as well have died
        assert failed.kind is FailureKind.HANDSHAKE
        assert "--ssl-ca" in until(lambda: d.inbox.misfits().get("P", ""))
    until(lambda: p.outbox.counters()["handshakes_unproved"] + p.outbox.counters()["garbage_frames"])
    assert p.outbox.counters()["handshakes"] == 0
    d.close()
    p.close()


def test_a_reader_of_another_authority_is_found_out_by_the_source(ours: Certificate, others: Certificate) -> None:
    """It would trust the source: only its own certificate is wrong."""
    p = PrefillEnd(lanes=copy_lanes, tls=loaded(ours))
    d = DecodeEnd(lanes=copy_lanes, tls=Tls.load(others.certfile, others.keyfile, ours.ca))
    d.inbox.expect("k", p.source)
    failed = d.wait("k", Failed)
    assert failed.kind is FailureKind.HANDSHAKE and "--ssl-ca" in failed.message
    until(lambda: p.outbox.counters()["handshakes_unproved"])
    assert p.outbox.counters()["handshakes"] == 0
    d.close()
    p.close()


def test_files_that_are_none(ours: Certificate, tmp_path: Path) -> None:
    assert Tls.load(ours.certfile, ours.keyfile, "") is None
    (tmp_path / "empty.pem").write_text("")
    for files in (
        ("", "", ours.ca),
        (ours.certfile, ours.keyfile, str(tmp_path / "empty.pem")),
        (ours.certfile, str(tmp_path / "none"), ours.ca),
    ):
        with pytest.raises(ConfigError, match="--ssl-ca"):
            Tls.load(*files)
