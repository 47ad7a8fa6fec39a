"""Strangers at the router's doors: who may register and remove nodes, whose links are used, which paths are where."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path

import httpx
import pytest

from pd_serve.auth import admin_token
from pd_serve.config import RouterConfig
from pd_serve.errors import ConfigError
from pd_serve.node.registration import Registration
from pd_serve.router import links
from pd_serve.router.doors import NONCE_AGE_S, Doors
from pd_serve.router.main import check
from pd_serve.wire import link
from pd_serve.wire.registration import NONCE_HEADER, PROOF_HEADER, order_proof
from tests.ports import free_port
from tests.router.conftest import Running, StartNode, StartRouter, until
from tests.router.scripted_node import ScriptedNode, expected
from tests.router.test_failures import PROMPT, Stream
from tests.router.test_stream import ManualClock

SECRET = "long, and random enough"


def registered(running: Running) -> list[str]:
    return [node.id for node in running.router.registry.nodes()]


async def order(running: Running, method: str, url: str, secret: str) -> httpx.Response:
    """As a node that knows ``secret``."""
    asked = await running.http.request(method, "/nodes", json={"url": url})
    nonce = asked.headers[NONCE_HEADER]
    headers = {NONCE_HEADER: nonce, PROOF_HEADER: order_proof(secret.encode(), method, nonce, url)}
    return await running.http.request(method, "/nodes", json={"url": url}, headers=headers)


# --- registration ----------------------------------------------------------------------------------------


async def test_a_stranger_neither_registers_nor_removes_a_node(
    start_node: StartNode, start_router: StartRouter
) -> None:
    real, fake = await start_node("decode", secret=SECRET), await start_node("decode", secret="not the secret of ours")
    running = await start_router(real, secret=SECRET)
    for method, url in (("POST", fake.url), ("DELETE", real.url)):
        assert (await running.http.request(method, "/nodes", json={"url": url})).status_code == 401
        answer = await order(running, method, url, "not the secret of ours")
        assert answer.status_code == 403 and "--secret-file" in answer.json()["error"]["message"]
    await running.complete()
    assert not fake.refused and registered(running) == [real.id]  # the router did not even dial it


async def test_a_refused_order_is_shown_and_warned_of_once(
    start_router: StartRouter, caplog: pytest.LogCaptureFixture
) -> None:
    running = await start_router(secret=SECRET, ready=False)
    for _ in range(3):
        await order(running, "POST", "http://127.0.0.1:1", "not the secret of ours")
    (refused,) = (await running.http.get("/v1/status")).json()["refused_orders"]
    assert (refused["url"], refused["client"]) == ("http://127.0.0.1:1", "127.0.0.1")
    assert "--secret-file" in refused["reason"]
    assert sum("127.0.0.1:1" in record.getMessage() for record in caplog.records if record.levelname == "WARNING") == 1


def test_strangers_fill_neither_the_log_nor_the_memory(caplog: pytest.LogCaptureFixture) -> None:
    clock = ManualClock()
    doors = Doors(SECRET.encode(), False, clock.now_s)
    for number in range(1000):
        doors.refuse("POST", f"http://10.0.0.1:{number}", "10.0.0.1", "why")
    assert len(doors.refusals()) == len(caplog.records) == 32
    clock.advance(61)
    assert not doors.refusals()


async def test_without_a_secret_no_proxy_or_page_speaks_for_this_machine(
    start_node: StartNode, start_router: StartRouter
) -> None:
    node = await start_node("decode")
    running = await start_router(ready=False)
    for header in ("Origin", "Forwarded", "X-Forwarded-For"):
        answer = await running.http.post("/nodes", json={"url": node.url}, headers={header: "http://example.org"})
        assert answer.status_code == 403 and "--secret-file" in answer.json()["error"]["message"]
    assert (await running.http.post("/nodes", json={"url": node.url})).status_code == 200


async def test_an_order_is_proved_once_and_for_one_node_and_method(
    start_node: StartNode, start_router: StartRouter
) -> None:
    node = await start_node("decode", secret=SECRET)
    running = await start_router(secret=SECRET, ready=False)
    nonce = (await running.http.post("/nodes", json={"url": node.url})).headers[NONCE_HEADER]
    headers = {NONCE_HEADER: nonce, PROOF_HEADER: order_proof(SECRET.encode(), "POST", nonce, node.url)}
    other = await running.http.post("/nodes", json={"url": "http://127.0.0.1:1"}, headers=headers)
    removal = await running.http.request("DELETE", "/nodes", json={"url": node.url}, headers=headers)
    assert (other.status_code, removal.status_code) == (403, 403)
    assert (await running.http.post("/nodes", json={"url": node.url}, headers=headers)).status_code == 200
    again = await running.http.post("/nodes", json={"url": node.url}, headers=headers)
    assert again.status_code == 401 and "used" in again.json()["error"]["message"]
    await until(lambda: registered(running) == [node.id], "linked")
    await order(running, "DELETE", node.url, SECRET)
    await until(lambda: not registered(running), "removed")
    token = {"Authorization": f"Bearer {admin_token(SECRET.encode())}"}
    assert (await running.http.post("/nodes", json={"url": node.url}, headers=token)).status_code == 200


def test_nonces_age_and_asking_for_many_harms_nobody() -> None:
    now_s = 0.0
    doors = Doors(SECRET.encode(), False, lambda: now_s)
    nonce, late = doors.nonce(), doors.nonce()
    for _ in range(1000):
        doors.nonce()

    def give(nonce: str) -> None:
        doors.check("POST", "http://n", "10.0.0.9", nonce, order_proof(SECRET.encode(), "POST", nonce, "http://n"), "")

    give(nonce)
    now_s = NONCE_AGE_S
    for refused in (nonce, late, "", "00", nonce.upper(), "ü", Doors(b"", False, lambda: now_s).nonce()):
        with pytest.raises(Exception, match="nonce"):
            give(refused)
    give(doors.nonce())
    assert len(doors._used) == 1  # expired ones are forgotten


async def test_a_node_registers_by_proof_and_leaves(start_node: StartNode, start_router: StartRouter) -> None:
    node = await start_node("decode", secret=SECRET)
    running = await start_router(secret=SECRET, ready=False)
    registration = Registration(
        [running.url], node.url, asyncio.Event(), lambda: 1, timeout_s=4, secret=SECRET.encode()
    )
    await running.ready()
    await running.complete()
    await registration.leave()
    await until(lambda: not registered(running), "gone")


async def test_without_a_secret_nodes_are_of_this_machine(start_router: StartRouter) -> None:
    running = await start_router(ready=False)
    answer = await running.http.post("/nodes", json={"url": "http://10.255.255.1:80"})
    assert answer.status_code == 403
    assert "--secret-file" in answer.text and "--allow-insecure-nodes" in answer.text
    assert not running.router.links.unlinked()
    doors = Doors(b"", False, lambda: 0.0)
    doors.check("POST", "http://[::1]:1", "127.0.0.1", "", "", "")
    for client, url in (
        ("10.0.0.1", "http://127.0.0.1:1"),
        ("", "http://127.0.0.1:1"),
        ("::1", "http://localhost.x:1"),
    ):
        with pytest.raises(Exception, match="secret"):
            doors.check("POST", url, client, "", "", "")
        Doors(b"", True, lambda: 0.0).check("POST", url, client, "", "", "")


async def test_a_url_names_an_address_alone(start_router: StartRouter) -> None:
    running = await start_router(ready=False)
    for rest in ("127.0.0.1:1/x", "127.0.0.1:1?x=", "127.0.0.1:1#x", "u@127.0.0.1:1", "127.0.0.1:1\\x", "127.0.0.1:0"):
        assert (await running.http.post("/nodes", json={"url": f"http://{rest}"})).status_code == 400, rest


def test_listed_nodes_elsewhere_need_a_secret(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ConfigError, match=r"decode 10\.0\.0\.1 is no address of this machine.*--secret-file"):
        check(RouterConfig(decode=("http://10.0.0.1:1",)))
    check(RouterConfig(decode=("http://10.0.0.1:1",), secret=SECRET))
    with caplog.at_level("INFO"):
        check(RouterConfig(decode=("http://127.0.0.1:1",)))
    assert "only nodes of this machine" in caplog.text
    check(RouterConfig(decode=("http://10.0.0.1:1",), allow_insecure_nodes=True))
    assert "whoever reaches" in caplog.text


# --- the link --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mine", "theirs"), [(SECRET, ""), ("", SECRET), (SECRET, "not the secret of ours")])
async def test_a_node_that_cannot_prove_the_secret_gets_nothing(
    start_node: StartNode, start_router: StartRouter, mine: str, theirs: str
) -> None:
    node = await start_node("decode", secret=theirs)
    running = await start_router(node, secret=mine, ready=False)
    await until(lambda: [u for u in running.router.links.unlinked() if u.state == "refused"], "refused")
    (entry,) = running.router.links.unlinked()
    assert "secret" in entry.reason and not registered(running)
    assert not node.submits and not node.peers


async def test_a_node_that_refuses_is_asked_less_often_and_its_reason_is_shown(
    start_node: StartNode, start_router: StartRouter
) -> None:
    node = await start_node("decode")

    async def refuse(connection):  # type: ignore[no-untyped-def]
        await connection.recv()
        await connection.close(1008, "update the older of the two")

    node._prove = refuse  # type: ignore[method-assign]
    running = await start_router(node, ready=False)
    await until(lambda: [u for u in running.router.links.unlinked() if u.state == "refused"], "refused")
    assert running.router.links.unlinked()[0].reason == "the node closed the link: update the older of the two"


async def test_a_refused_node_that_was_started_anew_is_tried_at_once(
    start_node: StartNode, start_router: StartRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(links, "_REFUSED_BACKOFF_S", (60.0,))
    node = await start_node("decode")
    node.link_version = 99
    running = await start_router(ready=False)

    async def register(instance: str) -> None:
        answer = await running.http.post("/nodes", json={"url": node.url, "instance": instance})
        assert answer.status_code == 200

    await register("one")
    await until(lambda: [u for u in running.router.links.unlinked() if u.state == "refused"], "refused")
    node.link_version = link.LINK_VERSION
    await register("one")  # it only repeats itself
    await asyncio.sleep(0.2)
    assert not registered(running)
    await register("two")
    await until(lambda: registered(running), "linked")


async def test_registrations_are_bounded(
    start_node: StartNode, start_router: StartRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(links, "MAX_LINKS", 1)
    node = await start_node("decode")
    running = await start_router(node)
    for url, status in ((node.url, 200), ("http://127.0.0.1:9", 503)):
        answer = await running.http.post("/nodes", json={"url": url})
        assert answer.status_code == status
    assert answer.json()["error"]["code"] == "too_many_nodes"


async def test_requests_over_proven_links(start_node: StartNode, start_router: StartRouter) -> None:
    nodes = [await start_node(role, secret=SECRET) for role in ("prefill", "decode")]
    running = await start_router(*nodes, secret=SECRET)
    answer = await running.complete(PROMPT, return_token_ids=True)
    assert answer["choices"][0]["token_ids"] == expected(PROMPT, 8)
    assert sum(node.models_sent for node in nodes) >= 1


async def test_a_frame_without_its_mac_ends_the_link(
    start_node: StartNode, start_router: StartRouter, caplog: pytest.LogCaptureFixture
) -> None:
    node = await start_node("decode", secret=SECRET)
    running = await start_router(node, secret=SECRET)
    for connection in list(node._connections):
        await connection.send(link.encoder.encode(link.Status(node.load())))
    await until(lambda: "MAC does not hold" in caplog.text, "a word about it")
    await running.ready()


async def test_a_living_link_gives_way_to_no_newcomer(start_node: StartNode, start_router: StartRouter) -> None:
    real = await start_node("decode", node_id="decode@x", token_s=0.01)
    running = await start_router(real)
    fake = await start_node("decode", node_id="decode@x")
    fake.epoch = "epoch-2"
    stream = Stream(running)
    await until(lambda: len(stream.tokens) > 3, "tokens")
    await running.http.post("/nodes", json={"url": fake.url})
    await until(lambda: [u for u in running.router.links.unlinked() if "linked already" in u.reason], "refused")
    assert (await stream.wait()).tokens == expected(PROMPT, 40)
    assert not fake.submits and running.router.registry.nodes()[0].url == real.url
    port = real.port
    await real.stop()
    again = await start_node("decode", node_id="decode@x", port=port)
    again.epoch = "epoch-3"
    await until(lambda: registered(running) and running.router.registry.nodes()[0].hello.epoch == "epoch-3", "back", 3)


@pytest.mark.parametrize(
    "output",
    [
        link.Output("?", -1, [50]),
        link.Output("?", 0, [tiny_id := 2**31 - 1]),
        link.Output("?", 0, [-5]),
        link.Output("?", 0, [50], logprobs=[link.TokenLogprob(50, -1.0, 1, [(tiny_id, -2.0)])]),
        link.Output("?", 0, [], stop_token=tiny_id),
        link.Output("?", 2**40, [50]),
    ],
)
async def test_what_cannot_be_ends_the_link(
    start_node: StartNode, start_router: StartRouter, output: link.Output
) -> None:
    honest, liar = await start_node("decode", token_s=0.01), await start_node("decode", token_s=0.01)
    running = await start_router(honest, liar)
    liar.hold_after = 3
    streams = [Stream(running) for _ in range(4)]
    await until(lambda: liar.running, "the liar's turn")
    output.id = next(iter(liar.running))
    lies = link.encoder.encode(link.Outputs([output]))
    for connection in list(liar._connections):
        await connection.send(lies)
    for stream in streams:
        assert (await stream.wait()).tokens == expected(PROMPT, 40)


async def test_loads_that_cannot_be_end_the_link(
    start_node: StartNode, start_router: StartRouter, caplog: pytest.LogCaptureFixture
) -> None:
    node = await start_node("decode")
    running = await start_router(node)
    told: set[object] = set()
    for load in (
        link.Load(-1, 0, 0, []),
        link.Load(0, 0, 0, [link.GroupUsage(-5, 0, 0, 0)]),
        link.Load(0, 0, 2**63, []),
    ):
        await until(lambda: running.router.registry.nodes() and node._connections - told, "linked anew")
        caplog.clear()
        (connection,) = node._connections - told  # the last one may not be gone yet
        told.add(connection)
        await connection.send(link.encoder.encode(link.Status(load)))
        await until(lambda: "said what cannot be" in caplog.text, str(load))


async def test_a_node_that_never_sends_its_model(start_node: StartNode, start_router: StartRouter) -> None:
    node = await start_node("decode")
    node._send = _no_models(node)  # type: ignore[method-assign]
    running = await start_router(node, ready=False, model_timeout_s=0.2)
    await until(lambda: [u for u in running.router.links.unlinked() if u.state == "unreachable"], "given up")


def _no_models(node: ScriptedNode):  # type: ignore[no-untyped-def]
    send = node._send

    async def sender(connection, message) -> None:  # type: ignore[no-untyped-def]
        if not isinstance(message, link.Model):
            await send(connection, message)

    return sender


# --- listeners -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("admin_host", ["127.0.0.1", "0.0.0.0"])
async def test_operators_paths_are_on_the_admin_listener(
    start_node: StartNode, start_router: StartRouter, admin_host: str
) -> None:
    port, key = free_port(), {"Authorization": f"Bearer {SECRET[:4]}-key-of-a-client"}
    keys = (key["Authorization"][7:],)
    running = await start_router(
        await start_node("decode", secret=SECRET),
        host="0.0.0.0", admin_host=admin_host, admin_port=port, api_key=keys, secret=SECRET,
    )  # fmt: skip
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False, verify=False) as admin:
        for path in ("/metrics", "/v1/status"):
            public = await running.http.get(path, headers=key)
            assert public.status_code == 404 and "admin listener" in public.text
            open_to_all = (await admin.get(path)).status_code == 200
            assert open_to_all == (admin_host == "127.0.0.1")
            assert (await admin.get(path, headers=key)).status_code == 200
        assert (await admin.get("/v1/models")).status_code == 401
    assert (await running.http.get("/v1/models", headers=key)).status_code == 200
    assert (await running.http.post("/nodes", json={"url": "http://127.0.0.1:1"})).status_code == 401


def test_where_the_admin_listener_is() -> None:
    assert RouterConfig().admin_address() is None
    assert RouterConfig(host="0.0.0.0").admin_address() == ("127.0.0.1", 8001)
    assert RouterConfig(admin_port=9000).admin_address() == ("127.0.0.1", 9000)
    for port, admin_port in ((8000, 8000), (65535, 0)):
        with pytest.raises(ConfigError, match="--admin-port"):
            RouterConfig(host="0.0.0.0", port=port, admin_port=admin_port).admin_address()


# --- TLS -------------------------------------------------------------------------------------------------


def server_context(certificate: tuple[str, str]) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    return context


async def test_links_over_tls_are_verified(
    start_node: StartNode, start_router: StartRouter, certificate: tuple[str, str]
) -> None:
    node = await start_node("decode", secret=SECRET, tls=server_context(certificate))
    running = await start_router(node, secret=SECRET, ssl_ca=certificate[0])
    await running.complete()
    wary = await start_router(node, secret=SECRET, ready=False)
    await until(lambda: [u for u in wary.router.links.unlinked() if "--ssl-ca" in u.reason], "not verified")
    assert not wary.router.registry.nodes()


async def test_tls_on_one_side_only_is_said(
    start_node: StartNode, start_router: StartRouter, certificate: tuple[str, str], tmp_path: Path
) -> None:
    secure, plain = await start_node("decode", tls=server_context(certificate)), await start_node("decode")
    running = await start_router(ready=False, ssl_ca=certificate[0])
    running.router.links.add(secure.url.replace("https", "http"), static=True)
    running.router.links.add(plain.url.replace("http", "https"), static=True)
    reasons = running.router.links.unlinked
    await until(lambda: [u for u in reasons() if "its URL begins with https" in u.reason], "http to TLS")
    await until(lambda: [u for u in reasons() if "no TLS there" in u.reason], "TLS to http")
    with pytest.raises(ConfigError, match="ssl_certfile, ssl_keyfile: cannot use"):
        check(RouterConfig(ssl_certfile=certificate[0], ssl_keyfile="/nowhere"))
    with pytest.raises(ConfigError, match="without ssl_certfile"):
        check(RouterConfig(ssl_keyfile=certificate[1]))
    with pytest.raises(ConfigError, match="ssl_ca: cannot use"):
        check(RouterConfig(ssl_ca="/nowhere"))
