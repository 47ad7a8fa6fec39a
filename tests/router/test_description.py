"""What /openapi.json says is what is served: asked by schemathesis, and by those who read it."""

from __future__ import annotations

import asyncio
import copy
import socket
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests.router.browser import CHROMIUM, WHY_NOT, browser
from tests.router.conftest import Running, StartNode, StartRouter


def no_fault_of_the_servers(_: Any, response: Any, __: Any) -> None:
    """Nodes here know no grammars, and say so."""
    assert response.status_code < 500 or response.json()["error"]["code"] == "not_installed", response.text


# Endless, or not for strangers: a node that registers is dialled.
LEFT_OUT = r"^/(dashboard/events|nodes)$"
EXAMPLES = 3  # of each operation that reads a body, and mode; beside the described ones


@pytest.fixture
async def running(start_node: StartNode, start_router: StartRouter) -> Running:
    nodes = [await start_node(role, token_s=0) for role in ("prefill", "decode")]
    return await start_router(*nodes, strict_fields=True)  # so described that most of what is tried is known


def described(operation: dict[str, Any]) -> list[Any]:
    """Bodies of the description's examples, but for streams."""
    content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
    bodies = [copy.deepcopy(example["value"]) for example in content.get("examples", {}).values()]
    return [body for body in bodies if not body.get("stream")]


def explore(document: dict[str, Any], url: str) -> set[tuple[str, int]]:
    """Which path gave which status; raises where an answer is not as described."""
    import schemathesis  # a second, which not every worker has to take when it looks for tests
    from schemathesis.generation import GenerationMode
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        response_schema_conformance,
        status_code_conformance,
    )

    checks = [no_fault_of_the_servers, status_code_conformance, content_type_conformance, response_schema_conformance]
    seen: set[tuple[str, int]] = set()

    def ask(case: Any) -> None:
        if isinstance(case.body, dict) and ("prompt" in case.body or "messages" in case.body):
            case.body["max_tokens"] = 2
        answer = case.call_and_validate(base_url=url, checks=checks, timeout=20)
        seen.add((case.operation.path, answer.status_code))

    bounds = settings(
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    for result in schemathesis.openapi.from_dict(document).exclude(path_regex=LEFT_OUT).get_all_operations():
        operation = result.ok()
        for body in described(document["paths"][operation.path][operation.method]):
            ask(operation.Case(body=body, media_type="application/json"))
        for mode in GenerationMode:
            if mode is GenerationMode.POSITIVE or operation.body:
                examples = EXAMPLES if operation.body else 1
                settings(bounds, max_examples=examples)(given(case=operation.as_strategy(generation_mode=mode))(ask))()
    return seen


async def test_whatever_is_asked_is_answered_as_described(running: Running) -> None:
    document = (await running.http.get("/openapi.json")).json()
    seen = await asyncio.to_thread(explore, document, running.url)
    assert seen >= {("/v1/completions", 200), ("/v1/completions", 400), ("/v1/chat/completions", 400)}, seen


async def test_what_is_described_where_keys_and_an_admin_listener_are(start_router: StartRouter) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    running = await start_router(
        ready=False, host="0.0.0.0", admin_port=port, api_key=("a-key-of-some-length",), secret="0123456789abcdef" * 2
    )
    public = (await running.http.get("/openapi.json")).json()
    admin = (await running.http.get(f"http://127.0.0.1:{port}/openapi.json")).json()
    assert admin["paths"].keys() - public["paths"].keys() == {
        *("/metrics", "/v1/status", "/dashboard", "/dashboard/events")
    }
    assert "security" not in admin["paths"]["/metrics"]["get"]  # this machine's own processes alone reach it
    keyed = {path for path, item in public["paths"].items() for operation in item.values() if "security" in operation}
    assert keyed >= {"/v1/models", "/tokenize"} and not keyed & {"/health", "/ready", "/version", "/nodes"}
    for path, item in public["paths"].items():
        for method, operation in item.items():
            answer = await running.http.request(method, path.replace("{name}", "x"), json={})
            assert (answer.status_code == 401) == ("security" in operation), path
            assert str(answer.status_code) in operation["responses"], (path, answer.status_code)


async def test_what_has_no_model_here_says_so(running: Running) -> None:
    for path, body in (
        ("/v1/embeddings", {"model": "tiny", "input": "the fox"}),
        ("/embeddings", {"input": "the fox"}),
        ("/score", {"text_1": "a", "text_2": "b"}),
        ("/v2/rerank", {"query": "a", "documents": ["b"]}),
        ("/invocations", {"input": "the fox"}),
    ):
        answer = await running.http.post(path, json=body)
        assert answer.status_code == 404 and "make text alone" in answer.json()["error"]["message"]


async def test_one_path_for_chats_and_completions(running: Running) -> None:
    short = {"max_tokens": 2}
    chat = await running.post("/invocations", messages=[{"role": "user", "content": "the fox"}], **short)
    assert chat.json()["object"] == "chat.completion"
    assert (await running.post("/invocations", prompt="the fox", **short)).json()["object"] == "text_completion"
    for body in (b"{}", b"[]", b"{", b"\xff"):
        assert (await running.http.post("/invocations", content=body)).status_code == 400


async def test_base_urls_with_a_part_too_few_or_too_many_are_told(running: Running) -> None:
    for path, told in (
        ("/chat/completions", "/v1/chat/completions: the base URL of OpenAI's clients ends in /v1"),
        ("/v1/v1/messages", "/v1/messages: leave /v1 out of the base URL"),
        ("/", "/docs lists what there is"),
    ):
        answer = await running.http.post(path, json={})
        assert answer.status_code == 404 and told in answer.json()["error"]["message"]


async def test_methods(running: Running) -> None:
    for path in ("/v1/models", "/v1/models/tiny", "/health", "/ping", "/version", "/openapi.json"):
        get, head = await running.http.get(path), await running.http.head(path)
        assert get.status_code == head.status_code == 200 and not head.content
        assert head.headers["content-length"] == str(len(get.content))
    assert (await running.http.post("/ping")).status_code == 200
    assert (await running.http.get("/nodes")).headers["allow"] == "DELETE, OPTIONS, POST"
    asked = await running.http.options("/v1/models")
    assert asked.status_code == 204 and asked.headers["allow"] == "GET, HEAD, OPTIONS"
    assert (await running.http.options("/nothing")).status_code == 404


@pytest.mark.skipif(CHROMIUM is None, reason=WHY_NOT)
async def test_the_page_in_a_browser(running: Running, tmp_path: Path) -> None:
    async with browser(tmp_path) as page:
        await page.open(running.url + "/docs")
        await page.sees("document.querySelectorAll('details.operation').length > 20")
        # In the order of the list: completions first; the second of its examples is streamed.
        await page.evaluate("document.querySelector('details.operation').open = true")
        await page.sees("document.querySelectorAll('details[open] tr').length > 30")
        await page.evaluate("var choice = document.querySelector('select'); choice.value = 'streamed'")
        await page.evaluate("choice.dispatchEvent(new Event('change')); document.querySelector('button').click()")
        shown = await page.sees("(text => text.includes('[DONE]') && text)(document.querySelector('pre').textContent)")
        assert shown.startswith("200 text/event-stream") and '"text_completion"' in shown
        assert page.errors == [] and await page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        own = (running.url + "/", "data:,")
        assert page.asked and [url for url in page.asked if not url.startswith(own)] == []
