"""Whether host memory is pinned: one answer for all who copy between host and GPU."""

from __future__ import annotations

import functools

from pd_serve.memory.cuda_driver import CudaDriver, DeviceFacts
from pd_serve.memory.driver import DriverError


def should_pin_memory(pin_memory: bool, device: int | None) -> bool:
    """``pin_memory``: the setting. ``device``: the GPU that host memory is copied to and from; None: there is none.

    On machines with one memory for both (such as GH200) pinned memory takes from what the GPU has.
    """
    if not pin_memory or device is None:
        return False
    facts = _facts(device)
    return facts is not None and not facts.unified_memory


@functools.cache
def _facts(device: int) -> DeviceFacts | None:
    try:
        return CudaDriver().device_facts(device)
    except DriverError:
        return None
