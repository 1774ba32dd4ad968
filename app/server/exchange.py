"""One request and its answer, between a connection and the ASGI application: in place of uvicorn's cycle.

uvicorn's checks each answer's headers with two regular expressions apiece and writes the head and the body one after
the other, which uvloop sends in two system calls. This one takes a third of its time.
"""

import asyncio
from typing import Protocol

import structlog
from starlette.types import ASGIApp, Message, Scope
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE
from uvicorn.server import ServerState

from app.errors import InternalError, ServiceError
from app.middleware import is_cancelled

_BODILESS = frozenset({204, 304})
_log = structlog.get_logger("app.server.exchange")


class Connection(Protocol):
    """A connection, as far as its exchanges need it."""

    transport: asyncio.Transport
    flow: FlowControl
    server_state: ServerState

    def resume_reading(self) -> None:
        """Read on, unless requests that were read already wait for their turn."""

    def on_response_complete(self) -> None:
        """Go on with the next request."""

    def close_after_answer(self) -> None:
        """Close; the answer is complete, or never will be."""

    def answer(self, refusal: ServiceError, scope: Scope) -> None:
        """Answer the request in *scope* by itself, and close."""


class Exchange:
    """One request as the application receives it, and what the application sends for it."""

    __slots__ = (
        "_chunked",
        "_connection",
        "_head",
        "_missing_bytes",
        "body",
        "disconnected",
        "keep_alive",
        "message_event",
        "more_body",
        "response_complete",
        "response_started",
        "scope",
        "wants_continue",
    )

    def __init__(
        self, connection: Connection, scope: Scope, *, wants_continue: bool, keep_alive: bool
    ) -> None:
        self.scope = scope
        self.wants_continue = wants_continue
        self.keep_alive = keep_alive
        self.disconnected = False
        # The request's body, as far as it is here and not taken.
        self.body = bytearray()
        self.more_body = True
        self.message_event = asyncio.Event()  # there is more of it, or there will be none
        # The answer.
        self.response_started = False
        self.response_complete = False
        self._connection = connection
        self._head = b""  # held back: it goes out with the first bytes of the body
        self._chunked = False
        self._missing_bytes = 0  # of a body whose length was told

    async def run_asgi(self, app: ASGIApp) -> None:
        """Let *app* serve the request; what it leaves unanswered is answered or cut off."""
        try:
            await app(self.scope, self.receive, self.send)
        except asyncio.CancelledError:
            if is_cancelled():
                raise
            # Nobody cancelled this request: something it waited for was, and the client still waits.
            _log.exception("application_failed")
        except Exception:  # noqa: BLE001 - logged; there is nobody above who could do anything about it
            _log.exception("application_failed")
        if self.response_complete or self.disconnected:
            return
        if self.response_started:
            self._connection.close_after_answer()
        else:
            self._connection.answer(InternalError(outcome="unknown"), self.scope)

    async def receive(self) -> Message:
        """The ASGI `receive`: the next part of the body, or that the client is gone or answered."""
        if not self.disconnected and not self.response_complete:
            if self.wants_continue and not self.response_started:
                self.wants_continue = False
                self._connection.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            self._connection.resume_reading()
            await self.message_event.wait()
            self.message_event.clear()
        if self.disconnected or self.response_complete:
            return {"type": "http.disconnect"}
        body, self.body = bytes(self.body), bytearray()
        return {"type": "http.request", "body": body, "more_body": self.more_body}

    async def send(self, message: Message) -> None:
        """The ASGI `send`.

        Raises:
            RuntimeError: the application's messages make no HTTP answer.
        """
        flow = self._connection.flow
        if flow.write_paused and not self.disconnected:
            await flow.drain()
        if self.disconnected:
            return
        kind = message["type"]
        if kind == "http.response.start" and not self.response_started:
            self._start(message)
        elif kind == "http.response.body" and self.response_started and not self.response_complete:
            self._continue(message.get("body", b""), is_last=not message.get("more_body", False))
        elif kind == "http.response.abort":  # of our own: a fault that was asked for
            self.disconnected = True
            self._connection.transport.abort()
        else:
            raise RuntimeError(f"{kind} does not come here in an answer")

    def _start(self, message: Message) -> None:
        status = message["status"]
        lines = [STATUS_LINE[status][:-2]]
        length = None
        for name, value in (*self._connection.server_state.default_headers, *message.get("headers", ())):
            if name == b"connection":
                self.keep_alive = self.keep_alive and b"close" not in value.lower()
                continue
            if name == b"content-length":
                length = int(value)
            lines.append(name + b": " + value)
        if not self.keep_alive:
            lines.append(b"connection: close")
        if status in _BODILESS or self.scope["method"] == "HEAD":
            length = 0
        elif length is None:
            self._chunked = True
            lines.append(b"transfer-encoding: chunked")
        self._missing_bytes = length or 0
        head = b"\r\n".join(lines)
        if not head.count(b"\n") == head.count(b"\r") == len(lines) - 1:
            raise RuntimeError("a header of the answer holds a line break")
        self._head = head + b"\r\n\r\n"
        self.response_started = True

    def _continue(self, body: bytes, *, is_last: bool) -> None:
        if self.scope["method"] == "HEAD":
            body = b""
        elif self._chunked:
            body = (b"%x\r\n%b\r\n" % (len(body), body) if body else b"") + (b"0\r\n\r\n" if is_last else b"")
        else:
            self._missing_bytes -= len(body)
            if self._missing_bytes < 0 or (is_last and self._missing_bytes):
                raise RuntimeError("the answer's body is not as long as its content-length")
        if self._head:
            body, self._head = self._head + body, b""
        if body:
            self._connection.transport.write(body)
        if is_last:
            self.response_complete = True
            self.message_event.set()
            if not self.keep_alive:
                self._connection.close_after_answer()
            self._connection.on_response_complete()
