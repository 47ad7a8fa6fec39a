"""Whether OpenTelemetry traces are wanted, and their start. The ground under spans of router and nodes.

Called where these start. Imports OpenTelemetry (the extra ``otel``) only where traces are wanted: by
``--otlp-traces-endpoint``, or by the variables that OpenTelemetry's SDKs read. Engines never import it: they report
times (:class:`pd_serve.wire.engine.Timeline`), of which their node makes spans.
"""

from __future__ import annotations

import logging
import os
from importlib.util import find_spec
from typing import TYPE_CHECKING

from pd_serve.errors import ConfigError

if TYPE_CHECKING:
    from pd_serve.otel import Tracing

log = logging.getLogger(__name__)

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_EXPORTER = "opentelemetry.exporter.otlp.proto.http"
_MISSING = "the packages for traces are missing: pip install 'pd-serve[otel]'"


def check(endpoint: str) -> None:
    """Raises ConfigError where ``endpoint`` was given and nothing can be exported."""
    if endpoint and not _installed():
        raise ConfigError(f"--otlp-traces-endpoint: {_MISSING}")


def begin(endpoint: str, service: str, instance: str) -> Tracing | None:
    """None: no traces are wanted. ``endpoint``: may be empty. ``service``, ``instance``: who says so, unless variables
    say otherwise. After :func:`check`."""
    environ = os.environ
    if environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or environ.get("OTEL_TRACES_EXPORTER") == "none":
        return None
    if not (endpoint or any(environ.get(name) for name in _ENDPOINTS)):
        return None
    if not _installed():
        log.warning("OTEL_* variables name a collector, but %s", _MISSING)
        return None
    from pd_serve.otel import Tracing, exporting

    return Tracing(exporting(endpoint), service, instance)


def _installed() -> bool:
    try:
        return find_spec(_EXPORTER) is not None and find_spec("opentelemetry.sdk") is not None
    except ModuleNotFoundError:  # of a package above it
        return False
