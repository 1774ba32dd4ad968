"""HTTP/1.1 for one connection: uvicorn's protocol, with bounds on what a client may hold, and for how long.

uvicorn 0.54 bounds neither the time a request may take to arrive nor the size of its headers. Time is counted in
sweeps of all connections, twice a second, instead of in timers of every request: nothing is armed or cancelled on
the request path, and no client is blamed for a time in which this process itself stood still.
"""

import asyncio
import math
import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import unquote

import httptools
from starlette.types import Scope
from typing_extensions import override
from uvicorn.config import Config
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from app.errors import InternalError, Overloaded, RequestTimeout, ServiceError, Validation
from app.headers import headers_of
from app.middleware import book, request_id_of
from app.problems import problem_answer
from app.server.exchange import Exchange
from app.server.head import check_head

_AGE_JITTER = 0.2  # connections that were opened together do not all come back together
_LINGER_SECONDS = 2.0  # nginx waits 5 s (lingering_timeout)
_FIRST_REQUEST_SECONDS = 1.0  # at the end, for a connection that was accepted and has not asked yet

_ASGI = {"version": "3.0", "spec_version": "2.3"}

_READ_AHEAD = 4  # requests of a connection that may wait for their turn, before no more is parsed
_HEAD_END = b"\r\n\r\n"

# What the connection is reading.
_NOTHING, _HEAD, _BODY, _DISCARDING = range(4)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds on what one connection may take; times are kept to one sweep."""

    keep_alive_seconds: float = 75
    max_age_seconds: float = 60  # give or take a fifth
    head_seconds: float = 10  # from its first byte; the first one's from the connection's opening
    body_seconds: float = 30  # from the end of the head
    write_seconds: float = 60  # for a client to read what was sent to it
    head_bytes: int = 32 * 1024  # the target and all headers
    # Of all connections together. What is over them is taken from whoever holds most.
    unserved_bytes: int = (
        64 * 1024 * 1024
    )  # bodies that are not complete, and requests that wait for their turn
    unread_bytes: int = 64 * 1024 * 1024  # answers that the clients do not take
    sweep_seconds: float = 0.5


class Connections:
    """The state that the connections of one server share: their limits, the clock, and the server's end."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.sweeps = 0  # the clock
        self.draining = False
        self.ending = False
        self.unserved_bytes = 0
        self.head_sweeps = self.sweeps_of(limits.head_seconds)
        self.body_sweeps = self.sweeps_of(limits.body_seconds)
        self.write_sweeps = self.sweeps_of(limits.write_seconds)
        self.keep_alive_sweeps = self.sweeps_of(limits.keep_alive_seconds)
        self.linger_sweeps = self.sweeps_of(_LINGER_SECONDS)
        self.first_request_sweeps = self.sweeps_of(_FIRST_REQUEST_SECONDS)

    def sweeps_of(self, seconds: float) -> int:
        """The number of sweeps that pass in *seconds*, rounded up."""
        return math.ceil(seconds / self.limits.sweep_seconds)

    def sweep(self, connections: Iterable["LimitedHttpProtocol"]) -> None:
        """Let every connection look at the clock."""
        self.sweeps += 1
        for connection in tuple(connections):
            connection.check()
        self._bound_unread(connections)

    def bound_unserved(self, connections: Iterable["LimitedHttpProtocol"]) -> None:
        """Refuse the largest requests that are not served yet, until what they hold is within its bound."""
        while self.unserved_bytes > self.limits.unserved_bytes:
            max(connections, key=lambda connection: connection.unserved_bytes).refuse_unserved()

    def _bound_unread(self, connections: Iterable["LimitedHttpProtocol"]) -> None:
        """Cut off the clients that have most to read, until what all have is within its bound."""
        unread = [(connection.unread_bytes, connection) for connection in connections]
        excess = sum(size for size, _ in unread) - self.limits.unread_bytes
        for size, connection in sorted(unread, key=lambda each: each[0], reverse=True):
            if excess <= 0:
                return
            connection.transport.abort()
            excess -= size

    def drain(self, connections: Iterable["LimitedHttpProtocol"]) -> None:
        """Let every answer from now on say `Connection: close`."""
        self.draining = True
        for connection in tuple(connections):
            connection.retire()

    def end(self, connections: Iterable["LimitedHttpProtocol"]) -> None:
        """Close what is idle, and everything else after the answer it waits for."""
        self.ending = True
        self.drain(connections)
        for connection in tuple(connections):
            connection.shutdown()


class LimitedHttpProtocol(HttpToolsProtocol):
    """uvicorn's protocol within `Limits`; what it refuses by itself it answers as problem+json, and closes.

    408: the request did not arrive in time; 431: its head is over the limit; 400: it is not HTTP/1.1. A refusal
    waits for the answers to the requests before it, so that none of them is taken for refused.
    """

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        shared: Connections,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._shared = shared
        self._head_limit = shared.limits.head_bytes
        self._reading = _NOTHING
        self._since = 0  # the sweep in which it began to read that
        self._flushed_at = 0  # the last sweep that found nothing unsent
        self._retires_at = 0
        self._retiring = shared.draining
        # The oldest without its answer; `cycle` is the newest that was read.
        self._serving: Exchange | None = None
        self._refusal: ServiceError | None = None  # owed, after the answers before it
        # Of a request that offers an upgrade and has a body: the head under which the parser reads that body.
        self._body_head = b""
        self._received = b""  # and not parsed yet, from `_parsed` on: enough requests wait
        self._parsed = 0
        self.unserved_bytes = 0  # of `_received`, of the bodies that wait, of the one that is being read
        self._body_bytes = 0
        self._chunk_bytes = 0
        self._head_bytes = 0  # of the chunks before this one; the one it began in counts as 1

    # What the transport calls

    @override
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        shared = self._shared
        self._since = self._flushed_at = shared.sweeps
        age = shared.limits.max_age_seconds * random.uniform(1 - _AGE_JITTER, 1 + _AGE_JITTER)  # noqa: S311
        self._retires_at = shared.sweeps + shared.sweeps_of(age)

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._serving is not None:  # with requests behind it, it is not the cycle
            self._serving.disconnected = True
            self._serving.message_event.set()
        # An exchange knows its connection: what would stay, bodies and all, until the collector of cycles runs.
        self.pipeline.clear()
        self._received = b""
        self._reading = _NOTHING
        self._count_unserved()
        self.cycle = self._serving = None  # type: ignore[assignment]

    @override
    def data_received(self, data: bytes) -> None:
        if self._received or data.count(_HEAD_END) > _READ_AHEAD:
            self._received = self._received[self._parsed :] + data
            self._parsed = 0
            self._parse()
        else:
            rest = memoryview(data)
            while rest and self._reading != _DISCARDING:
                rest = self._read(rest)
        if self._reading == _BODY or self.pipeline or self.unserved_bytes:
            self._count_unserved()
            self._shared.bound_unserved(cast("set[LimitedHttpProtocol]", self.connections))

    def _parse(self) -> None:
        """Parse what may hold many requests, until enough of them wait for their turn.

        The parser cannot be stopped within what it is given: it is given one head after the other.
        """
        data, at = self._received, self._parsed
        view = memoryview(data)
        while at < len(data) and self._reading != _DISCARDING:
            if len(self.pipeline) >= _READ_AHEAD:
                self._parsed = at
                return
            end = data.find(_HEAD_END, at) + len(_HEAD_END)
            if end < len(_HEAD_END):
                end = len(data)
            at = end - len(self._read(view[at:end]))
        self._received, self._parsed = b"", 0

    def _read(self, data: memoryview) -> memoryview:
        """Parse *data*, and return what of it is still to be parsed."""
        self._chunk_bytes = len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            # An offer that may be ignored (RFC 9110, 7.8): clients go on in HTTP/1.1 (Java's HttpClient offers h2c
            # by default). uvicorn would drop the rest of the chunk, and log a warning each time.
            if self._body_head:
                self.parser = httptools.HttpRequestParser(
                    self
                )  # where the connection ends, the old one reads no more
                self.parser.feed_data(self._body_head)
            return data[upgrade.args[0] :]
        except httptools.HttpParserError as exc:
            refusal = exc.__context__
            if isinstance(
                refusal, ServiceError
            ):  # of a callback; what it leads back to would outlive the connection
                refusal.__traceback__ = None
                self._refuse(refusal)
            else:
                self._refuse(Validation("the request is not valid HTTP/1.1", status=400))
        else:
            if self._reading != _NOTHING:
                self._await_more()
        return data[:0]

    @override
    def shutdown(self) -> None:
        """End: at once when idle, else after the answer. A request whose first bytes are here is still read."""
        self.retire()
        if self._answering():
            if not self.pipeline:
                self.cycle.keep_alive = False
        elif self._reading == _NOTHING and self.cycle is not None:
            self.transport.close()

    # What the parser calls

    @override
    def on_message_begin(self) -> None:
        self.url = b""
        self.headers = []
        self._reading = _HEAD
        self._head_bytes = 0
        if self.cycle is not None:
            self._since = self._shared.sweeps

    @override
    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value))

    @override
    def on_headers_complete(self) -> None:
        if self._body_head:  # which the parser has just read: its body follows
            self._body_head = b""
            self.headers = []
            self._reading = _BODY
            return
        if (self._head_bytes or self._chunk_bytes > self._head_limit) and (
            len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers) > self._head_limit
        ):
            raise self._too_large()
        previous = self.cycle
        method, version = self.parser.get_method(), self.parser.get_http_version()
        headers = check_head(method, version, self.headers)
        is_old = version == "1.0"
        self.cycle = exchange = Exchange(  # type: ignore[assignment]
            self,
            self._scope(method.decode("ascii"), version, headers),
            # HTTP/1.0 knows no 100 (RFC 9110, 10.1.1).
            wants_continue=headers.get(b"expect", b"").lower() == b"100-continue" and not is_old,
            keep_alive=self.parser.should_keep_alive() and not is_old,
        )
        if self.parser.should_upgrade():
            self._body_head = _body_head(self.headers, keep_alive=self.parser.should_keep_alive())
        self.headers = []  # trailers would be added to those the application reads
        self._reading = _BODY
        self._body_bytes = 0
        self._head_bytes = 0
        self._since = self._shared.sweeps
        if previous is None or previous.response_complete:
            if self._retiring:
                exchange.keep_alive = False
            self._serve(exchange)
        else:
            self.flow.pause_reading()
            self.pipeline.appendleft((exchange, self.app))  # type: ignore[arg-type]

    @override
    def on_body(self, body: bytes) -> None:
        self._head_bytes = 0
        exchange = self.cycle
        if not exchange.response_complete:
            self._body_bytes += len(body)
            exchange.body += body
            if len(exchange.body) > HIGH_WATER_LIMIT:
                self.flow.pause_reading()
            exchange.message_event.set()

    @override
    def on_message_complete(self) -> None:
        if self._body_head:  # the parser ends a message that offers an upgrade at its head
            return
        exchange = self.cycle
        if not exchange.response_complete:
            exchange.more_body = False
            exchange.message_event.set()
        self._reading = _NOTHING
        self._since = self._shared.sweeps

    # What the answer calls

    @override
    def on_response_complete(self) -> None:
        if self.transport.is_closing():
            return
        if self.pipeline:
            cycle, _ = self.pipeline.pop()
            if self._received:
                self._parse()
            self._count_unserved()
            if self._retiring and not self.pipeline:
                cycle.keep_alive = False
            self._serve(cycle)  # type: ignore[arg-type]
        elif self._refusal is not None:
            self.answer(self._refusal)
        elif self._reading == _NOTHING:
            self._since = self._shared.sweeps
        self.resume_reading()

    def resume_reading(self) -> None:
        """Read on, unless requests that were read already wait for their turn."""
        if not self.pipeline:
            self.flow.resume_reading()

    def close_after_answer(self) -> None:
        """Close, gently where the request's body is still arriving; a refusal that lingers does so by itself."""
        if self._reading == _BODY and not self.pipeline:
            self._linger()
        elif self._reading != _DISCARDING or self._refusal is not None:
            self.transport.close()

    def answer(self, refusal: ServiceError, scope: Scope | None = None) -> None:
        """Answer the request in *scope*, or the one whose head is not read to its end, and close."""
        request_id: bytes | None = None if scope is None else scope.get("request_id")
        if scope is None or request_id is None:  # no application knows of it, and would book it
            request_id = request_id_of(dict(self.headers or ()) if scope is None else headers_of(scope))
            log = {"error_type": refusal.error_type, "outcome": refusal.outcome}
            seconds = (self._shared.sweeps - self._since) * self._shared.limits.sweep_seconds
            book("other", "unmatched", refusal.http_status, seconds, request_id, log)
        if scope is not None:
            scope["refusal"] = refusal
        headers, body = problem_answer(refusal)
        content = [STATUS_LINE[refusal.http_status]]
        for name, value in (
            *self.server_state.default_headers,
            *headers,
            (b"x-request-id", request_id),
            (b"connection", b"close"),
        ):
            content += [name, b": ", value, b"\r\n"]
        self.transport.write(b"".join([*content, b"\r\n", body]))
        self._linger()

    # What the server calls

    @property
    def unread_bytes(self) -> int:
        """The answers that the client has not taken yet, as far as this process holds them."""
        return 0 if self.transport.is_closing() else self.transport.get_write_buffer_size()

    def refuse_unserved(self) -> None:
        """Refuse the first request that is not served yet, and drop what came after it."""
        refusal = Overloaded("the requests that are not complete hold too much", retry_after_seconds=1)
        if self.pipeline:
            self.pipeline.clear()
            self.cycle = self._serving  # type: ignore[assignment]
            self._reading = _DISCARDING
            self._refusal = refusal
        else:
            self._refuse(refusal)
            self._reading = _DISCARDING  # also where it can only be closed
        self._received = b""
        self._count_unserved()

    def check(self) -> None:
        """Look at the clock: once a sweep."""
        shared = self._shared
        if self.transport.get_write_buffer_size() == 0:
            self._flushed_at = shared.sweeps
        elif shared.sweeps - self._flushed_at > shared.write_sweeps:
            self.transport.abort()
        if self.transport.is_closing():
            return
        if shared.sweeps >= self._retires_at and not self._retiring:
            self.retire()
        if self.flow.read_paused:
            self._since = shared.sweeps  # it is our turn, not the client's
        self._check_reading(shared.sweeps - self._since)

    def retire(self) -> None:
        """Make the next answer the connection's last, and let it say so."""
        self._retiring = True
        if self._answering() and not self.pipeline and not self.cycle.response_started:
            self.cycle.keep_alive = False

    def give_up(self) -> None:
        """End without waiting any longer; a request in progress is told that its outcome is unknown."""
        if (
            self._answering()
            and not self.pipeline
            and not self.cycle.response_started
            and not self.transport.is_closing()
        ):
            self._drop_cycle()
            refusal = InternalError("the service stopped before it had an answer", outcome="unknown")
            self.answer(refusal, self.cycle.scope)  # type: ignore[arg-type]
            self.transport.close()
        else:
            self.transport.abort()

    # Inside

    def _serve(self, exchange: Exchange) -> None:
        self._serving = exchange
        self._start_asgi_task(exchange, self.app)  # type: ignore[arg-type]

    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _count_unserved(self) -> None:
        held = len(self._received) + sum(len(cycle.body) for cycle, _ in self.pipeline)
        if self._reading == _BODY and not self.pipeline and not self.cycle.response_complete:
            held += self._body_bytes
        self._shared.unserved_bytes += held - self.unserved_bytes
        self.unserved_bytes = held

    def _await_more(self) -> None:
        """Bound what is kept of a head, or of trailers, that did not end in this chunk."""
        self._head_bytes += self._chunk_bytes if self._head_bytes else 1
        if self._head_bytes > self._head_limit:
            self._refuse(self._too_large())

    def _check_reading(self, sweeps: int) -> None:
        """Act on having read the same part for so many *sweeps*."""
        shared = self._shared
        if self._reading == _BODY:
            if sweeps > shared.body_sweeps:
                self._refuse_late("body", shared.limits.body_seconds)
        elif self._reading == _DISCARDING:
            if sweeps > shared.linger_sweeps and self._refusal is None:
                self.transport.abort()
        elif self._reading == _HEAD or self.cycle is None:
            if sweeps > shared.head_sweeps and self._reading == _NOTHING:
                self.transport.close()  # a client would take a 408 for the answer to its first request
            elif sweeps > shared.head_sweeps:
                self._refuse_late("head", shared.limits.head_seconds)
            elif shared.ending and self._reading == _NOTHING and sweeps > shared.first_request_sweeps:
                self.transport.close()
        elif sweeps > shared.keep_alive_sweeps and not self._answering():
            self.transport.close()

    def _too_large(self) -> ServiceError:
        limit = self._head_limit
        return Validation(f"the request's headers are over the limit of {limit} bytes", status=431)

    def _refuse_late(self, part: str, seconds: float) -> None:
        self._refuse(RequestTimeout(f"the request's {part} did not arrive within {seconds:g} s"))

    def _refuse(self, refusal: ServiceError) -> None:
        """Answer the request being read with *refusal*, in its turn, and read no other."""
        if self._reading == _BODY:  # it has a cycle already: the newest
            if self.pipeline:
                self.pipeline.popleft()
                self.cycle = self.pipeline[0][0] if self.pipeline else self._serving  # type: ignore[assignment]
            elif self.cycle.response_started:
                self.transport.close()
                return
            else:
                self._drop_cycle()
                self.answer(refusal, self.cycle.scope)  # type: ignore[arg-type]
                return
        self._reading = _DISCARDING
        if self._answering():
            self._refusal = refusal
        else:
            self.answer(refusal)

    def _drop_cycle(self) -> None:
        """Tell the application that its client is gone; what it still sends is thrown away."""
        self.cycle.disconnected = True
        self.cycle.message_event.set()

    def _scope(self, method: str, version: str, headers: dict[bytes, bytes]) -> Scope:
        """The ASGI scope of the request whose head was read."""
        url = self.url
        if url.startswith(b"/") and b"#" not in url:
            path, _, query = url.partition(b"?")
        else:  # a proxy's absolute form, a fragment that no client should send
            parsed = httptools.parse_url(url)
            path, query = parsed.path or b"/", parsed.query or b""
        return {
            "type": "http",
            "asgi": _ASGI,
            "http_version": version,
            "server": self.server,
            "client": self.client,
            "scheme": "http",
            "method": method,
            "path": unquote(path.decode("ascii")) if b"%" in path else path.decode("ascii"),
            "raw_path": path,
            "query_string": query,
            "root_path": "",
            "headers": self.headers,
            "headers_by_name": headers,
            "state": self.app_state.copy(),
        }

    def _linger(self) -> None:
        """End our side, and read on until the client has ended its own.

        Closing a socket that holds unread bytes resets the connection, and the reset can overtake the answer
        (RFC 9112, 9.6).
        """
        self._refusal = None
        self._reading = _DISCARDING
        self._since = self._shared.sweeps
        self.flow.resume_reading()
        self.transport.write_eof()


def _body_head(headers: list[tuple[bytes, bytes]], *, keep_alive: bool) -> bytes:
    """A head that offers no upgrade, and frames the body as *headers* do; empty where there is none.

    The parser ends a message that offers an upgrade at its head, and would read the body as the next request.
    """
    for name, value in headers:
        if name == b"transfer-encoding" or (name == b"content-length" and int(value)):
            connection = b"keep-alive" if keep_alive else b"close"
            return b"POST / HTTP/1.1\r\nConnection: %b\r\n%b: %b\r\n\r\n" % (connection, name, value)
    return b""
