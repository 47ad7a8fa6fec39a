"""How settings are declared and found: dataclass fields that know their flag, variable and file key.

Used by :mod:`pd_serve.config`, which holds the settings themselves.
"""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pd_serve import values
from pd_serve.errors import ConfigError
from pd_serve.values import Kind

# The order of --help and of the documentation.
GROUPS = (
    "Model",
    "Nodes",
    "Other engines",
    "Network",
    "Security",
    "API",
    "Endpoint",
    "Load",
    "Requests",
    "KV cache",
    "KV transfer",
    "Scheduling",
    "Device",
    "Processes",
    "Report",
)


@dataclass(frozen=True)
class Setting:
    """One field as flag, variable and file key."""

    name: str
    variable: str
    default: object
    kind: Kind
    group: str
    help: str
    unit: str
    reason: str

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def default_text(self) -> str:
        if self.kind is values.SIZE and isinstance(self.default, int):
            return values.render_size(self.default)
        if self.kind is values.SIZES and isinstance(self.default, tuple):
            return ",".join(values.render_size(size) for size in self.default)
        if self.kind is values.RATIO and isinstance(self.default, tuple):
            return ":".join(map(str, self.default))
        return values.render(self.default)


def setting(default: object, kind: Kind, group: str, help: str, *, unit: str = "", reason: str = "") -> Any:
    """A dataclass field with what the command line and the documentation need to know about it.

    ``reason``: why the default is what it is.
    """
    metadata = {"kind": kind, "group": group, "help": help, "unit": unit, "reason": reason}
    return dataclasses.field(default=default, metadata=metadata)


def declared(cls: type[Any], variable_prefix: str) -> list[Setting]:
    """The settings that a dataclass declares, in the order of ``GROUPS``."""
    found = [
        Setting(name=field.name, variable=variable_prefix + field.name.upper(), default=field.default, **field.metadata)
        for field in dataclasses.fields(cls)
        if field.metadata
    ]
    return sorted(found, key=lambda one: GROUPS.index(one.group))


def values_of(config: object, cls: type[Any]) -> dict[str, Any]:
    """What ``config`` says of the settings that ``cls`` declares, as keyword arguments."""
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(cls) if field.metadata}


def read_file(path: str) -> dict[str, object]:
    """A YAML file's keys and values. Raises ConfigError."""
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
    return content


def nearest(name: str, candidates: list[str]) -> str:
    """The end of a sentence about a name that does not exist."""
    close = difflib.get_close_matches(name.replace("-", "_"), candidates, n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""
