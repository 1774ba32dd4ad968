"""`python -m app.healthcheck`: whether the service of HOST and OPS_PORT or PORT answers; 0, or 1 with the reason.

For the image's HEALTHCHECK, every few seconds: only the standard library is imported.
"""

import ipaddress
import os
import sys
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException

_TIMEOUT_SECONDS = 2


def main() -> int:
    """Ask `/livez` where the service answers it, past any proxy."""
    host = _reachable(os.environ.get("HOST") or "127.0.0.1")
    port = int(os.environ.get("OPS_PORT") or os.environ.get("PORT") or 8000)
    try:
        connection = HTTPConnection(host, port, timeout=_TIMEOUT_SECONDS)
        connection.request("GET", "/livez", headers={"Connection": "close"})
        status = connection.getresponse().status
    except (OSError, HTTPException) as exc:
        sys.stderr.write(f"{host}:{port}: {exc}\n")
        return 1
    if status != HTTPStatus.OK:
        sys.stderr.write(f"{host}:{port}: /livez answers {status}\n")
        return 1
    return 0


def _reachable(host: str) -> str:
    """*host*, or this machine where it means every address of it."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if not address.is_unspecified:
        return host
    return "127.0.0.1" if address.version == 4 else "::1"  # noqa: PLR2004 - of the Internet Protocol


if __name__ == "__main__":
    sys.exit(main())
