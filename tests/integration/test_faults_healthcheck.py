"""The image's health check asks the service where it listens."""

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.service_process import ServiceProcess

_DOCKERFILE = (Path(__file__).parents[2] / "Dockerfile").read_text()


def _check(**environment: str) -> int:
    """The exit code of the Dockerfile's own command."""
    found = re.search(r"^HEALTHCHECK (?:.*\\\n)*.*CMD (\[.*\])$", _DOCKERFILE, re.MULTILINE)
    assert found
    python, *arguments = json.loads(found[1])
    assert python == "python"
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LANG")}
    return subprocess.run([sys.executable, *arguments], env=kept | environment, check=False).returncode


def _free_port(host: str) -> str:
    try:
        with socket.create_server(
            (host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET
        ) as free:
            return str(free.getsockname()[1])
    except OSError:
        pytest.skip(f"no address {host} here")


@pytest.mark.parametrize("host", ["0.0.0.0", "127.0.0.1", "127.0.0.2", "::", "::1", "localhost", "LOCALHOST"])  # noqa: S104
def test_the_check_asks_where_the_service_listens(
    start_service: Callable[..., ServiceProcess], host: str
) -> None:
    """Healthy while it serves, past any proxy, and not when it is gone: with HOST=127.0.0.2 it never was."""
    port = _free_port(host)
    service = start_service(HOST=host, PORT=port, ALLOW_ANONYMOUS="true")
    proxies = {"http_proxy": "http://127.0.0.1:9", "ALL_PROXY": "http://127.0.0.1:9"}
    assert _check(HOST=host, PORT=port, **proxies) == 0
    service.kill()
    assert _check(HOST=host, PORT=port) == 1


def test_an_empty_variable_is_the_default(start_service: Callable[..., ServiceProcess]) -> None:
    """As for the service."""
    port = _free_port("127.0.0.1")
    start_service(HOST="", PORT=port)
    assert _check(HOST="", PORT=port) == 0


def test_the_check_asks_the_operations_port(start_service: Callable[..., ServiceProcess]) -> None:
    """Where there is one: the port of the API has no probes."""
    port, operations = _free_port("127.0.0.1"), _free_port("127.0.0.1")
    start_service(PORT=port, OPS_PORT=operations)
    assert _check(PORT=port, OPS_PORT=operations) == 0
    assert _check(PORT=port) == 1


def test_another_server_there_is_no_health(start_service: Callable[..., ServiceProcess]) -> None:
    """What does not speak HTTP is not the service."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert _check(HOST="127.0.0.1", PORT=str(silent.getsockname()[1])) == 1
