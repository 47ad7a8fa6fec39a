"""Authorities and certificates for tests, by the openssl command."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2")


@dataclass(frozen=True)
class Certificate:
    certfile: str
    keyfile: str
    ca: str


def issue(directory: Path, name: str) -> Certificate:
    """A certificate for 127.0.0.1 of an authority of its own."""
    ca, cert = directory / f"{name}-ca", directory / name
    _openssl("req", "-x509", *KEY, "-subj", f"/CN={name} authority", "-keyout", f"{ca}.key", "-out", f"{ca}.pem")
    _openssl(
        *("req", "-x509", *KEY, "-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1"),
        *("-addext", "basicConstraints=critical,CA:FALSE", "-CA", f"{ca}.pem", "-CAkey", f"{ca}.key"),
        *("-keyout", f"{cert}.key", "-out", f"{cert}.pem"),
    )
    return Certificate(f"{cert}.pem", f"{cert}.key", f"{ca}.pem")


def _openssl(*arguments: str) -> None:
    subprocess.run(("openssl", *arguments), check=True, capture_output=True, timeout=30)
