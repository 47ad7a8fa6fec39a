"""What prefill and decode servers say of a prompt, in ``kv_transfer_params``: it passes through clients and proxies.

A request is sent to a prefill server with ``do_remote_decode``. Its answer's object goes to a decode server as it is:
``do_remote_prefill`` and, under ``pd_serve``, :class:`Held`. Names outside of ``pd_serve`` are NixlConnector's, so that
proxies made for it work.
"""

from __future__ import annotations

import logging
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from pd_serve.wire.link import Source
from pd_serve.wire.peer import MAX_RANKS

log = logging.getLogger(__name__)

NAME = "pd_serve"
VERSION = 1

Text = Annotated[str, Meta(min_length=1, max_length=512)]


class Held(msgspec.Struct, frozen=True):
    """A prompt whose KV a prefill server keeps. ``num_tokens``: so many, from the prompt's first on."""

    v: int
    key: Text
    node_id: Text
    epoch: Text
    addresses: Annotated[tuple[Text, ...], Meta(min_length=1, max_length=MAX_RANKS)]
    num_tokens: Annotated[int, Meta(ge=1, le=1 << 31)]

    @property
    def source(self) -> Source:
        return Source(self.node_id, self.epoch, self.addresses)


def wants_hand_over(params: dict[str, Any] | None) -> bool:
    """Whether somebody else will decode this request."""
    return params is not None and params.get("do_remote_decode") is True


def answer(held: Held, num_cached: int) -> dict[str, Any]:
    """``num_cached``: tokens that the prefill server had in its prefix cache."""
    return {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "remote_prefill_cached_tokens": num_cached,
        NAME: msgspec.to_builtins(held),
    }


def held_of(params: dict[str, Any] | None) -> Held | None:
    """What a prefill server keeps for this request. None where nobody does, or what is said makes no sense: clients
    can send anything, and no engine may end of it."""
    if not params or params.get("do_remote_prefill") is not True:
        return None
    said = params.get(NAME)
    try:
        held = msgspec.convert(said, Held)
    except msgspec.ValidationError as error:
        log.warning("kv_transfer_params without a prompt that this server can fetch (%s): it is computed here", error)
        return None
    if held.v != VERSION:
        log.warning("kv_transfer_params of version %d, this server speaks %d: it is computed here", held.v, VERSION)
        return None
    return held
