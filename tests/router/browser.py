"""A headless Chromium of this machine, driven over its DevTools protocol: pages as operators see them."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import os
import shutil
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from websockets.asyncio.client import ClientConnection, connect

CHROMIUM = shutil.which("chromium-headless-shell")
WHY_NOT = "needs Debian's chromium-headless-shell: see tests/packages.sh"


class Page:
    """``asked``: URLs of all requests. ``errors``: what the console says that should not be there."""

    def __init__(self, connection: ClientConnection) -> None:
        self._connection = connection
        self._numbers = itertools.count(1)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self.asked: list[str] = []
        self.errors: list[str] = []
        self._reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async for text in self._connection:
            said = json.loads(text)
            if "id" in said:
                self._answers.pop(said["id"]).set_result(said)
                continue
            method, params = said["method"], said["params"]
            if method == "Network.requestWillBeSent":
                self.asked.append(params["request"]["url"])
            elif method == "Runtime.exceptionThrown":
                self.errors.append(str(params["exceptionDetails"]))
            elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
                self.errors.append(str(params["args"]))
            elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
                self.errors.append(f"{params['entry']['source']}: {params['entry']['text']}")
            elif method == "Page.javascriptDialogOpening":
                self.errors.append(f"a dialog: {params['message']}")

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        number = next(self._numbers)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        await self._connection.send(json.dumps({"id": number, "method": method, "params": params}))
        said = await asyncio.wait_for(answer, 20)
        assert "error" not in said, said
        return dict(said["result"])

    async def evaluate(self, expression: str) -> Any:
        said = await self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in said, said
        return said["result"].get("value")

    async def sees(self, expression: str, timeout_s: float = 10.0) -> Any:
        """The expression's value as soon as it is true."""
        deadline_s = time.monotonic() + timeout_s
        while not (seen := await self.evaluate(expression)):
            assert time.monotonic() < deadline_s, f"{expression}: {await self.evaluate('document.body.innerText')}"
            await asyncio.sleep(0.05)
        return seen

    async def open(self, url: str) -> None:
        await self.call("Page.navigate", url=url)
        await self.sees(f"location.href.startsWith({url!r}) && document.readyState === 'complete'")

    async def picture(self, width: int, height: int, *, dark: bool = False, scale: float = 1.0) -> bytes:
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        await self.call("Emulation.setScrollbarsHidden", hidden=True)
        await self.call("Emulation.setEmulatedMedia", features=scheme)
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=False
        )
        await asyncio.sleep(1.5)  # a frame is drawn at this width
        return base64.b64decode((await self.call("Page.captureScreenshot", format="png"))["data"])

    def close(self) -> None:
        self._reader.cancel()


@contextlib.asynccontextmanager
async def browser(profile: Path) -> AsyncIterator[Page]:
    """``profile``: an empty directory."""
    assert CHROMIUM is not None
    process = await asyncio.create_subprocess_exec(
        CHROMIUM,
        "--remote-debugging-port=0",
        f"--user-data-dir={profile}",
        "--no-sandbox",  # tests may run as root, in a container
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--no-proxy-server",
        "about:blank",
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
        start_new_session=True,  # Debian's command is a script that stays beside the browser
    )
    try:
        note = profile / "DevToolsActivePort"
        deadline_s = time.monotonic() + 20
        while not (note.exists() and note.read_text().count("\n")):
            assert process.returncode is None and time.monotonic() < deadline_s, "Chromium does not start"
            await asyncio.sleep(0.05)
        port, path = note.read_text().split("\n")[:2]
        root = f"ws://127.0.0.1:{port}"
        async with connect(root + path, proxy=None) as control:
            await control.send(json.dumps({"id": 1, "method": "Target.createTarget", "params": {"url": "about:blank"}}))
            target = json.loads(await control.recv())["result"]["targetId"]
            async with connect(f"{root}/devtools/page/{target}", max_size=None, proxy=None) as connection:
                page = Page(connection)
                for domain in ("Page", "Runtime", "Log", "Network"):
                    await page.call(f"{domain}.enable")
                try:
                    yield page
                finally:
                    page.close()
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            await process.wait()
