"""A real Java client, which offers h2c with every POST."""

import contextlib
import json
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.support.order_api import new_order
from tests.support.service_process import ServiceProcess

# `java File.java` compiles it, which a runtime environment alone cannot.
JAVA = shutil.which("java") if shutil.which("javac") else None

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(JAVA is None, reason="no JDK is installed here (Debian: default-jdk-headless)"),
]

SOURCE = Path(__file__).parents[1] / "support" / "JdkClient.java"


class Tap:
    """A relay to a service that keeps what each of its connections sent."""

    def __init__(self, url: str) -> None:
        address = urlsplit(url)
        self._target = (address.hostname, address.port)
        self.connections: list[bytearray] = []
        self._copying: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed: the test is over
            while True:
                client, _ = self._listener.accept()
                service = socket.create_connection(self._target)
                self.connections.append(bytearray())
                for ends in ((client, service, self.connections[-1]), (service, client, bytearray())):
                    self._copying.append(threading.Thread(target=self._copy, args=ends))
                    self._copying[-1].start()

    def _copy(self, source: socket.socket, target: socket.socket, kept: bytearray) -> None:
        with source, contextlib.suppress(OSError):
            while data := source.recv(65536):
                kept += data
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Accept no more, and wait until all connections have ended."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._copying:
            thread.join(30)


def test_orders_of_the_jdks_own_client(start_service: Callable[..., ServiceProcess]) -> None:
    """With and without a length, each order is 201 and its own, over one connection a client, with h2c offered."""
    service = start_service(CONNECTION_MAX_AGE_SECONDS=600)
    tap = Tap(service.url)
    ran = subprocess.run(
        [str(JAVA), str(SOURCE), tap.url, json.dumps(new_order(("SKU-0001", 1)))],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    tap.close()
    assert ran.returncode == 0, ran.stderr
    answers = [line.partition(" ") for line in ran.stdout.splitlines()]
    assert [status for status, _, _ in answers] == ["201"] * 10
    assert len({json.loads(body)["id"] for _, _, body in answers}) == 10
    assert service.metric("orders_total", status="success", error_type="") == 10
    assert len(tap.connections) == 2
    sent = b"".join(tap.connections).lower()
    assert sent.count(b"upgrade: h2c") == 10
    assert b"transfer-encoding: chunked" in sent
    assert b"content-length: " in sent
