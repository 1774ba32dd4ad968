"""The server: one process, one event loop (uvloop), uvicorn's HTTP protocol, our own start and end.

`uvicorn.Server` is not used: it raises the signal that ended it once more (exit code 143), answers its last
requests without `Connection: close`, logs a failed start-up as a traceback, and opens its port only after the
start-up, so that a taken one is found last.
"""

import asyncio
import contextlib
import errno
import functools
import os
import resource
import signal
import socket
from collections.abc import Callable, Coroutine, Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from email.utils import formatdate
from types import FrameType
from typing import Any, TypeVar, cast

import uvicorn
import uvloop
from starlette.types import ASGIApp
from uvicorn.server import ServerState

from app.background import keep_running
from app.server.protocol import Connections, LimitedHttpProtocol, Limits
from app.settings import OPERATIONS_GRACE_SECONDS, SHUTDOWN_GRACE_SECONDS, SettingsError, addresses_of

_BACKLOG = 2048  # the kernel caps it at net.core.somaxconn
_POLL_SECONDS = 0.02

_Result = TypeVar("_Result")


class PortTakenError(SettingsError):
    """Something else listens on the port."""


class Stopped(Exception):
    """A signal came during the start-up."""


@dataclass(frozen=True)
class Operations:
    """The application of a port of its own, OPS_PORT, for those who watch."""

    app: ASGIApp
    port: int  # 0: any free one


def run(serving: Coroutine[Any, Any, int]) -> int:
    """The exit code of `serve(...)`, run on a uvloop event loop."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(serving)


async def serve(
    app: ASGIApp,
    *,
    host: str,
    port: int,
    limits: Limits,
    drain_delay_seconds: float,
    on_drain: Callable[[], None],
    on_started: Callable[..., None],
    grace_seconds: float = SHUTDOWN_GRACE_SECONDS,
    operations: Operations | None = None,
    inherited: Sequence[socket.socket] = (),
) -> int:
    """Serve *app* until SIGTERM, SIGHUP or SIGINT, and end without losing a request.

    The port is bound, the application starts up, the port listens. On SIGTERM: `on_drain()`; for
    *drain_delay_seconds* everything is still accepted, and every answer says `Connection: close`; the port is
    closed; what was read is answered; the application shuts down; the port of *operations* is closed. SIGHUP does the
    same, and SIGINT skips the delay. A signal during the start-up cancels it. A second SIGTERM or SIGINT ends the
    process at once, with 128 + its number.

    Args:
        app: its lifespan must be supported; what its start-up or shutdown raises is raised here.
        host: a name or an address; every address of a name is used.
        port: 0: any free one.
        limits: of every connection.
        drain_delay_seconds: how long others may take to see that the service is not ready.
        on_drain: called once, when the first signal comes after the start-up.
        on_started: called with the URL once the port listens, and with that of *operations* where there is one.
        grace_seconds: how long requests in progress may take at the end.
        operations: shares the application's state, and answers until the application has shut down.
        inherited: bound sockets, in place of those that *host* and *port* name.

    Returns:
        The exit code: 0, or 1 where requests were given up after *grace_seconds*.

    Raises:
        PortTakenError: something else listens on the port.
        SettingsError: HOST or PORT cannot be used.
        RuntimeError: the application's start-up failed without an exception.
    """
    with contextlib.ExitStack() as stack:
        sockets = list(inherited) or stack.enter_context(bound_sockets(host, port))
        watched = (
            stack.enter_context(bound_sockets(host, operations.port, setting="OPS_PORT"))
            if operations
            else []
        )
        signalled = stack.enter_context(ending_signals())
        lifespan = _Lifespan(app)
        try:
            await until_signal(lifespan.startup(), signalled)
        except Stopped:
            return 0
        try:
            async with contextlib.AsyncExitStack() as listening:
                server = _Server(app, sockets, limits, lifespan.state)
                servers = [server]
                if operations:
                    servers.append(
                        _Server(operations.app, watched, limits, lifespan.state, setting="OPS_PORT")
                    )
                for each in servers:
                    await listening.enter_async_context(each)
                on_started(*(_url(host, ports[0]) for ports in (sockets, watched) if ports))
                stop_signal = await signalled
                on_drain()
                for each in servers:
                    each.connections.drain(each.open)
                if stop_signal != signal.SIGINT:
                    await asyncio.sleep(drain_delay_seconds)
                finished = await server.finish(grace_seconds)
                await lifespan.shutdown()
                for each in servers[1:]:
                    await each.finish(OPERATIONS_GRACE_SECONDS)
        finally:
            await lifespan.shutdown()
    return 0 if finished else 1


def raise_open_files_limit() -> None:
    """Raise the soft limit of open files to the hard one: every connection is one, and 1024 is a usual default."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # macOS refuses "unlimited"
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class _Server:
    """The listening sockets, the connections, and the tick that keeps both up to date."""

    def __init__(
        self,
        app: ASGIApp,
        sockets: list[socket.socket],
        limits: Limits,
        lifespan_state: dict[str, Any],
        *,
        setting: str = "PORT",
    ) -> None:
        self.connections = Connections(limits)
        self._sockets = sockets
        self._setting = setting
        self._state = ServerState()
        protocol = functools.partial(LimitedHttpProtocol, shared=self.connections)
        self._config = uvicorn.Config(
            cast("Any", app),
            http=cast("type[asyncio.Protocol]", protocol),
            ws="none",
            interface="asgi3",
            log_config=None,
            access_log=False,
            proxy_headers=False,  # nobody asks for the client's address
        )
        self._config.load()
        self._protocol = functools.partial(protocol, self._config, self._state, lifespan_state)
        self._listeners: list[asyncio.Server] = []

    @property
    def open(self) -> set[LimitedHttpProtocol]:
        """The open connections."""
        return cast("set[LimitedHttpProtocol]", self._state.connections)

    async def __aenter__(self) -> None:
        self._set_date()
        self._ticking = asyncio.create_task(keep_running("server_tick", self._tick))
        loop = asyncio.get_running_loop()
        try:
            for listener in self._sockets:
                listener.listen(_BACKLOG)  # uvloop would not raise that somebody was faster
                self._listeners.append(
                    await loop.create_server(self._protocol, sock=listener, backlog=_BACKLOG)
                )
        except OSError as exc:  # two may bind a port that nobody listens on yet
            self._ticking.cancel()
            raise _unusable(exc, self._setting, self._sockets[0].getsockname()[1]) from exc

    async def __aexit__(self, *_: object) -> None:
        self._ticking.cancel()
        for listener in self._listeners:
            listener.close()

    async def finish(self, grace_seconds: float) -> bool:
        """Accept nothing more and answer what was read; False if that took more than *grace_seconds*."""
        await asyncio.sleep(_POLL_SECONDS)  # accept and read what the kernel already holds
        await self._close_port()
        self.connections.end(self.open)
        try:
            async with asyncio.timeout(grace_seconds):
                while self._state.connections or self._state.tasks:  # noqa: ASYNC110  # plain sets of uvicorn's
                    await asyncio.sleep(_POLL_SECONDS)
        except TimeoutError:
            for connection in tuple(self.open):
                connection.give_up()
            for task in tuple(self._state.tasks):
                task.cancel()
            await asyncio.sleep(_POLL_SECONDS)
            return False
        return True

    async def _close_port(self) -> None:
        """Accept nothing more, but take who connected since the loop last looked: the kernel would reset them."""
        listening = [listener.dup() for listener in self._sockets]
        for listener in self._listeners:
            listener.close()
        late: list[socket.socket] = []
        for port in listening:
            port.settimeout(0)
            with port, contextlib.suppress(BlockingIOError):
                while True:
                    late.append(port.accept()[0])
        for connection in late:
            connection.settimeout(0)
            await asyncio.get_running_loop().connect_accepted_socket(self._protocol, connection)

    async def _tick(self) -> None:
        await asyncio.sleep(self.connections.limits.sweep_seconds)
        self._set_date()
        self.connections.sweep(self.open)

    def _set_date(self) -> None:
        self._state.default_headers = [(b"date", formatdate(usegmt=True).encode())]


class _Lifespan:
    """The application's start-up and shutdown (ASGI lifespan); what it raises is raised to the caller."""

    def __init__(self, app: ASGIApp) -> None:
        self.state: dict[str, Any] = {}
        self._app = app
        self._events = iter(("startup", "shutdown"))
        self._started = asyncio.Event()
        self._ending = asyncio.Event()

    async def startup(self) -> None:
        """Start the application; cancelled: its start-up is cancelled and has ended when this returns."""
        scope = {"type": "lifespan", "asgi": {"version": "3.0", "spec_version": "2.0"}, "state": self.state}
        self._task = asyncio.ensure_future(self._app(scope, self._receive, self._send))
        self._task.add_done_callback(lambda _: self._started.set())
        try:
            await self._started.wait()
        except asyncio.CancelledError:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            raise
        if self._task.done():
            self._task.result()
            raise RuntimeError("the application's start-up ended without being complete")

    async def shutdown(self) -> None:
        """Shut the application down and wait for its end; repeatable."""
        self._ending.set()
        await self._task

    async def _receive(self) -> MutableMapping[str, Any]:
        event = next(self._events)
        if event == "shutdown":
            await self._ending.wait()
        return {"type": f"lifespan.{event}"}

    async def _send(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "lifespan.startup.complete":
            self._started.set()


async def until_signal(work: Coroutine[Any, Any, _Result], signalled: asyncio.Future[int]) -> _Result:
    """Await *work*; a signal cancels it and raises `Stopped` once it has ended."""
    task = asyncio.create_task(work)
    await asyncio.wait((task, signalled), return_when=asyncio.FIRST_COMPLETED)
    if signalled.done():
        task.cancel()
        await asyncio.wait([task])
        if task.cancelled():
            raise Stopped
    return task.result()


@contextlib.contextmanager
def ending_signals(at_once: Callable[[], None] = lambda: None) -> Iterator[asyncio.Future[int]]:
    """The first SIGTERM, SIGHUP or SIGINT as a future; another SIGTERM or SIGINT ends the process at once.

    A terminal that is closed sends SIGHUP twice, once itself and once by its shell; under nohup it stays ignored.

    Handlers of the interpreter, not of the loop: they also run while a start-up step blocks the loop.

    Args:
        at_once: called before such an end.
    """
    loop = asyncio.get_running_loop()
    signalled: asyncio.Future[int] = loop.create_future()
    seen = False

    def handle(signum: int, _: FrameType | None) -> None:
        nonlocal seen
        if seen and signum != signal.SIGHUP:
            at_once()
            os._exit(128 + signum)
        if not seen:
            seen = True
            loop.call_soon_threadsafe(signalled.set_result, signum)

    ending = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        ending.append(signal.SIGHUP)
    before = {signum: signal.signal(signum, handle) for signum in ending}
    try:
        yield signalled
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


@contextlib.contextmanager
def bound_sockets(
    host: str, port: int, *, setting: str = "PORT", shared: bool = False
) -> Iterator[list[socket.socket]]:
    """Bound sockets, one per address of *host*, that do not listen yet.

    Args:
        host, port: as of `serve`.
        setting: names the port in a refusal.
        shared: others that are shared, too, may be bound to the same port: the kernel spreads connections over them.
    """
    with contextlib.ExitStack() as stack:
        sockets: list[socket.socket] = []
        failure: OSError | None = None
        for family, protocol, address in addresses_of(host, port):
            wanted = sockets[0].getsockname()[1] if sockets else port
            try:
                bound = stack.enter_context(socket.socket(family, socket.SOCK_STREAM, protocol))
                bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if shared:
                    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                bound.bind((address[0], wanted, *address[2:]))
            except OSError as exc:
                if exc.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise _unusable(exc, setting, wanted) from exc
                failure = exc  # a name may have an address that this machine has not, ::1 in a container
            else:
                sockets.append(bound)
        if not sockets:
            raise SettingsError(f"HOST: {host!r} is not an address of this machine") from failure
        yield sockets


def _unusable(exc: OSError, setting: str, port: int) -> SettingsError:
    if exc.errno == errno.EADDRINUSE:
        return PortTakenError(
            f"{setting}: {port} is taken; stop what listens there, or set {setting} to another one"
        )
    if exc.errno == errno.EACCES:
        return SettingsError(
            f"{setting}: {port} needs privileges to listen on; set {setting} to 1024 or more"
        )
    return SettingsError(f"{setting}: cannot listen on {port}: {exc.strerror}")


def _url(host: str, listener: socket.socket) -> str:
    port = listener.getsockname()[1]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
