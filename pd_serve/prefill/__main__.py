"""``python -m pd_serve.prefill``: the engine process of a prefill node."""

from __future__ import annotations

import sys

from pd_serve.engine.boot import BuiltRole, Parts, main


def make_role(parts: Parts) -> BuiltRole:
    from pd_serve.prefill.outbox import Outbox
    from pd_serve.prefill.role import PrefillRole

    raise NotImplementedError


if __name__ == "__main__":
    sys.exit(main(make_role))
