#!/usr/bin/env python3
"""Whether the server of this container answers a path with 200: ``pd-serve-healthcheck [/health | /ready]``.

Run by the container's engine every few seconds, so it is Python's own library alone. Port and TLS are those of the
container's variables: a port that was given as a flag is not known here.
"""

import http.client
import os
import ssl
import sys

_TIMEOUT_S = 2.0


def main() -> None:
    path = sys.argv[1] if len(sys.argv) > 1 else "/health"
    where = ("127.0.0.1", int(os.environ["PD_SERVE_PORT"]))
    if os.environ.get("PD_SERVE_SSL_CERTFILE"):
        # Unverified: the certificate names the address that others dial, and this is our own loopback.
        connection = http.client.HTTPSConnection(
            *where,
            timeout=_TIMEOUT_S,
            context=ssl._create_unverified_context(),
        )
    else:
        connection = http.client.HTTPConnection(*where, timeout=_TIMEOUT_S)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        said = answer.read(200).decode(errors="replace")
    except OSError as error:
        sys.exit(f"{path}: {error}")
    if answer.status != http.HTTPStatus.OK:
        sys.exit(f"{path}: {answer.status} {said}")


main()
