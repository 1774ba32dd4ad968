"""A TCP server that misbehaves on cue: each connection it accepts is served by a script."""

import contextlib
import re
import socket
import ssl
import struct
import threading
from collections.abc import Callable
from typing import Self

_CONTENT_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


class Peer:
    """The server's side of one connection."""

    def __init__(self, connection: socket.socket, requests: list[bytes]) -> None:
        self._connection = connection
        self._requests = requests
        self._received = b""

    def read(self) -> bytes:
        """A whole request; raises EOFError where the client has closed."""
        while True:
            head, end, rest = self._received.partition(b"\r\n\r\n")
            length = _CONTENT_LENGTH.search(head)
            size = int(length[1]) if length else 0
            if end and len(rest) >= size:
                request, self._received = head + end + rest[:size], rest[size:]
                self._requests.append(request)
                return request
            if not (data := self._connection.recv(65536)):
                raise EOFError
            self._received += data

    def send(self, data: bytes) -> None:
        """Send all of it, at once."""
        self._connection.sendall(data)

    def wait_for_close(self) -> None:
        """Wait until the client has closed."""
        while self._connection.recv(65536):
            pass

    def close(self) -> None:
        """End the connection."""
        self._connection.close()

    def reset(self) -> None:
        """End the connection with a reset."""
        self._connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._connection.close()


Script = Callable[[Peer], None]


class ScriptedServer:
    """Listens on a free loopback port; the n-th connection gets the n-th script, and later ones the last.

    A connection is closed when its script ends. `requests` is what was read, `connections` how many were accepted.
    """

    def __init__(self, *scripts: Script, host: str = "127.0.0.1", tls: ssl.SSLContext | None = None) -> None:
        self._scripts = scripts
        self._tls = tls
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, 0), family=family)
        self.port: int = self._listener.getsockname()[1]
        self.requests: list[bytes] = []
        self.connections = 0
        self._open: list[socket.socket] = []
        self._threads: list[threading.Thread] = []

    @property
    def url(self) -> str:
        """Where it listens, over IPv4 without TLS."""
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        self._spawn(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        for each in (self._listener, *self._open):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits for it
            each.close()
        for thread in self._threads:
            thread.join(10)

    def _spawn(self, target: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._open.append(connection)
            script = self._scripts[min(self.connections, len(self._scripts) - 1)]
            self.connections += 1
            self._spawn(self._serve, connection, script)

    def _serve(self, connection: socket.socket, script: Script) -> None:
        with contextlib.suppress(OSError, EOFError), connection:
            if self._tls is None:
                script(Peer(connection, self.requests))
            else:
                with self._tls.wrap_socket(connection, server_side=True) as secured:
                    self._open.append(secured)  # the plain one has no descriptor any more
                    script(Peer(secured, self.requests))
