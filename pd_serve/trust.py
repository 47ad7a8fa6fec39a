"""Whom a process trusts: shared secrets and keys from their files, which addresses are this machine's own, TLS.

Used by the settings and by whoever opens or dials a door. Raises ConfigError with what to change.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import re
import ssl
import stat
from collections.abc import Mapping
from pathlib import Path

from pd_serve.errors import ConfigError

log = logging.getLogger(__name__)

MIN_SECRET_CHARACTERS = 16
_MAKE_ONE = "head -c 32 /dev/urandom | base64 > secret; chmod 600 secret"


def secret_of(secret: str, secret_file: str) -> str:
    """The shared secret, from wherever it was given; empty: none."""
    if not secret_file:
        return _checked(secret, "secret") if secret else ""
    found = _read(secret_file, "secret_file").strip()
    if not found:
        raise ConfigError(f"secret_file: {secret_file} is empty; write a long random text into it: {_MAKE_ONE}")
    if secret and secret != found:
        raise ConfigError(f"secret and secret_file are both given and differ; drop one (file: {secret_file})")
    _check_private(secret_file, "secret_file")
    return _checked(found, "secret_file")


def _checked(secret: str, setting: str) -> str:
    if len(secret) < MIN_SECRET_CHARACTERS:
        raise ConfigError(
            f"{setting}: the secret has {len(secret)} characters, it can be guessed; use at least "
            f"{MIN_SECRET_CHARACTERS} random ones: {_MAKE_ONE}"
        )
    return secret


def keys_of(keys: tuple[str, ...], key_file: str) -> frozenset[str]:
    """API keys, those of a file included (lines with ``#`` in front do not count); empty: none are asked for."""
    found = set(keys)
    if key_file:
        lines = (line.strip() for line in _read(key_file, "api_key_file").splitlines())
        listed = {line for line in lines if line and not line.startswith("#")}
        if not listed:
            raise ConfigError(f"api_key_file: {key_file} holds no key; write one a line")
        if any(not usable_key(key) for key in listed):
            raise ConfigError(f"api_key_file: a key in {key_file} has spaces or is not ASCII; write one key a line")
        _check_private(key_file, "api_key_file", strict=False)
        found |= listed
    if any(len(key) < MIN_SECRET_CHARACTERS for key in found):
        log.warning("an API key has less than %d characters: it can be guessed", MIN_SECRET_CHARACTERS)
    return frozenset(found)


def usable_key(key: str) -> bool:
    """Whether clients can send it in a header as it is."""
    return re.fullmatch(r"[!-~]+", key) is not None


def _read(path: str, setting: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{setting}: cannot read {path}: {error}") from error


def _check_private(path: str, setting: str, *, strict: bool = True) -> None:
    """Where we may change who reads the file, it is an error that others can; on a read-only volume a warning."""
    found = Path(path).stat()
    if not found.st_mode & (stat.S_IRWXG | stat.S_IRWXO) or not stat.S_ISREG(found.st_mode):
        return
    text = f"{setting}: other users of this machine can open {path}; chmod 600 {path}"
    if strict and found.st_uid == os.geteuid() and os.access(path, os.W_OK):
        raise ConfigError(text)
    log.warning("%s (in Kubernetes: defaultMode: 0400)", text)


def is_loopback(host: str) -> bool:
    """Only processes of this machine can be there. Names are not resolved: they may change."""
    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)


def asks_for_others(headers: Mapping[str, str]) -> bool:
    """Whether a proxy or a web page speaks: that it does so from this machine says nothing of who asks."""
    return any(name in headers for name in ("origin", "forwarded", "x-forwarded-for"))


def server_tls(certfile: str, keyfile: str) -> ssl.SSLContext | None:
    """None without a certificate. ``keyfile``: empty where the key is in ``certfile``."""
    if not certfile:
        if keyfile:
            raise ConfigError("ssl_keyfile is given without ssl_certfile: give both, or none")
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(certfile, keyfile or None)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"ssl_certfile, ssl_keyfile: cannot use {certfile} with {keyfile or 'its own key'}: {error}"
        ) from error
    return context


def client_tls(ca: str) -> ssl.SSLContext:
    """Verifies servers against ``ca``, a PEM file; empty: against what this machine trusts."""
    try:
        return ssl.create_default_context(cafile=ca or None)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"ssl_ca: cannot use {ca}: {error}; give a file with PEM certificates") from error
