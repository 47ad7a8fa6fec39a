"""Every setting of pd-serve, once: its type, default, unit and reason.

A command's settings are the fields of one dataclass. A value comes from the command line, else from the
environment (``PD_SERVE_<NAME>``), else from the file given with ``--config``, else from the default here.
Flags, variables, file keys and docs/configuration.md are all derived from the field.

The command line calls ``load``; every process gets its settings from here, so nothing heavy is imported.
``python -m pd_serve.config [--check] FILE`` writes or checks the documentation.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pd_serve import values
from pd_serve.errors import ConfigError
from pd_serve.values import Kind, choice, decimal, integer

PREFIX = "PD_SERVE_"
CONFIG_VARIABLE = PREFIX + "CONFIG"
# Read where it is used, and by whatever process comes first: a variable only.
CACHE_VARIABLE = PREFIX + "CACHE"
# The order of --help and of the documentation.
GROUPS = (
    "Model",
    "Nodes",
    "Network",
    "API",
    "Requests",
    "KV cache",
    "KV transfer",
    "Scheduling",
    "Device",
    "Processes",
)


def _setting(
    default: object, kind: Kind, group: str, help: str, *, unit: str = "", reason: str = "", only: str = ""
) -> Any:
    """A field with what the command line and the documentation need to know about it.

    ``reason``: why the default is what it is. ``only``: the one node role that has this setting.
    """
    return field(
        default=default,
        metadata={"kind": kind, "group": group, "help": help, "unit": unit, "reason": reason, "only": only},
    )


@dataclass(frozen=True, kw_only=True)
class Common:
    host: str = _setting("127.0.0.1", values.TEXT, "Network", "Address to listen on.")
    log_level: str = _setting(
        "info", choice("debug", "info", "warning", "error"), "Processes", "Least severe messages to log."
    )


@dataclass(frozen=True, kw_only=True)
class EngineSettings(Common):
    """What engines serve and how: the same for one node and for all nodes of ``up``."""

    model: str = _setting(
        "smollm2-135m",
        values.TEXT,
        "Model",
        "An alias, a directory in HuggingFace form, a .gguf file, or a hub id.",
        reason="Small enough to try everything on a laptop.",
    )
    served_model_name: str = _setting(
        "", values.TEXT, "Model", "The name that clients ask for.", reason="Empty: the model's own."
    )
    dtype: str = _setting(
        "auto",
        choice("auto", "bfloat16", "float32"),
        "Model",
        "Number format of weights, activations and KV.",
        reason="auto: bfloat16 where the device computes in it, else float32.",
    )
    load_format: str = _setting(
        "auto",
        choice("auto", "safetensors", "dummy"),
        "Model",
        "Where weights come from; dummy makes them up from config.json alone.",
    )
    max_model_len: int = _setting(
        0, integer(0), "Model", "Longest prompt plus output.", unit="tokens", reason="0: the model's own limit."
    )
    block_size: int = _setting(
        16,
        choice(8, 16, 32, 64, 128),
        "KV cache",
        "Tokens a KV block holds; the same on all nodes that exchange KV.",
        unit="tokens",
        reason="Small blocks hit more prefixes, large ones travel in fewer pieces.",
    )
    kv_cache_memory: int = _setting(1 << 30, values.SIZE, "KV cache", "Memory for KV blocks of one node.")
    prefix_caching: bool = _setting(
        True, values.FLAG, "KV cache", "Keep the KV of finished requests for prompts that begin alike."
    )
    max_num_seqs: int = _setting(64, integer(1), "Scheduling", "Sequences in one batch.")
    max_num_batched_tokens: int = _setting(
        512,
        integer(16),
        "Scheduling",
        "Token budget of one step; longer prompts are computed in chunks of it.",
        unit="tokens",
        reason="While one chunk is computed, the one before it travels.",
    )
    max_queue: int = _setting(
        256,
        integer(0),
        "Scheduling",
        "Requests a node lets wait for memory; it refuses more.",
        reason="429 with Retry-After serves a client better than minutes in a queue.",
    )
    local_prefill_tokens: int = _setting(
        0,
        integer(0),
        "Scheduling",
        "Prompts with at most so many uncached tokens are computed on the decode node itself.",
        unit="tokens",
        reason="0: never, while there is a prefill node.",
        only="decode",
    )
    threads: int = _setting(
        0,
        integer(0),
        "Device",
        "Compute threads of an engine.",
        reason="0: one for each core it may use; the engines of `up` share the cores.",
    )
    cpus: tuple[int, ...] = _setting(
        (), values.CORES, "Device", "Cores that engines are bound to, such as 0-3,8.", reason="Empty: not bound."
    )
    transport: str = _setting("auto", choice("auto", "nixl"), "KV transfer", "How KV blocks travel between nodes.")
    lease_s: float = _setting(
        30.0,
        decimal(1.0),
        "KV transfer",
        "How long a prefill node keeps blocks for a decode node that it hears nothing of.",
        unit="seconds",
        reason="Outlasts a pause; a death strands memory no longer than this.",
    )
    pull_timeout_s: float = _setting(
        30.0,
        decimal(0.1),
        "KV transfer",
        "A transfer that makes no progress for so long has failed; the prompt is computed again.",
        unit="seconds",
    )


@dataclass(frozen=True, kw_only=True)
class NodeConfig(EngineSettings):
    """Settings of ``pd-serve prefill`` and ``pd-serve decode``."""

    role: str  # the command: "prefill" | "decode"
    port: int = _setting(0, integer(0, 65535), "Network", "Port to listen on.", reason="0: any free one.")
    advertise_url: str = _setting(
        "", values.URL, "Network", "URL at which routers reach this node.", reason="Empty: made of host and port."
    )
    router: tuple[str, ...] = _setting(
        (), values.URLS, "Network", "Routers to register with.", reason="Empty: the routers list this node themselves."
    )
    peer_host: str = _setting(
        "",
        values.TEXT,
        "Network",
        "Address at which other nodes' engines reach this one's.",
        reason="Empty: the host it listens on.",
    )
    drain_timeout_s: float = _setting(
        30.0,
        decimal(0.0),
        "Processes",
        "After SIGTERM, the longest wait for running streams and leased blocks.",
        unit="seconds",
    )


@dataclass(frozen=True, kw_only=True)
class RouterSettings(Common):
    """What a router does with requests: the same for one router and for the router of ``up``."""

    port: int = _setting(8000, integer(1, 65535), "Network", "Port to listen on.")
    api_key: tuple[str, ...] = _setting(
        (),
        values.TEXTS,
        "API",
        "Keys that clients must send one of. Other users of the machine can read flags: prefer the variable or a file.",
        reason="Empty: no key is needed.",
    )
    api_key_file: str = _setting("", values.TEXT, "API", "File with further keys, one a line.")
    request_timeout_s: float = _setting(
        600.0, decimal(1.0), "Requests", "Longest life of a request.", unit="seconds", reason="Nothing hangs for ever."
    )
    max_attempts: int = _setting(
        4,
        integer(1),
        "Requests",
        "How often a request is tried when nodes fail under it.",
        reason="Survives three losses in a row.",
    )

    def api_keys(self) -> frozenset[str]:
        """All keys, those of ``api_key_file`` included (lines with ``#`` in front do not count)."""
        keys = set(self.api_key)
        if self.api_key_file:
            try:
                lines = Path(self.api_key_file).read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"api_key_file: cannot read {self.api_key_file}: {error}") from error
            found = {line.strip() for line in lines if line.strip() and not line.startswith("#")}
            if not found:
                raise ConfigError(f"api_key_file: {self.api_key_file} holds no key; write one a line")
            keys |= found
        return frozenset(keys)


@dataclass(frozen=True, kw_only=True)
class RouterConfig(RouterSettings):
    """Settings of ``pd-serve router``."""

    prefill: tuple[str, ...] = _setting((), values.URLS, "Nodes", "Prefill nodes that do not register themselves.")
    decode: tuple[str, ...] = _setting((), values.URLS, "Nodes", "Decode nodes that do not register themselves.")
    min_prefill: int = _setting(
        1, integer(0), "Nodes", "/ready says no with fewer prefill nodes.", reason="0: decode nodes may serve alone."
    )
    min_decode: int = _setting(1, integer(1), "Nodes", "/ready says no with fewer decode nodes.")


@dataclass(frozen=True, kw_only=True)
class UpConfig(EngineSettings, RouterSettings):
    """Settings of ``pd-serve up``: a router and its nodes on this machine."""

    prefill: int = _setting(
        1, integer(0), "Nodes", "How many prefill nodes to start.", reason="0: decode nodes compute prompts too."
    )
    decode: int = _setting(1, integer(1), "Nodes", "How many decode nodes to start.")


COMMANDS: dict[str, type[Common]] = {
    "up": UpConfig,
    "prefill": NodeConfig,
    "decode": NodeConfig,
    "router": RouterConfig,
}

T = TypeVar("T", bound=Common)


@dataclass(frozen=True)
class Setting:
    """One field as flag, variable and file key."""

    name: str
    default: object
    kind: Kind
    group: str
    help: str
    unit: str
    reason: str
    only: str

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return PREFIX + self.name.upper()

    @property
    def default_text(self) -> str:
        if self.kind is values.SIZE and isinstance(self.default, int):
            return values.render_size(self.default)
        return values.render(self.default)


def settings(command: str) -> list[Setting]:
    """The settings of a command, in the order of ``GROUPS``."""
    fields = [f for f in dataclasses.fields(COMMANDS[command]) if f.metadata]
    found = [Setting(name=f.name, default=f.default, **f.metadata) for f in fields]
    found = [setting for setting in found if setting.only in ("", command) or command == "up"]
    return sorted(found, key=lambda setting: GROUPS.index(setting.group))


def load(
    command: str,
    flags: Mapping[str, object],
    *,
    config_file: str | None = None,
    environ: Mapping[str, str] | None = None,
) -> Any:
    """The command's configuration (its class in ``COMMANDS``). ``flags``: those given, by setting name.

    Raises ConfigError for a value, key or variable that is wrong, naming what to change.
    """
    environ = os.environ if environ is None else environ
    known = {setting.name: setting for setting in settings(command)}
    _check_variables(environ)
    config_file = config_file or environ.get(CONFIG_VARIABLE)
    from_file = _read_file(command, config_file, known) if config_file else {}

    chosen: dict[str, object] = {}
    for name, setting in known.items():
        for label, source, key in (
            (setting.flag, flags, name),
            (setting.variable, environ, setting.variable),
            (f"{name} in {config_file}", from_file, name),
        ):
            if source.get(key) not in (None, ""):
                try:
                    chosen[name] = setting.kind.parse(source[key])
                except ValueError as error:
                    raise ConfigError(f"{label} {error}") from None
                break
    cls = COMMANDS[command]
    return cls(**chosen, role=command) if cls is NodeConfig else cls(**chosen)  # type: ignore[arg-type]


def _read_file(command: str, path: str, known: Mapping[str, Setting]) -> dict[str, object]:
    import yaml  # 20 ms that a start without a file need not pay

    try:
        with Path(path).open(encoding="utf-8") as stream:
            content = yaml.safe_load(stream)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the configuration file {path}: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold one setting a line, such as 'model: smollm2-135m'")
    for key in content:
        if key in known:
            continue
        others = [other for other in COMMANDS if any(setting.name == key for setting in settings(other))]
        if others:
            raise ConfigError(f"{path}: '{key}' is a setting of pd-serve {' and '.join(others)}, not of {command}")
        raise ConfigError(f"{path}: unknown setting '{key}'{_nearest(str(key), list(known))}")
    return content


def _check_variables(environ: Mapping[str, str]) -> None:
    """A variable that no command knows is a mistake; one that only another command knows is not."""
    every = {setting.variable for command in COMMANDS for setting in settings(command)}
    every |= {CONFIG_VARIABLE, CACHE_VARIABLE}
    for variable in environ:
        if variable.startswith(PREFIX) and variable not in every:
            raise ConfigError(f"unknown variable {variable}{_nearest(variable, sorted(every))}")


def _nearest(name: str, candidates: list[str]) -> str:
    close = difflib.get_close_matches(name.replace("-", "_"), candidates, n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""


def to_json(command: str, config: Common) -> str:
    """A configuration as a file that the command reads with ``--config`` (JSON is YAML)."""
    return json.dumps({setting.name: getattr(config, setting.name) for setting in settings(command)})


def names(group: type[Common]) -> list[str]:
    """The settings that a class of settings has."""
    return [f.name for f in dataclasses.fields(group) if f.metadata]


if __name__ == "__main__":
    from pd_serve.config_docs import main

    sys.exit(main(sys.argv[1:]))
