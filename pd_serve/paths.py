"""Where pd-serve keeps files of its own.

Used by :mod:`pd_serve.models.source` (models) and :mod:`pd_serve.jit` (compiled kernels), which own what lies there.
"""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs


def cache_directory() -> Path:
    """Of what can be made again: ``$PD_SERVE_CACHE``, else ``pd-serve`` in ``$XDG_CACHE_HOME`` or ``~/.cache``.

    It may not be there yet.
    """
    return Path(os.environ.get("PD_SERVE_CACHE") or platformdirs.user_cache_path("pd-serve", appauthor=False))
