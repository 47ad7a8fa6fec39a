"""deploy/docker without an engine for containers.

The router runs on the packages of its image, the Dockerfile is complete and pinned, and containers are given the time
that they need to end. hadolint is part of ``make lint``; ``deploy/docker/try.sh`` builds and starts the images.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import Distribution, distribution
from pathlib import Path

import httpx
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from pd_serve.config import RouterConfig
from pd_serve.router import main
from tests.collector import Collector
from tests.ports import free_port
from tests.router.conftest import until
from tests.router.scripted_node import Fabric, ScriptedNode

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "deploy/docker"
HEALTHCHECK = DOCKER / "healthcheck.py"
# Required by tokenizers, which imports it only where something is downloaded.
LEFT_OUT = {"huggingface-hub"}


def _names(path: Path) -> list[str]:
    lines = (line.split("#")[0].strip() for line in path.read_text().splitlines())
    return [line for line in lines if line]


ROUTER = _names(DOCKER / "router.txt")


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with what the router's image has installed, and nothing else."""
    directory = tmp_path_factory.mktemp("image")
    for name in ROUTER:
        found = distribution(name)
        for top in {file.parts[0] for file in found.files or () if file.parts[0] not in ("..", "__pycache__")}:
            link = directory / top
            if not link.exists():
                link.symlink_to(Path(str(found.locate_file(top))))
    (directory / "pd_serve").symlink_to(ROOT / "pd_serve")
    return directory


def _environ(image: Path, **variables: str) -> dict[str, str]:
    return {"PATH": os.environ["PATH"], "PYTHONPATH": str(image), "PYTHONDONTWRITEBYTECODE": "1", **variables}


async def _checked(port: int, path: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environ = {"PATH": os.environ["PATH"], "PD_SERVE_PORT": str(port), **variables}
    command = [sys.executable, "-S", str(HEALTHCHECK), path]
    return await asyncio.to_thread(
        subprocess.run, command, env=environ, capture_output=True, text=True, timeout=20, check=False
    )


async def test_the_router_serves_on_its_image_packages_alone(image: Path, tmp_path: Path) -> None:
    fabric = Fabric()
    secret = "a secret of the test's own"
    nodes = [await ScriptedNode(fabric, role, secret=secret).start() for role in ("prefill", "decode")]
    (tmp_path / "secret").write_text(secret)
    (tmp_path / "secret").chmod(0o600)
    (tmp_path / "config.yaml").write_text("\n".join(f"{node.role}: {node.url}" for node in nodes))
    port = free_port()
    variables = {"PD_SERVE_PORT": str(port), "PD_SERVE_SECRET_FILE": str(tmp_path / "secret")}
    command = [sys.executable, "-S", "-m", "pd_serve.cli", "router", "--config", str(tmp_path / "config.yaml")]
    collector = Collector()
    command += ["--otlp-traces-endpoint", collector.endpoint]
    process = subprocess.Popen(command, env=_environ(image, **variables), stderr=subprocess.PIPE, cwd=tmp_path)
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=20) as http:

            async def ready() -> bool:
                assert process.poll() is None, process.communicate()[1].decode()
                try:
                    return (await http.get("/ready")).status_code == 200
                except httpx.TransportError:
                    return False

            await until(ready, "the router is ready", 30)
            for path in ("/health", "/ready"):
                assert (await _checked(port, path)).returncode == 0
            # The chat template, metrics and streams import what nothing else does.
            chat = {"model": "tiny", "messages": [{"role": "user", "content": "the fox"}], "max_tokens": 4}
            answer = await http.post("/v1/chat/completions", json=chat)
            assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 4, answer.text
            streamed = await http.post("/v1/chat/completions", json=chat | {"stream": True})
            assert streamed.text.rstrip().endswith("data: [DONE]")
            assert "pd_serve_" in (await http.get("/metrics")).text
        process.send_signal(signal.SIGTERM)
        said = (await asyncio.to_thread(process.communicate, timeout=20))[1].decode()
        assert process.returncode == 0 and "Traceback" not in said, said
        assert any(span.name == "POST /v1/chat/completions" for span in collector.spans)
    finally:
        collector.close()
        process.kill()
        process.wait()
        for node in nodes:
            await node.stop()


def test_every_module_of_the_router_finds_its_imports(image: Path) -> None:
    """Those of functions too, which run only when somebody asks for them (a Kubernetes API, TLS)."""
    code = """
import ast, importlib.util, pathlib, sys
import pd_serve
package = pathlib.Path(pd_serve.__file__).parent
files = [path for room in ("router", "api", "wire") for path in (package / room).rglob("*.py")]
files += [path for path in package.glob("*.py") if path.name != "jit.py"]  # nodes' alone
names = set()
for path in files:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
print(*sorted(name for name in names if importlib.util.find_spec(name) is None))
print(*sorted(name for name in ("torch", "numpy", "transformers") if importlib.util.find_spec(name)))
"""
    command = [sys.executable, "-S", "-c", code]
    said = subprocess.run(command, env=_environ(image), capture_output=True, text=True, timeout=60, check=True).stdout
    missing, heavy = said.split("\n")[:2]
    assert missing.split() == [] and heavy.split() == []


def _needed(found: Distribution) -> Iterator[str]:
    for line in found.requires or ():
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield canonicalize_name(requirement.name)


def test_the_list_of_packages_is_complete_and_pinned() -> None:
    pinned = {line.split("==")[0] for line in _names(ROOT / "constraints.txt")}
    needed = {name for package in ROUTER for name in _needed(distribution(package))}
    assert needed - LEFT_OUT <= set(ROUTER)
    assert set(ROUTER) <= pinned
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *extras["structured"], *extras["otel"]]
    declared = {canonicalize_name(Requirement(line).name) for line in lines}
    assert set(ROUTER) <= declared | needed, "it has what nobody asks for"
    assert sorted(ROUTER) == ROUTER


def test_what_is_pinned_is_what_the_project_asks_for() -> None:
    """Else an extra cannot be installed: pip refuses a version that is pinned outside the range."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = dict(line.split("==") for line in _names(ROOT / "constraints.txt"))
    extras = [line for extra in project["optional-dependencies"].values() for line in extra]
    asked = [Requirement(line) for line in [*project["dependencies"], *extras]]
    names = {canonicalize_name(one.name) for one in asked} - {"pd-serve"}
    assert names <= set(pinned)
    wrong = [
        str(one) for one in asked if one.name != "pd-serve" and pinned[canonicalize_name(one.name)] not in one.specifier
    ]
    assert wrong == []


def test_nothing_heavy_or_secret_is_sent_to_the_builder() -> None:
    lines = _names(ROOT / ".dockerignore")
    assert lines[0] == "*"
    sent = {line[1:] for line in lines if line.startswith("!")}
    copied = re.findall(r"^COPY (?:--chmod=\d+ )?(?!--from)(.+) \S+$", (DOCKER / "Dockerfile").read_text(), re.M)
    for name in {name for line in copied for name in line.split()} - {"."}:
        assert (ROOT / name).exists() and any(Path(name).is_relative_to(allowed) for allowed in sent), name


def test_images_do_not_run_as_root() -> None:
    stages = re.split(r"^FROM ", (DOCKER / "Dockerfile").read_text(), flags=re.M)[1:]
    final = {stage.split()[2]: stage for stage in stages if stage.split()[2] in ("router", "cpu", "cuda")}
    assert set(final) == {"router", "cpu", "cuda"}
    for stage in final.values():
        assert re.findall(r"^USER (\S+)$", stage, re.M) == ["10001:10001"]
        assert "HEALTHCHECK" in stage and "org.opencontainers.image.version" in stage


def _seconds(text: str) -> float:
    return float(text.removesuffix("s"))


def test_compose_gives_each_service_longer_than_its_drain() -> None:
    services = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
    assert set(services) == {"router", "prefill", "decode"}
    settings = RouterConfig()
    for name, service in services.items():
        assert not any("DRAIN" in variable for variable in service["environment"]), "the defaults are checked here"
        longest_s = settings.drain_timeout_s + settings.drain_delay_s + main._GRACE_S
        assert _seconds(service["stop_grace_period"]) >= longest_s + 10, name
        assert service["environment"]["PD_SERVE_SECRET_FILE"] == f"/run/secrets/{service['secrets'][0]}"
    # The router is stopped first: its streams run out on nodes that are still there.
    assert set(services["router"]["depends_on"]) == {"prefill", "decode"}


async def test_the_health_check_fails_where_nothing_or_an_error_answers() -> None:
    nothing = await _checked(free_port(), "/health")
    assert nothing.returncode == 1 and "refused" in nothing.stderr

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 8\r\n\r\nstarting")
        writer.close()

    server = await asyncio.start_server(refuse, "127.0.0.1", 0)
    async with server:
        answer = await _checked(server.sockets[0].getsockname()[1], "/ready")
    assert answer.returncode == 1 and "503 starting" in answer.stderr
