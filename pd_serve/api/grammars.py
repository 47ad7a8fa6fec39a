"""What a request says of the form of its output, as the wire's :class:`Grammar`.

Schemas come as JSON, whatever the client's spelling; whether they can be compiled is said elsewhere, off the loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from pd_serve.wire.link import Grammar


def json_schema(schema: Any, after: Sequence[int] = ()) -> Grammar:
    """``schema``: as JSON has it (an object, or true), or a string of JSON."""
    text = schema if isinstance(schema, str) else msgspec.json.encode(schema).decode()
    return Grammar("json_schema", text, tuple(after))
