"""What a UCX library can use on this machine, asked of the library itself: its components, transports and devices.

Through UCX's transport API (libuct) by ctypes, because wheels bring no ``ucx_info``, or none that finds its libraries.
Called in a process of its own: UCX reads settings and probes devices as it is loaded.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_FIELD_NAME, _FIELD_COUNT, _FIELD_RESOURCES = 1, 2, 4  # UCT_COMPONENT_ATTR_FIELD_*


class _Component(ctypes.Structure):
    """uct_component_attr_t, with room for fields of later versions."""

    _fields_ = [
        ("field_mask", ctypes.c_uint64),
        ("name", ctypes.c_char * 16),
        ("md_resource_count", ctypes.c_uint),
        ("md_resources", ctypes.c_void_p),
        ("more", ctypes.c_char * 512),
    ]


class _Transport(ctypes.Structure):
    """uct_tl_resource_desc_t."""

    _fields_ = [
        ("tl_name", ctypes.c_char * 10),
        ("dev_name", ctypes.c_char * 32),
        ("dev_type", ctypes.c_int),
        ("sys_device", ctypes.c_uint8),
    ]


@dataclass(frozen=True)
class Resources:
    """``transports``: by name, the devices that each can use. ``components``: all that the library brings."""

    components: tuple[str, ...]
    transports: dict[str, list[str]]


def loaded(name: str) -> Path | None:
    """The file of a library that this process has loaded, such as ``libuct``."""
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        path = line.partition("/")[2]
        file = path.rpartition("/")[2]
        if path and file.startswith((f"{name}.so", f"{name}-")):
            return Path("/" + path)
    return None


def version(libucp: Path) -> str:
    """``1.21.0``."""
    library = ctypes.CDLL(str(libucp))
    library.ucp_get_version_string.restype = ctypes.c_char_p
    return str(library.ucp_get_version_string().decode())


def resources(libuct: Path) -> Resources:
    """Raises OSError where the library cannot be loaded."""
    library = ctypes.CDLL(str(libuct))
    components = ctypes.POINTER(ctypes.c_void_p)()
    count = ctypes.c_uint()
    if library.uct_query_components(ctypes.byref(components), ctypes.byref(count)):
        return Resources((), {})
    names, transports = [], dict[str, list[str]]()
    for index in range(count.value):
        component = ctypes.c_void_p(components[index])
        attributes = _Component(field_mask=_FIELD_NAME | _FIELD_COUNT)
        if library.uct_component_query(component, ctypes.byref(attributes)):
            continue
        names.append(attributes.name.decode())
        for transport, device in _transports(library, component, attributes):
            transports.setdefault(transport, []).append(device)
    library.uct_release_component_list(components)
    return Resources(tuple(names), transports)


def _transports(library: ctypes.CDLL, component: ctypes.c_void_p, attributes: _Component) -> Iterator[tuple[str, str]]:
    domains = (ctypes.c_char * 16 * max(1, attributes.md_resource_count))()
    attributes.field_mask = _FIELD_RESOURCES
    attributes.md_resources = ctypes.addressof(domains)
    if not attributes.md_resource_count or library.uct_component_query(component, ctypes.byref(attributes)):
        return
    for domain in domains:
        options, memory = ctypes.c_void_p(), ctypes.c_void_p()
        if library.uct_md_config_read(component, None, None, ctypes.byref(options)):
            continue
        failed = library.uct_md_open(component, domain.value, options, ctypes.byref(memory))
        library.uct_config_release(options)
        if failed:
            continue
        found = ctypes.POINTER(_Transport)()
        count = ctypes.c_uint()
        if not library.uct_md_query_tl_resources(memory, ctypes.byref(found), ctypes.byref(count)):
            for index in range(count.value):
                yield found[index].tl_name.decode(), found[index].dev_name.decode()
            library.uct_release_tl_resource_list(found)
        library.uct_md_close(memory)
