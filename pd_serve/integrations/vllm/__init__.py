"""pd-serve's transfer as a KV connector of vLLM, 0.24 to 0.33. See docs/vllm.md.

    --kv-transfer-config '{"kv_connector": "PdServeConnector", "kv_connector_module_path": "pd_serve.integrations.vllm",
                           "kv_role": "kv_both", "kv_load_failure_policy": "recompute"}'

vLLM makes one connector in its scheduler's process and one in each worker's. Ours hand on to :mod:`.scheduler_side`,
which decides what to keep, to send and to fetch, and :mod:`.worker_side`, which tells that to the outbox and the inbox
of its rank. What of vLLM differs between versions is in :mod:`.connector` and :mod:`.engine` alone; only
these two import it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pd_serve.integrations.vllm.connector import PdServeConnector

__all__ = ["PdServeConnector"]


def __getattr__(name: str) -> Any:
    """vLLM is imported when it asks for the class, not before."""
    if name == "PdServeConnector":
        from pd_serve.integrations.vllm.connector import PdServeConnector

        return PdServeConnector
    raise AttributeError(name)
