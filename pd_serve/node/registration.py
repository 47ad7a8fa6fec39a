"""Telling routers that this node is there, for as long as it is.

One task a router. A router that restarts has forgotten its nodes, so registering is repeated; when a
link breaks, at once.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import sys
from collections.abc import Callable, Sequence

from pd_serve.trust import client_tls
from pd_serve.wire.registration import NONCE_HEADER, PROOF_HEADER, order_proof

sys.modules.setdefault("httpx._main", None)  # type: ignore[arg-type]  # its command line, a third of its import (0.28)

import httpx  # noqa: E402

log = logging.getLogger(__name__)

REPEAT_S = 5.0  # to routers that took the registration and have not linked to this node
LINKED_REPEAT_S = 15.0  # with a link for each router: nothing is amiss, and the end of a link is heard of at once
RETRY_S = (0.2, 0.5, 1.0, 2.0)  # the last one for ever
_LEAVE_TIMEOUT_S = 1.0  # a router that is not told sees the link end


class Registration:
    """Registers ``advertise_url`` with every router until ``leave``. ``lost``: set when a link has ended.

    ``linked``: how many links there are.
    ``secret``: proved to routers; empty: none. ``ssl_ca``: what https routers are verified against. ``timeout_s``: of
    each try.
    """

    def __init__(
        self,
        routers: Sequence[str],
        advertise_url: str,
        lost: asyncio.Event,
        linked: Callable[[], int],
        *,
        timeout_s: float,
        secret: bytes = b"",
        ssl_ca: str = "",
    ) -> None:
        self._instance = secrets.token_hex(8)
        self._secret = secret
        self._routers = routers
        self._url = advertise_url
        self._lost = lost
        self._linked = linked
        secure = any(router.startswith("https:") for router in routers)
        # Without https nothing is verified, and reading a machine's certificates takes 20 ms.
        verify = client_tls(ssl_ca) if secure else False
        self._timeout_s = timeout_s
        self._client = httpx.AsyncClient(trust_env=False, verify=verify)
        self._wakers = [asyncio.Event() for _ in routers]
        self._tasks = [
            asyncio.create_task(self._keep(router, waker)) for router, waker in zip(routers, self._wakers, strict=True)
        ]
        self._tasks.append(asyncio.create_task(self._watch_links()))

    async def _watch_links(self) -> None:
        while True:
            await self._lost.wait()
            self._lost.clear()
            for waker in self._wakers:
                waker.set()

    async def _keep(self, router: str, waker: asyncio.Event) -> None:
        failures = 0
        while True:
            problem = await self._register(router)
            if problem is None:
                if failures:
                    log.info("router %s is back", router)
                failures = 0
                delay_s = LINKED_REPEAT_S if self._linked() >= len(self._routers) else REPEAT_S
            else:
                delay_s = RETRY_S[min(failures, len(RETRY_S) - 1)]
                failures += 1
                if failures == 3:  # a router that starts together with its nodes is not worth a warning
                    log.warning("cannot register with router %s (%s); trying on", router, problem)
            try:
                await asyncio.wait_for(waker.wait(), delay_s)
            except TimeoutError:
                pass
            else:
                waker.clear()
                await asyncio.sleep(RETRY_S[0])  # whatever broke the link may take a moment

    async def _register(self, router: str) -> str | None:
        """None, or what went wrong."""
        try:
            response = await self._order("POST", router, self._timeout_s)
        except httpx.RemoteProtocolError as error:
            return f"{error}: if that port speaks TLS, --router must begin with https"
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            return str(error) or type(error).__name__
        if response.is_success:
            return None
        return _what_it_says(response)

    async def _order(self, method: str, router: str, timeout_s: float) -> httpx.Response:
        """Proves the secret where the router asks for that."""
        body = {"url": self._url, "instance": self._instance}
        headers: dict[str, str] = {}
        for _ in range(2):
            response = await self._client.request(
                method, f"{router}/nodes", json=body, headers=headers, timeout=timeout_s
            )
            nonce = response.headers.get(NONCE_HEADER, "")
            if response.status_code != 401 or not nonce or not self._secret:
                break
            headers = {NONCE_HEADER: nonce, PROOF_HEADER: order_proof(self._secret, method, nonce, self._url)}
        return response

    def stop(self) -> None:
        """Registers no more; links stay. A node that drains takes nothing new."""
        for task in self._tasks:
            task.cancel()

    async def leave(self) -> None:
        """Stops registering and says good-bye, without waiting long for a router that does not listen."""
        self.stop()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*map(self._deregister, self._routers))
        await self._client.aclose()

    async def _deregister(self, router: str) -> None:
        try:
            await self._order("DELETE", router, _LEAVE_TIMEOUT_S)
        except httpx.HTTPError as error:
            # one that has ended before its nodes knows nobody any more
            level = logging.DEBUG if isinstance(error, httpx.ConnectError) else logging.INFO
            log.log(level, "could not deregister from router %s (%s)", router, error)


def _what_it_says(response: httpx.Response) -> str:
    """A router's own words, or what else answered there."""
    try:
        return str(response.json()["error"]["message"])[:400]
    except (ValueError, KeyError, TypeError):
        return f"HTTP {response.status_code}: {response.text[:200]}"
