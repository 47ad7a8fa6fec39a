"""docs/configuration.md, made of the settings in :mod:`pd_serve.config`. Run as ``python -m pd_serve.config``."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

from pd_serve.config import settings
from pd_serve.settings import Setting

_INTRO = """\
# Configuration

<!-- Written by `make docs` from pd_serve/config.py; `make test` checks that it is up to date. -->

Every setting can be given in three ways. The first that names it wins:

1. a flag: `pd-serve up --kv-cache-memory 4GiB`
2. a variable: `PD_SERVE_KV_CACHE_MEMORY=4GiB pd-serve up`
3. a YAML file, one setting a line, given with `--config FILE` or `PD_SERVE_CONFIG`: `kv_cache_memory: 4GiB`

A setting or variable that does not exist is an error that names the nearest one that does. Variables of
other commands may be set as well; a file holds settings of one command only.

Sizes are bytes, or numbers with `KiB`, `MiB`, `GiB`, `TiB` (powers of 1024) or `KB` ... `TB` (powers of 1000).
Lists are separated by commas; YAML lists work too.

Downloaded and converted models and compiled kernels are kept in `~/.cache/pd-serve` (`$XDG_CACHE_HOME/pd-serve` where
that is set); the variable `PD_SERVE_CACHE` names another directory.

A file for `pd-serve decode --config node.yaml`:

```yaml
model: /models/Llama-3.2-1B-Instruct
host: 10.0.0.3
port: 8200
router: [http://10.0.0.1:8000]
kv_cache_memory: 8GiB
secret_file: /etc/pd-serve/secret
transport: auto
```
"""

_SECTIONS = (
    ("up", "pd-serve up", "A router and its nodes on this machine; settings of nodes apply to all of them."),
    (
        "node",
        "pd-serve node, pd-serve prefill, pd-serve decode",
        "One node. The last two are `pd-serve node` with that role, and have no `--role`.",
    ),
    ("router", "pd-serve router", "One router."),
    (
        "bench serve",
        "pd-serve bench serve",
        "A load generator; its variables begin with `PD_SERVE_BENCH_`.",
    ),
    (
        "bench transfer",
        "pd-serve bench transfer",
        "How fast KV moves here; its variables begin with `PD_SERVE_BENCH_TRANSFER_`.",
    ),
    ("token", "pd-serve token", "The bearer token of nodes' orders, made from the secret."),
    ("doctor", "pd-serve doctor", "What this machine offers; its variables begin with `PD_SERVE_DOCTOR_`."),
)


def render() -> str:
    """The whole file."""
    parts = [_INTRO]
    for command, title, about in _SECTIONS:
        parts.append(f"\n## {title}\n\n{about}\n")
        by_group = itertools.groupby(settings(command), key=lambda setting: setting.group)
        for group, members in by_group:
            parts.append(f"\n### {group}\n\n| Flag | Variable | YAML key | Default | Unit | Meaning |\n")
            parts.append("| --- | --- | --- | --- | --- | --- |\n")
            parts.extend(_row(setting) for setting in members)
    return "".join(parts)


def _row(setting: Setting) -> str:
    flag = setting.flag
    flag = f"`{flag}`, `--no-{flag[2:]}`" if setting.kind.is_flag else f"`{flag} {setting.kind.shape}`"
    default = f"`{setting.default_text}`" if setting.default_text else ""
    meaning = " ".join(part for part in (setting.help, setting.reason) if part)
    cells = (flag, f"`{setting.variable}`", f"`{setting.name}`", default, setting.unit, meaning)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def main(arguments: Sequence[str]) -> int:
    """``FILE`` writes it; ``--check FILE`` fails when it differs from what would be written."""
    check = "--check" in arguments
    path = Path(next((argument for argument in arguments if argument != "--check"), "docs/configuration.md"))
    content = render()
    if not check:
        path.write_text(content, encoding="utf-8")
        return 0
    if not path.exists() or path.read_text(encoding="utf-8") != content:
        print(f"{path} is out of date: run `make docs` and commit the result")
        return 1
    return 0
