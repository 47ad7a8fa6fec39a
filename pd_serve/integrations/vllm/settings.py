"""pd-serve's settings in vLLM: ``kv_connector_extra_config``, then ``PD_SERVE_*`` variables, as for a node.

Names, values and defaults are those of docs/configuration.md; only those that the transfer reads can be given.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from pd_serve import config
from pd_serve.config import NodeConfig
from pd_serve.errors import ConfigError
from pd_serve.settings import nearest

_GROUPS = ("KV transfer", "Security")
LOOPBACK = "127.0.0.1"  # readers of this machine alone, unless peer_host says where others come in
_NAMES = ("peer_host", "step_timeout_s", "enable_cumem_allocator", "log_level")


def load(extra: Mapping[str, Any], *, sends: bool, receives: bool) -> NodeConfig:
    """Raises ConfigError for what is wrong, naming what to change."""
    command = {(True, False): "prefill", (False, True): "decode"}.get((sends, receives), "node")
    known = [one.name for one in config.settings(command) if one.group in _GROUPS or one.name in _NAMES]
    for name in extra:
        if name not in known:
            raise ConfigError(f"kv_connector_extra_config: there is no '{name}'{nearest(name, known)}")
    given = {name: _text(value) for name, value in extra.items()}
    loaded: NodeConfig = config.load(command, given)
    loaded = dataclasses.replace(loaded, peer_host=loaded.peer_host or LOOPBACK)
    if sends:
        loaded.check_door(loaded.peer_host, "peer_host")
    return loaded


def _text(value: Any) -> Any:
    """As a variable would say it; JSON has lists and objects besides."""
    if isinstance(value, Mapping):
        return ",".join(f"{key}={part}" for key, part in value.items())
    return ",".join(map(str, value)) if isinstance(value, list) else value
