"""The command line as a process: what it prints, how fast, and how it says no."""

from __future__ import annotations

import importlib.util
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pd_serve import __version__, cli, config, preflight
from pd_serve.errors import ConfigError, ModelError
from pd_serve.models.source import resolve
from pd_serve.paths import cache_directory
from tests import nursery


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environ = {name: value for name, value in os.environ.items() if not name.startswith(config.PREFIX)}
    return nursery.run("pd_serve.cli", arguments, environ | {"COLUMNS": "200", "NO_COLOR": "1"} | variables)


def test_version_is_printed_at_once() -> None:
    """In less CPU time than what the commands behind it import takes, by far."""
    subprocess.run([sys.executable, "-m", "pd_serve.cli", "version"], capture_output=True)  # warms the file cache

    def cpu_s(*arguments: str, tries: int = 1) -> float:
        times_s = []
        for _ in range(tries):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            answer = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=60)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            times_s.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
            assert answer.returncode == 0 and answer.stdout == f"pd-serve {__version__}\n" * ("version" in arguments)
        return min(times_s)

    assert cpu_s("-m", "pd_serve.cli", "version", tries=3) < 0.8 * cpu_s("-c", "import torch")


@pytest.mark.parametrize("command", config.COMMANDS)
def test_help_names_every_setting(command: str) -> None:
    answer = run(*command.split(), "--help")
    assert answer.returncode == 0, answer.stderr
    for setting in config.settings(command):
        assert re.search(rf"{setting.flag}\b", answer.stdout), setting.flag
        assert all(word in answer.stdout for word in re.findall(r"\[\w+", setting.help)), setting.help
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
        (
            ("decode", "--device", "cpu", "--weight-offload", "uva"),
            "pd-serve: --weight-offload uva: engines compute on",
        ),
        (("decode", "--model", "/nowhere"), "pd-serve: There is no model '/nowhere'"),
    ],
)
def test_mistakes_are_one_line(arguments: tuple[str, ...], message: str) -> None:
    answer = run(*arguments)
    assert answer.returncode == 2
    assert message in answer.stderr
    assert answer.stderr.count("\n") == 1, answer.stderr


def test_the_version_help_and_completion_are_where_people_look() -> None:
    runner = CliRunner()
    assert runner.invoke(cli.app, ["--version"]).output == f"pd-serve {__version__}\n"
    assert "--install-completion" in runner.invoke(cli.app, ["-h"]).output
    assert runner.invoke(cli.app, ["bench", "serve", "-h"]).exit_code == 0


def test_paragraphs_of_the_help_are_broken_by_the_terminal_alone() -> None:
    text = cli._paragraphs("    an example\n\nOne sentence that\ngoes on.\n\nAnother.")
    assert text == "    an example\n\nOne sentence that goes on.\n\nAnother."
    assert "a note, or a problem with what to do" in run("doctor", "-h").stdout


def test_flags_can_be_turned_off_and_the_help_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, object]] = []

    def load(_name: str, flags: dict[str, object], **_: object) -> None:
        seen.append(dict(flags))
        raise SystemExit

    monkeypatch.setattr(config, "load", load)
    CliRunner().invoke(cli.app, ["decode", "--no-checksums", "--enable-sleep-mode"])
    (flags,) = seen
    assert (flags["checksums"], flags["enable_sleep_mode"], flags["pin_memory"]) == (False, True, None)
    assert not any(name.startswith("no_") for name in flags)
    assert "--no-checksums turns it off" in " ".join(run("decode", "-h").stdout.split())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"kv_cache_memory": "4000TiB"}, "2 nodes with 4000TiB each would need 8000TiB"),
        ({"secret_file": "/nowhere"}, "secret_file: cannot read /nowhere"),
        ({"transport": "ucx"}, r"--transport ucx needs ucxx, .*pd-serve\[ucx\]"),
        ({"weight_offload_size": "8GiB"}, "--weight-offload-size is given without --weight-offload: add uva or"),
        ({"weight_offload_params": "experts", "device": "cuda"}, "--weight-offload-params is given without"),
        ({"weight_offload": "uva", "weight_offload_size": "1layer", "device": "cpu"}, "compute on the CPU here"),
        ({"weight_offload": "prefetch", "device": "cuda"}, "prefetch needs --weight-offload-size, such as 8GiB, 30%"),
        (
            {"weight_offload": "uva", "weight_offload_size": "8GiB", "pin_memory": "false", "device": "cuda"},
            "uva needs host memory that GPUs can read, and --no-pin-memory forbids",
        ),
        (
            {"weight_offload": "uva", "weight_offload_size": "4000TiB", "tp": "2", "device": "cuda"},
            "4 GPUs would need 16000TiB of the host",
        ),
    ],
)
def test_what_cannot_work_is_said_before_anything_starts(
    flags: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(ConfigError, match=message):
        preflight.check(config.load("up", flags, environ={}), nodes=2)


def test_a_model_that_is_not_there_names_the_nearest() -> None:
    with pytest.raises(ModelError, match="did you mean smollm2-135m"):
        resolve("smolm2-135m")


def test_logs_have_a_date_and_a_zone() -> None:
    code = "from pd_serve import logs; import logging; logs.configure('info', 'x', access_log=False); "
    code += "logging.getLogger('pd_serve.access').info('no'); logging.info('yes')"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}[+-]\d\d:\d\d INFO x root: yes\n", answer.stderr)


def test_the_cache_follows_its_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PD_SERVE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_directory() == Path.home() / ".cache" / "pd-serve"
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_directory() == Path("/xdg/pd-serve")
    monkeypatch.setenv("PD_SERVE_CACHE", "/ours")
    assert cache_directory() == Path("/ours")


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


def test_items_of_a_list_may_come_a_flag_each() -> None:
    said = run("decode", "--router", "nonsense", "--router", "http://127.0.0.1:1").stderr
    assert "--router" in said and "nonsense" in said  # the first is not forgotten for the last
