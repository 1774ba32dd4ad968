"""HTTP/1.1 over one kept connection and nothing else: an exchange costs a fraction of what a general client takes.

A load generator shares its machine with what it measures, so each user has one gevent socket, requests are bytes made
up beforehand, and Node's parser (llhttp, through httptools) reads the answers: kept and closed connections, lengths,
chunks, 1xx, answers that end with their connection.

A request is sent once. A kept connection is looked at before it is used, and replaced where the server has closed it
or said something unasked: nothing was sent yet. From the first byte on there is no second try, not even under the
same idempotency key: it would hide the failure that a load test looks for, so the caller is told instead.

    TransportError
     ├── NotConnected       nothing was sent: refused, unreachable, no such name, no TLS, too slow
     └── NoAnswer           the request may have been executed
          ├── TimedOut
          ├── ConnectionBroken   reset, or closed before the answer's end
          └── BadAnswer          not HTTP/1.1

Not supported: proxies (HTTP_PROXY and its like are ignored), redirects, cookies, compression, HTTP/2.
"""

import functools
import random
import select
import socket as stdlib_socket
import time
from collections.abc import Mapping
from typing import Any, ClassVar
from urllib.parse import urlsplit

import gevent
import gevent.lock
import gevent.monkey
import gevent.socket
import gevent.ssl
import httptools
import orjson

_READ_BYTES = 65536
_NAME_TTL_SECONDS = 30.0
_OK = 200

# The system's own poll: gevent's patched one would go through the event loop, to answer what is known at once.
_poll = gevent.monkey.get_original("select", "poll")


class TransportError(Exception):
    """The request got no answer; the message is the same for all failures of a kind, so that they add up."""

    error_type: ClassVar[str]


class NotConnected(TransportError):
    """There was no connection, so nothing was sent."""

    error_type = "connect"


class NoAnswer(TransportError):
    """The request, or a part of it, was sent, and no whole answer came: it may have been executed."""


class TimedOut(NoAnswer):
    """The answer was not complete in time."""

    error_type = "client_timeout"


class ConnectionBroken(NoAnswer):
    """The connection ended before the answer did."""

    error_type = "reset"


class BadAnswer(NoAnswer):
    """The answer is not HTTP/1.1."""

    error_type = "protocol"


class Answer:
    """A whole answer: `status`, `headers` by lower-case name (the last of a name wins), `body`."""

    __slots__ = ("body", "headers", "status")

    def __init__(self, status: int, headers: dict[bytes, bytes], body: bytes) -> None:
        self.status = status
        self.headers = headers
        self.body = body

    def document(self) -> dict[str, object]:
        """The body's JSON object; empty where it is none."""
        try:
            document = orjson.loads(self.body)
        except orjson.JSONDecodeError:
            return {}
        return document if isinstance(document, dict) else {}


@functools.cache
def _tls() -> gevent.ssl.SSLContext:
    """The system's certificates; SSL_CERT_FILE names others."""
    return gevent.ssl.create_default_context()


class _Names:
    """Addresses, looked up once in a while for all users.

    gevent looks names up in threads, numeric addresses too, and beside a busy event loop a thread waits for the
    interpreter's lock again and again: with a lookup for each connection, ramps of 100 users/s waited for seconds.
    """

    def __init__(self) -> None:
        self._lock = gevent.lock.BoundedSemaphore()
        self._known: dict[tuple[str, int], tuple[float, list[tuple[int, Any]]]] = {}

    def addresses(self, host: str, port: int) -> list[tuple[int, Any]]:
        """Families and socket addresses; those of a family in random order, so that replicas share the load."""
        with self._lock:
            expires_at, found = self._known.get((host, port), (0.0, []))
            if time.monotonic() >= expires_at:
                answers = gevent.socket.getaddrinfo(host, port, type=stdlib_socket.SOCK_STREAM)
                found = [(family, address) for family, _, _, _, address in answers]
                self._known[host, port] = (time.monotonic() + _NAME_TTL_SECONDS, found)
        families = [family for family, _ in found]
        return sorted(found, key=lambda each: (families.index(each[0]), random.random()))  # noqa: S311


_names = _Names()


class LightHttp:
    """One user's connection to a target.

    Args:
        base_url: `http://` or `https://`, a host or `[IPv6]`, a port, a path that goes before all others.
        headers: sent with every request.
        connect_timeout_seconds: for looking the name up, connecting, and TLS.
        timeout_seconds: from the first byte of a request to the last of its answer.

    Raises:
        ValueError: *base_url* is none of these, or a header holds a line break.
    """

    def __init__(
        self,
        base_url: str,
        *,
        headers: Mapping[str, str] | None = None,
        connect_timeout_seconds: float = 5.0,
        timeout_seconds: float = 10.0,
    ) -> None:
        target = urlsplit(base_url)
        if target.scheme not in ("http", "https") or not target.hostname or "@" in target.netloc:
            raise ValueError(f"not a base URL such as http://localhost:8000: {base_url!r}")
        self._secure = target.scheme == "https"
        self._host = target.hostname
        self._port = target.port or (443 if self._secure else 80)
        self._path = target.path.rstrip("/")
        self._common = {"Host": target.netloc, **(headers or {})}
        self._connect_timeout_seconds = connect_timeout_seconds
        self._late_message = f"no whole answer within {timeout_seconds:g} s"
        self._deadline = gevent.get_hub().loop.timer(timeout_seconds, timeout_seconds)
        self._socket: gevent.socket.socket | None = None
        self.connections = 0  # opened so far
        # The answer being read
        self._status = 0
        self._headers: dict[bytes, bytes] = {}
        self._body: list[bytes] = []
        self._in_body = False
        self._complete = True
        self._reusable = True

    def head(self, method: str, path: str, headers: Mapping[str, str] | None = None) -> bytes:
        """The request line and headers, without the blank line that ends them."""
        lines = [f"{method} {self._path}{path} HTTP/1.1"]
        lines += [f"{name}: {value}" for name, value in {**self._common, **(headers or {})}.items()]
        if any("\r" in line or "\n" in line for line in lines):
            raise ValueError("a line break in a request's path or headers")
        return "\r\n".join(lines).encode("latin-1")

    def request(
        self, method: str, path: str, *, headers: Mapping[str, str] | None = None, body: bytes = b""
    ) -> Answer:
        """Make a request up and send it; raises as `send`."""
        head = self.head(method, path, headers)
        if body or method in ("POST", "PUT", "PATCH"):
            head += b"\r\nContent-Length: %d" % len(body)
        return self.send(b"%b\r\n\r\n%b" % (head, body))

    def send(self, request: bytes) -> Answer:
        """Send a whole request, once, and wait for its whole answer.

        Raises:
            NotConnected: nothing was sent.
            NoAnswer: it was sent, or a part of it; what became of it is not known.
        """
        connection = self._socket
        if connection is None or self._idle.poll(0):  # readable while nothing is due: closed, or out of step
            connection = self._connect()
        # gevent.Timeout would do, but one that is started again after `cancel` goes on where it was stopped: its
        # user's whole waiting adds up until it fires.
        self._deadline.again(gevent.getcurrent().throw, TimedOut, self._late_message, update=True)
        whole = False
        try:
            connection.sendall(request)
            self._read_answer(connection)
            whole = True
        except OSError as exc:
            raise ConnectionBroken(exc.strerror or type(exc).__name__) from exc
        finally:  # a user who is stopped comes through here too: the answer may still come, to nobody
            self._deadline.stop()
            if not whole or not self._reusable:
                self.close()
        return Answer(self._status, self._headers, b"".join(self._body))

    def _read_answer(self, connection: gevent.socket.socket) -> None:
        self._complete = False
        try:
            while not self._complete:
                if data := connection.recv(_READ_BYTES):
                    self._parser.feed_data(data)
                else:
                    self._end_of_stream()
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as exc:
            self._reusable = False
            if not self._complete:  # what follows a complete answer only costs the connection
                raise BadAnswer("the answer is not HTTP/1.1") from exc

    def close(self) -> None:
        """Close the connection, if there is one; the next request opens another."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _connect(self) -> gevent.socket.socket:
        self.close()
        limit = gevent.Timeout(self._connect_timeout_seconds)
        try:
            with limit:
                connection = self._open()
        except gevent.Timeout as exc:
            if exc is not limit:
                raise
            raise NotConnected(f"no connection within {limit.seconds:g} s") from None
        except (OSError, UnicodeError) as exc:  # a name that cannot be a host's is a UnicodeError
            raise NotConnected(getattr(exc, "strerror", None) or str(exc)) from exc
        self._idle = _poll()
        self._idle.register(connection.fileno(), select.POLLIN)
        self._parser = httptools.HttpResponseParser(self)
        self._socket = connection
        self.connections += 1
        return connection

    def _open(self) -> gevent.socket.socket:
        failure = OSError("the name has no address")
        for family, address in _names.addresses(self._host, self._port):
            connection = gevent.socket.socket(family, stdlib_socket.SOCK_STREAM)
            try:
                connection.connect(address)
                connection.setsockopt(stdlib_socket.IPPROTO_TCP, stdlib_socket.TCP_NODELAY, 1)
                if self._secure:
                    connection = _tls().wrap_socket(connection, server_hostname=self._host)
            except BaseException as exc:
                connection.close()
                if not isinstance(exc, OSError):
                    raise
                failure = exc
            else:
                return connection
        raise failure

    def _end_of_stream(self) -> None:
        framed = b"content-length" in self._headers or b"transfer-encoding" in self._headers
        if not self._in_body or framed:
            raise ConnectionBroken("closed before the end of the answer")
        self._complete = True  # neither length nor chunks: the connection's end is the answer's

    # What the parser calls

    def on_message_begin(self) -> None:
        """Begin an answer; after a complete one it is one that nobody asked for."""
        if self._complete:
            self._reusable = False
            return
        self._headers = {}
        self._body = []
        self._in_body = False

    def on_header(self, name: bytes, value: bytes) -> None:
        """Note a header."""
        if not self._complete:
            self._headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        """Note what the head said."""
        if not self._complete:
            self._status = self._parser.get_status_code()
            self._reusable = self._parser.should_keep_alive()
            self._in_body = self._status >= _OK

    def on_body(self, data: bytes) -> None:
        """Keep a piece of the body."""
        if not self._complete:
            self._body.append(data)

    def on_message_complete(self) -> None:
        """End the answer, unless it only announced another (1xx)."""
        self._complete = self._status >= _OK
