"""The command line as a process: what it prints, how fast, and how it says no."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from pd_serve import __version__, config


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environ = {name: value for name, value in os.environ.items() if not name.startswith(config.PREFIX)}
    return subprocess.run(
        [sys.executable, "-m", "pd_serve.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=30,
        env=environ | {"COLUMNS": "200", "NO_COLOR": "1"} | variables,
        check=False,
    )


def test_version_is_printed_at_once() -> None:
    run("version")  # byte-compiles, warms the file cache
    times_s = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        answer = run("version")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times_s.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert (answer.returncode, answer.stdout) == (0, f"pd-serve {__version__}\n")
    assert min(times_s) < 0.3, times_s  # of a core, so that whatever else runs does not count


@pytest.mark.parametrize("command", config.COMMANDS)
def test_help_names_every_setting(command: str) -> None:
    answer = run(*command.split(), "--help")
    assert answer.returncode == 0, answer.stderr
    for setting in config.settings(command):
        assert re.search(rf"{setting.flag}\b", answer.stdout), setting.flag
    assert f"pd-serve {command}" in answer.stdout  # an example
    assert "--config" in answer.stdout and "PD_SERVE_" in answer.stdout


def test_help_of_the_whole() -> None:
    answer = run("--help")
    for command in ["up", "prefill", "decode", "router", "bench", "doctor", "version"]:
        assert f" {command} " in answer.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("decode", "--port", "no"), "pd-serve: --port must be a whole number from 0 to 65535, not 'no'\n"),
        (("up", "--kv-cache-memory", "1 cat"), "pd-serve: --kv-cache-memory must be a size like"),
        (("router", "--config", "/nowhere.yaml"), "pd-serve: cannot read the configuration file /nowhere.yaml"),
        (("decode", "--model", "/nowhere"), "pd-serve: There is no model '/nowhere'"),
    ],
)
def test_mistakes_are_one_line(arguments: tuple[str, ...], message: str) -> None:
    answer = run(*arguments)
    assert answer.returncode == 2
    assert message in answer.stderr
    assert answer.stderr.count("\n") == 1, answer.stderr


def test_an_unknown_flag_names_the_nearest() -> None:
    answer = run("up", "--dtyp", "float32")
    assert answer.returncode == 2
    assert "--dtype" in answer.stderr
    assert "Traceback" not in answer.stderr


def test_an_unknown_variable_names_the_nearest() -> None:
    answer = run("router", PD_SERVE_PROT="1")
    assert answer.returncode == 2
    assert "PD_SERVE_PORT" in answer.stderr


def test_a_flag_wins_over_a_variable_over_a_file(tmp_path: Path) -> None:
    file = tmp_path / "node.yaml"
    file.write_text("model: /from-file\n")
    assert "'/from-file'" in run("decode", "--config", str(file)).stderr
    assert "'/from-variable'" in run("decode", "--config", str(file), PD_SERVE_MODEL="/from-variable").stderr
    flags = ("decode", "--config", str(file), "--model", "/from-flag")
    assert "'/from-flag'" in run(*flags, PD_SERVE_MODEL="/from-variable").stderr


@pytest.mark.parametrize("module", ["pd_serve.cli", "pd_serve.config", "pd_serve.node.server", "pd_serve.up"])
def test_processes_without_an_engine_import_no_torch(module: str) -> None:
    code = f"import {module}, sys; print(*{{'torch', 'transformers', 'numba'}} & set(sys.modules))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    assert answer.stdout == "\n"
