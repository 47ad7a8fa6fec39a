"""Nodes that somebody else lists: the addresses in a file, or the endpoints of a Kubernetes service.

Each list is followed for as long as the router runs; it tells ``found`` all addresses whenever they change, and which
of them are about to leave. What cannot be read leaves the last list as it was, with a warning. Only addresses come from
here: whether a node may be linked to, its proof of the secret says.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, urlsplit

from pd_serve.errors import ConfigError
from pd_serve.net import netloc
from pd_serve.router.backends.base import Place

log = logging.getLogger(__name__)

Found = Callable[[dict[str, bool]], None]  # by URL: whether it is about to leave

_POLL_S = 1.0
_WATCH_S = 240.0  # API servers end a watch after 5 to 10 minutes
_PAUSE_S = (1.0, 30.0)  # after a failure; doubled each time
_BREATH_S = 0.2  # between two watches: a server may end each at once
_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_GONE = 410
_BACKEND, _ROLE = "pd-serve/backend", "pd-serve/role"  # labels of services of other engines' servers


def check(where: str) -> None:
    """Raises ConfigError for a list that cannot be read from here."""
    if where.startswith("k8s:"):
        Api.in_cluster()


async def follow(where: str, found: Found) -> None:
    """``where``: ``file://PATH``, or ``k8s://NAMESPACE/SELECTOR``. Never returns; raises ConfigError."""
    parts = urlsplit(where)
    if parts.scheme == "file":
        await follow_file(Path(parts.path), found)
    else:
        await EndpointSlices(parts.netloc, parts.path.removeprefix("/"), Api.in_cluster()).follow(found)


# --- a file


async def follow_file(path: Path, found: Found) -> None:
    """One URL a line, and of another engine's server what it is; what follows a # is a remark. The file may be written
    anew or replaced at any time."""
    before, complaint = _Mark(0, 0, 0), ""
    while True:
        try:
            if (now := _mark(path)) != before:
                urls = _read(path)
                before, complaint = now, ""
                found(dict.fromkeys(urls, False))
        except (OSError, UnicodeDecodeError) as error:
            if str(error) != complaint:
                complaint = str(error)
                log.warning("cannot read the list of nodes (%s): the last one holds", error)
        await asyncio.sleep(_POLL_S)


class _Mark(NamedTuple):
    """A file as it was: another one differs."""

    changed_ns: int
    size_bytes: int
    inode: int


def _mark(path: Path) -> _Mark:
    stat = path.stat()
    return _Mark(stat.st_mtime_ns, stat.st_size, stat.st_ino)


def _read(path: Path) -> list[str]:
    urls = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        given = line.partition("#")[0].strip()
        if given:
            try:
                urls.append(str(Place.parse(given)))
            except ValueError as error:
                log.warning("%s, line %d: a node's address %s", path, number, error)
    return urls


# --- Kubernetes


class Api:
    """How a Kubernetes API server is asked. ``token``: a file that is read each time, because it is replaced."""

    def __init__(self, url: str, token: Path | None = None, authority: Path | None = None) -> None:
        self.url = url
        self._token = token
        self._authority = authority

    @classmethod
    def in_cluster(cls) -> Api:
        """That of the pod that this process runs in. Raises ConfigError."""
        host, port = os.environ.get("KUBERNETES_SERVICE_HOST"), os.environ.get("KUBERNETES_SERVICE_PORT", "443")
        if not host or not (_ACCOUNT / "token").exists():
            raise ConfigError(
                "--discover k8s:// works in a pod with a service account that may list and watch endpointslices: here "
                f"is no KUBERNETES_SERVICE_HOST, or no {_ACCOUNT / 'token'}"
            )
        return cls(f"https://{netloc(host, int(port))}", _ACCOUNT / "token", _ACCOUNT / "ca.crt")

    async def lines(self, path: str, **query: str) -> AsyncIterator[bytes]:
        """The answer, line by line as they come. Raises OSError, and Expired."""
        import ssl

        import httpx  # 0.1 s that other routers need not pay

        verify = ssl.create_default_context(cafile=str(self._authority)) if self._authority is not None else True
        headers = {"Authorization": f"Bearer {self._token.read_text().strip()}"} if self._token is not None else {}
        timeout = httpx.Timeout(10.0, read=_WATCH_S + 30)
        try:
            async with (
                httpx.AsyncClient(trust_env=False, verify=verify, timeout=timeout) as client,
                client.stream("GET", self.url + path, params=query, headers=headers) as answer,
            ):
                if answer.status_code == _GONE:
                    raise Expired
                if answer.status_code != 200:
                    said = (await answer.aread())[:300].decode(errors="replace")
                    raise OSError(f"the API server answers {answer.status_code} to {path}: {said}")
                async for line in answer.aiter_lines():
                    yield line.encode()
        except httpx.HTTPError as error:
            raise OSError(f"{self.url}: {str(error) or type(error).__name__}") from error


class Expired(Exception):
    """What a watch should go on from is no longer known: list again."""


class EndpointSlices:
    """The endpoints of all slices that ``selector`` matches, by the port called http or https, or the only one."""

    def __init__(self, namespace: str, selector: str, api: Api) -> None:
        self._path = f"/apis/discovery.k8s.io/v1/namespaces/{quote(namespace, safe='')}/endpointslices"
        self._selector = selector
        self._api = api
        self._slices: dict[str, dict[str, Any]] = {}  # by name
        self._told: dict[str, bool] | None = None

    async def follow(self, found: Found) -> None:
        version, pause_s = "", _PAUSE_S[0]
        while True:
            try:
                if not version:
                    version = await self._list()
                    self._tell(found)
                version = await self._watch(version, found)
                pause_s = _PAUSE_S[0]
                await asyncio.sleep(_BREATH_S)
            except Expired:
                version = ""
                await asyncio.sleep(_BREATH_S)
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                log.warning("cannot follow the endpoints of %s (%s): the last list holds", self._selector, error)
                version = ""
                await asyncio.sleep(pause_s * random.uniform(0.8, 1.2))
                pause_s = min(2 * pause_s, _PAUSE_S[1])

    async def _list(self) -> str:
        """From what on to watch."""
        lines = [line async for line in self._api.lines(self._path, labelSelector=self._selector)]
        document = json.loads(b"\n".join(lines))
        self._slices = {item["metadata"]["name"]: item for item in document.get("items") or ()}
        return str(document["metadata"]["resourceVersion"])

    async def _watch(self, version: str, found: Found) -> str:
        """Until the server ends it; from what on to go on. Raises Expired."""
        query = {"labelSelector": self._selector, "watch": "1", "resourceVersion": version}
        query |= {"allowWatchBookmarks": "true", "timeoutSeconds": f"{_WATCH_S:.0f}"}
        async for line in self._api.lines(self._path, **query):
            if not line.strip():
                continue
            event = json.loads(line)
            kind, item = event["type"], event["object"]
            if kind == "ERROR":
                if item.get("code") == _GONE:
                    raise Expired
                raise OSError(f"the watch ended: {item.get('message') or item}")
            version = str(item["metadata"]["resourceVersion"])
            if kind in ("ADDED", "MODIFIED"):
                self._slices[item["metadata"]["name"]] = item
            elif kind == "DELETED":
                self._slices.pop(item["metadata"]["name"], None)
            self._tell(found)
        return version

    def _tell(self, found: Found) -> None:
        known = self._told or {}
        urls: dict[str, bool] = {}
        for item in self._slices.values():
            for url, ready, leaving in endpoints(item):
                if ready or leaving or url in known:  # one that is not ready any more its link is the better judge of
                    urls[url] = leaving and urls.get(url, True)
        if urls != self._told:
            self._told = urls
            found(urls)


def endpoints(item: dict[str, Any]) -> list[tuple[str, bool, bool]]:
    """Node (as a file's line has it), whether it is ready, and whether it is about to end, of each endpoint of an
    EndpointSlice."""
    ports = item.get("ports") or []
    named = [port for port in ports if port.get("name") in ("http", "https")] or (ports if len(ports) == 1 else [])
    if not named or not named[0].get("port"):
        return []
    port = named[0]
    labels = (item.get("metadata") or {}).get("labels") or {}  # a service's are its slices', too
    engine = " ".join(found for name in (_BACKEND, _ROLE) if (found := labels.get(name)))
    scheme = "https" if "https" in (port.get("name"), port.get("appProtocol")) else "http"
    found = []
    for endpoint in item.get("endpoints") or []:
        conditions = endpoint.get("conditions") or {}
        leaving = bool(conditions.get("terminating"))
        ready = conditions.get("ready") is not False and not leaving
        for address in (endpoint.get("addresses") or [])[:1]:  # clients are to use the first
            if scheme == "https":
                address = _name(endpoint, item) or address
            url = f"{scheme}://{netloc(address, port['port'])}"
            found.append((str(Place.parse(f"{url} {engine}")), ready, leaving))
    return found


def _name(endpoint: dict[str, Any], item: dict[str, Any]) -> str:
    """Of a pod in the cluster's DNS, where it has one (a StatefulSet's): certificates are for names, not addresses."""
    about = item.get("metadata") or {}
    service = (about.get("labels") or {}).get("kubernetes.io/service-name")
    host, namespace = endpoint.get("hostname"), about.get("namespace")
    return f"{host}.{service}.{namespace}.svc" if host and service and namespace else ""
