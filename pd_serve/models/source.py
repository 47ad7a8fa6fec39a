"""From what a user calls a model to a directory that can be served: aliases, directories, GGUF files, hub ids.

Called by every process of a node at start, several at once. Owns this part of the cache
(:func:`pd_serve.paths.cache_directory`)::

    downloads/<alias>.gguf          what came from a package
    models/<name>/<dtype>-v<n>/     a converted model, complete if it is there: it is renamed into place
    models/<name>.lock              held while one process converts and the others wait

When the model is there already this costs milliseconds, so nothing heavy is imported at the top. Must never
leave or accept a half-written directory, whatever kills the process.
"""

from __future__ import annotations

import difflib
import fcntl
import hashlib
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pd_serve.errors import ModelError
from pd_serve.paths import cache_directory

DTYPES = ("auto", "bfloat16", "float32")
LOAD_FORMATS = ("auto", "safetensors", "dummy")
CONVERSION_VERSION = 2  # raise when the conversion writes something else from the same file
_HUB_FILES = ["*.safetensors", "*.safetensors.index.json"]
_HUB_SMALL_FILES = ["config.json", "generation_config.json", "tokenizer*", "chat_template*", "special_tokens_map.json"]
_HUB_SMALL_FILES += ["additional_chat_templates/*"]
_SAMPLED_RANGES, _SAMPLE_BYTES = 16, 4096


@dataclass(frozen=True)
class ModelFiles:
    """Where a model lies and how it is to be loaded."""

    name: str  # a name to serve it under, unless the user gives another
    directory: Path
    dtype: str  # float32 or bfloat16: of weights, activations and KV
    load_format: str  # safetensors or dummy


def resolve(model: str, dtype: str = "auto", load_format: str = "auto", *, device: str = "cpu") -> ModelFiles:
    """Finds the model, downloading and converting it once where needed. Raises ``ModelError``.

    ``model``: an alias, a directory, a ``.gguf`` file, a ``config.json`` (dummy weights only) or a hub id.
    """
    if dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}.")
    if load_format not in LOAD_FORMATS:
        raise ModelError(f"load format {load_format!r} is not one of {', '.join(LOAD_FORMATS)}.")
    dtype = default_dtype(device) if dtype == "auto" else dtype
    kind = "safetensors" if load_format == "auto" else load_format
    return ModelFiles(*_find(model, dtype, kind), dtype, kind)


def default_dtype(device: str = "cpu") -> str:
    """bfloat16 on a GPU and where the CPU multiplies it natively, else float32 (it is several times faster then)."""
    if device == "cuda":
        return "bfloat16"
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8") as file:
            flags = next((line for line in file if line.startswith("flags")), "").split()
    except OSError:
        return "float32"
    return "bfloat16" if "avx512_bf16" in flags or "amx_bf16" in flags else "float32"


def _find(model: str, dtype: str, load_format: str) -> tuple[str, Path]:
    """A name and a directory."""
    from pd_serve.models.alias import ALIASES

    if model in ALIASES:
        return model, _converted(model, dtype, None)
    path = Path(model).expanduser()
    if path.is_dir():
        return path.resolve().name, _checked(path, load_format)
    if path.is_file():
        if path.suffix == ".gguf":
            return path.stem, _converted(f"{path.stem}-{_content_id(path)}", dtype, path)
        if path.name == "config.json" and load_format == "dummy":
            return path.resolve().parent.name, _checked(path.parent, load_format)
        raise ModelError(f"{model} is neither a model directory nor a .gguf file.")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", model) and not model.startswith((".", "/")) and path.suffix != ".gguf":
        return model, _from_hub(model, load_format)
    close = difflib.get_close_matches(model, [*ALIASES], n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    raise ModelError(
        f"There is no model {model!r}{hint}: give one of {', '.join(ALIASES)}, a HuggingFace directory, a .gguf file "
        "that exists, or a hub id such as organisation/name."
    )


def _checked(directory: Path, load_format: str) -> Path:
    """The directory, if it holds what the load format needs."""
    if not (directory / "config.json").exists():
        held = sorted(path.name for path in directory.glob("*.gguf"))
        hint = f" It holds {held[0]}: give that file." if held else ""
        raise ModelError(f"{directory} has no config.json, so it is no HuggingFace model directory.{hint}")
    if load_format != "dummy" and not any(directory.glob("*.safetensors")):
        raise ModelError(
            f"{directory} holds no *.safetensors. Save the model with save_pretrained (safetensors), or use "
            "--load-format dummy for random weights."
        )
    return directory.resolve()


def _converted(name: str, dtype: str, gguf: Path | None) -> Path:
    """The converted model's directory in the cache; ``gguf`` None: the alias's file is obtained first."""
    cache = cache_directory()
    directory = cache / "models" / name / f"{dtype}-v{CONVERSION_VERSION}"
    if directory.is_dir():
        return directory
    from pd_serve.models.alias import ALIASES, obtain_gguf
    from pd_serve.models.progress import bar

    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with _lock(cache / "models" / f"{name}.lock", name):
            if directory.is_dir():  # another process was faster
                return directory
            with _scratch(directory.with_name(f"{directory.name}.partial")) as partial:
                generation: dict[str, float] = {}
                if gguf is None:
                    generation = ALIASES[name].generation
                    gguf = cache / "downloads" / f"{name}.gguf"
                    if not gguf.exists():
                        gguf.parent.mkdir(parents=True, exist_ok=True)
                        with _scratch(gguf.with_suffix(".partial")) as download:
                            obtain_gguf(name, gguf, download)
                from pd_serve.models.gguf import convert

                with bar(f"converting {name} to {dtype}") as update:
                    convert(gguf, partial, dtype, update, generation)
                partial.rename(directory)
    except OSError as error:
        raise ModelError(f"{name} cannot be written to the cache {cache}: {error}. Set PD_SERVE_CACHE.") from error
    return directory


@contextmanager
def _lock(path: Path, name: str) -> Iterator[None]:
    """One process at a time; the kernel lets go of it when its holder dies."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            from pd_serve.models.progress import say

            say(f"waiting for another process that prepares {name} ...")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _scratch(path: Path) -> Iterator[Path]:
    """An empty folder that is gone afterwards, unless it was renamed; what a killed process left is cleared."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _content_id(path: Path) -> str:
    """8 hex digits of what a large file holds: its size and sampled ranges (a moved file stays converted)."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for i in range(_SAMPLED_RANGES):
            file.seek(size * i // _SAMPLED_RANGES)
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:8]


def _from_hub(model: str, load_format: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ModelError(
            f"{model} looks like a hub id, but huggingface_hub is not installed: pip install huggingface_hub, or "
            "give a local directory."
        ) from None
    patterns = _HUB_SMALL_FILES + ([] if load_format == "dummy" else _HUB_FILES)
    try:
        directory = Path(snapshot_download(model, allow_patterns=patterns))
    except Exception as error:  # the hub's client raises its own, httpx's and requests' errors alike
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ModelError(
            f"{model} could not be fetched from the hub: {reason}. If the name is right and the hub cannot be reached "
            "from here, copy the model's directory here and give its path."
        ) from None
    return _checked(directory, load_format)
