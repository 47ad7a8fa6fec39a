"""Nodes that a file or a Kubernetes API server lists: they come, drain and leave with the list."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any

import pytest

from pd_serve import values
from pd_serve.config import RouterConfig
from pd_serve.errors import ConfigError
from pd_serve.router import discovery, main
from pd_serve.router.backends.base import Place
from pd_serve.router.discovery import Api, EndpointSlices, endpoints
from tests.router.conftest import Running, StartNode, StartRouter, until
from tests.router.kubernetes import ApiServer, endpoint_slice

LABELS = {"app": "pd-serve"}


def linked(running: Running) -> dict[str, bool]:
    """By URL of the linked nodes: whether they drain."""
    return {node.url: node.load.draining for node in running.router.registry.nodes()}


async def test_a_file_is_followed(
    tmp_path: Path, start_node: StartNode, start_router: StartRouter, caplog: pytest.LogCaptureFixture
) -> None:
    prefill, decode, later = await start_node("prefill"), await start_node("decode"), await start_node("decode")
    path = tmp_path / "nodes"
    path.write_text(f"{decode.url}  # the first\n\n{prefill.url}/\nnonsense\n")
    running = await start_router(discover=(f"file://{path}",))
    await until(lambda: linked(running) == {prefill.url: False, decode.url: False}, "both")
    assert "line 4" in caplog.text
    await running.complete()
    (tmp_path / "new").write_text(f"{later.url}\n{decode.url}\n")
    (tmp_path / "new").replace(path)
    await until(lambda: later.url in linked(running), "the new one")
    await prefill.stop()  # nobody lists it any more: it is not tried again
    await until(lambda: prefill.url not in linked(running), "gone")
    assert prefill.url not in [entry.url for entry in running.router.links.unlinked()]
    path.unlink()
    await asyncio.sleep(1.5)
    assert set(linked(running)) == {later.url, decode.url}, "what cannot be read changes nothing"
    assert caplog.text.count("the last one holds") == 1
    before = running.router.registry.get(later.id)
    later.cut()  # one that is listed is tried again
    await until(lambda: running.router.registry.get(later.id) not in (None, before), "back")


async def test_endpoint_slices_are_followed(
    tmp_path: Path, start_node: StartNode, start_router: StartRouter, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "token").write_text("t0ken\n")
    first, second = await start_node("decode"), await start_node("decode")
    server = ApiServer("t0ken")
    ours = {"port": first.port, "labels": LABELS}
    server.put(endpoint_slice("a", "127.0.0.1", **ours))
    server.put(endpoint_slice("other", "127.0.0.1", port=9, labels={"app": "else"}))
    running = await start_router(ready=False)
    seen: list[dict[str, bool]] = []

    def found(urls: dict[str, bool]) -> None:
        seen.append(urls)
        running.router.links.listed("k8s", urls)

    async with server.serving() as url:
        api = Api(url, tmp_path / "token")
        task = asyncio.create_task(EndpointSlices("models", "app=pd-serve", api).follow(found))
        try:
            await until(lambda: linked(running) == {first.url: False}, "the first")
            server.put(endpoint_slice("b", "127.0.0.1", port=second.port, labels=LABELS, ready=False))
            server.put(endpoint_slice("b", "127.0.0.1", port=second.port, labels=LABELS))
            await until(
                lambda: linked(running) == {first.url: False, second.url: False}, "the second, when it is ready"
            )
            server.put(endpoint_slice("a", "127.0.0.1", **ours, ready=False, serving=True, terminating=True))
            await until(lambda: linked(running) == {first.url: True, second.url: False}, "the first drains")
            assert (await running.complete())["choices"] and not first.submits and second.submits
            assert server.lists == 1
            server.forget()
            await until(lambda: server.lists == 2, "410: listed again")
            server.delete("a")
            await until(lambda: seen[-1] == {second.url: False}, "the first is gone")
            await first.stop()
            await until(lambda: linked(running) == {second.url: False}, "and not tried again")
            assert not running.router.links.unlinked()
            server.broken = True
            server.forget()
            await until(lambda: "etcd is away" in caplog.text, "a word about it")
            assert linked(running) == {second.url: False}
            server.broken = False
            server.put(endpoint_slice("b", "127.0.0.1", port=second.port, labels=LABELS, terminating=True))
            await until(lambda: linked(running) == {second.url: True}, "followed again")
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


@pytest.mark.parametrize(
    ("ports", "expected"),
    [
        ([{"port": 8100}], ["http://10.0.0.1:8100"]),
        ([{"name": "a", "port": 1}, {"name": "b", "port": 2}], []),
        ([{"name": "a", "port": 1}, {"name": "https", "port": 2}], ["https://10.0.0.1:2"]),
        ([{"name": "http", "port": None}], []),
        (None, []),
    ],
)
def test_which_port_of_an_endpoint(ports: list[dict[str, Any]] | None, expected: list[str]) -> None:
    item = {"ports": ports, "endpoints": [{"addresses": ["10.0.0.1", "10.0.0.9"]}]}
    assert [url for url, _, _ in endpoints(item)] == expected
    assert endpoints({"ports": [{"port": 1}], "endpoints": [{"addresses": ["fd00::1"], "conditions": {}}]}) == [
        ("http://[fd00::1]:1", True, False)
    ]


def test_with_tls_pods_go_by_the_names_that_certificates_have() -> None:
    endpoint = {"addresses": ["10.0.0.1"], "hostname": "decode-0"}
    item = {
        "metadata": {"namespace": "models", "labels": {"kubernetes.io/service-name": "decode"}},
        "ports": [{"name": "http", "port": 1, "appProtocol": "https"}],
        "endpoints": [endpoint, {"addresses": ["10.0.0.2"]}],
    }
    assert [url for url, _, _ in endpoints(item)] == ["https://decode-0.decode.models.svc:1", "https://10.0.0.2:1"]
    plain = {**item, "ports": [{"name": "http", "port": 1}]}
    assert [url for url, _, _ in endpoints(plain)] == ["http://10.0.0.1:1", "http://10.0.0.2:1"]


def test_what_the_labels_of_a_service_say_of_its_endpoints() -> None:
    item: dict[str, Any] = {"ports": [{"port": 1}], "endpoints": [{"addresses": ["10.0.0.1"]}]}
    labels = {"pd-serve/backend": "vllm", "pd-serve/role": "prefill", "app": "llm"}
    ((line, _, _),) = endpoints({**item, "metadata": {"labels": labels}})
    assert Place.parse(line) == Place("http://10.0.0.1:1", "vllm", "prefill")
    for wrong in ({"pd-serve/backend": "vllm"}, {"pd-serve/backend": "tgi", "pd-serve/role": "decode"}):
        with pytest.raises(ValueError, match="vllm or sglang"):
            endpoints({**item, "metadata": {"labels": wrong}})


def test_strangers_are_not_linked_to_without_a_secret(caplog: pytest.LogCaptureFixture) -> None:
    async def listed() -> None:
        running = Running(RouterConfig())
        await running.started()
        running.router.links.listed("k8s", {"http://10.0.0.1:8100": False})
        assert not running.router.links.unlinked() and "--secret-file" in caplog.text
        await running.stop()

    asyncio.run(listed())


def test_lists_that_cannot_be_are_refused_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    parse = values.NODE_LISTS.parse
    assert parse("k8s://models/app=pd,role=decode,file:///nodes") == (
        "k8s://models/app=pd,role=decode",
        "file:///nodes",
    )
    for wrong in ("file://nodes", "k8s://models", "etcd://x/y"):
        with pytest.raises(ValueError, match="must be file:///PATH or k8s:"):
            parse(wrong)
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(ConfigError, match="service account"):
        main.check(RouterConfig(discover=("k8s://models/app=pd",)))
    discovery.check("file:///nodes")
