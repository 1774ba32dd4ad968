"""The server's start and end, with real signals: most tests run it as a process of its own."""

import asyncio
import contextlib
import errno
import http.client
import json
import logging
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from fastapi import FastAPI
from starlette.types import Receive, Scope, Send

from app.server import serve as server_module
from app.server.protocol import Limits
from app.server.serve import PortTakenError, serve
from app.settings import SettingsError

_LOWEST_FREE_PORT = Path("/proc/sys/net/ipv4/ip_unprivileged_port_start")
ROOT = Path(__file__).parents[2]
REQUEST = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"

# Reports what happens to it, one line each. /readyz is 503 once it drains; /held answers once `release` exists.
PROGRAM = """
import asyncio, json, os, pathlib, sys
from app.server import serve as server_module
from app.server.protocol import Limits
from app.server.serve import run, serve

options = json.loads(sys.argv[1])
release = pathlib.Path(options.pop("release"))
blocked_start = options.pop("blocked_start", False)
draining = False

def say(*words):
    print(*words, flush=True)

def on_drain():
    global draining
    draining = True
    say("draining")

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        await receive()
        say("starting")
        if blocked_start:
            try:
                await asyncio.Event().wait()
            finally:
                await asyncio.sleep(0)
                say("start undone")
        await send({"type": "lifespan.startup.complete"})
        await receive()
        say("stopped")
        await send({"type": "lifespan.shutdown.complete"})
        return
    status = 200
    if scope["path"] == "/readyz":
        status = 503 if draining else 200
    elif scope["path"] == "/held":
        say("held")
        while not release.exists():
            await asyncio.sleep(0.01)
    else:
        say("request", scope["path"])
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})

sys.exit(run(serve(app, **options, limits=Limits(), on_drain=on_drain, on_started=lambda url: say("started", url))))
"""


class Server:
    """The program as a child process."""

    def __init__(self, release: Path, **options: Any) -> None:
        defaults = {"host": "127.0.0.1", "port": 0, "drain_delay_seconds": 0}
        self.release = release
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, json.dumps({**defaults, "release": str(release), **options})],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __iter__(self) -> Iterator[str]:
        assert self.process.stdout
        for line in self.process.stdout:
            self.lines.append(line.strip())
            yield self.lines[-1]

    def until(self, start: str) -> str:
        """The next line that begins with *start*."""
        for line in self:
            if line.startswith(start):
                return line
        pytest.fail(f"ended without {start!r}: {self.lines}")

    def wait_until_started(self) -> str:
        self.url = self.until("started").split()[1]
        self.netloc = urlsplit(self.url).netloc
        self.address = (urlsplit(self.url).hostname, urlsplit(self.url).port)
        return self.url

    def connect(self) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection(self.netloc, timeout=30)
        connection.connect()
        return connection

    def send_signal(self, signum: signal.Signals) -> None:
        self.process.send_signal(signum)

    def exit_code(self) -> int:
        """The exit code; the rest of what it says is in `lines`."""
        for _ in self:
            pass
        return self.process.wait(30)


@pytest.fixture
def start_server(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(**options: Any) -> Server:
        servers.append(Server(tmp_path / "release", **options))
        return servers[-1]

    yield start
    for server in servers:
        server.process.kill()
        server.process.wait()
        assert server.process.stdout
        server.process.stdout.close()


def get(connection: http.client.HTTPConnection, path: str) -> http.client.HTTPResponse:
    connection.request("GET", path)
    response = connection.getresponse()
    response.read()
    return response


# The end


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_ends_it_cleanly(start_server: Callable[..., Server], signum: signal.Signals) -> None:
    """A signalled service drains, closes idle connections at once, shuts the application down, and exits with 0."""
    server = start_server()
    server.wait_until_started()
    with contextlib.closing(server.connect()) as idle:
        assert get(idle, "/").status == 200
        server.send_signal(signum)
        assert server.exit_code() == 0
        assert idle.sock.recv(1) == b""
    assert server.lines[-2:] == ["draining", "stopped"]


def test_a_request_in_progress_is_answered(start_server: Callable[..., Server]) -> None:
    """A request that was read before the signal gets its answer, which says close; then the application stops."""
    server = start_server()
    server.wait_until_started()
    with contextlib.closing(server.connect()) as busy:
        busy.request("GET", "/held")
        server.until("held")
        server.send_signal(signal.SIGTERM)
        server.until("draining")
        while _accepts(server.address):
            time.sleep(0.01)
        server.release.touch()
        response = busy.getresponse()
        assert (response.status, response.read()) == (200, b"ok")
        assert response.getheader("connection") == "close"
    assert server.exit_code() == 0
    assert server.lines[-1] == "stopped"


def test_a_request_that_began_to_arrive_is_still_read(start_server: Callable[..., Server]) -> None:
    """A request of which only the first bytes were there when the port was closed is answered too."""
    server = start_server()
    server.wait_until_started()
    with socket.create_connection(server.address) as client:
        client.sendall(REQUEST[:10])
        server.send_signal(signal.SIGTERM)
        server.until("draining")
        while _accepts(server.address):
            time.sleep(0.01)
        client.sendall(REQUEST[10:])
        assert b"200 OK" in client.recv(1000)
    assert server.exit_code() == 0


def test_requests_in_progress_are_given_up_in_the_end(start_server: Callable[..., Server]) -> None:
    """After the grace time a request is told that its outcome is unknown; the application still shuts down."""
    server = start_server(grace_seconds=0.2)
    server.wait_until_started()
    with contextlib.closing(server.connect()) as busy:
        busy.request("GET", "/held")
        server.until("held")
        server.send_signal(signal.SIGTERM)
        response = busy.getresponse()
        assert (response.status, json.load(response)["outcome"]) == (500, "unknown")
    assert server.exit_code() == 1
    assert server.lines[-1] == "stopped"


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_second_signal_ends_it_at_once(start_server: Callable[..., Server], second: signal.Signals) -> None:
    """A second signal ends the process, whatever is in progress, and its code says that it was not clean."""
    server = start_server()
    server.wait_until_started()
    with contextlib.closing(server.connect()) as busy:
        busy.request("GET", "/held")
        server.until("held")
        server.send_signal(signal.SIGTERM)
        server.until("draining")
        server.send_signal(second)
        assert server.exit_code() == 128 + second
    assert "stopped" not in server.lines


def test_sigint_does_not_wait_for_anybody(start_server: Callable[..., Server]) -> None:
    """SIGINT skips the delay that SIGTERM leaves to load balancers."""
    server = start_server(drain_delay_seconds=3600)
    server.wait_until_started()
    server.send_signal(signal.SIGINT)
    assert server.exit_code() == 0


def test_draining_loses_no_request(start_server: Callable[..., Server]) -> None:
    """Under steady load: first not ready and still accepting, every answer saying close; what it read it answers."""
    server = start_server(drain_delay_seconds=1.0)
    server.wait_until_started()
    clients = [_SteadyClient(server, f"/{number}") for number in range(8)]
    for client in clients:
        client.start()
    for client in clients:
        client.answered_some.wait(30)
    server.send_signal(signal.SIGTERM)
    server.until("draining")
    with contextlib.closing(server.connect()) as probe:
        assert get(probe, "/readyz").status == 503
    with contextlib.closing(server.connect()) as late:
        answer = get(late, "/late")
        assert (answer.status, answer.getheader("connection")) == (200, "close")
    assert server.exit_code() == 0
    for client in clients:
        client.join(30)
        assert not client.is_alive()
        assert server.lines.count(f"request {client.path}") == client.answers
        assert client.lost == 0
        assert client.closes > 1
    assert server.lines[-1] == "stopped"


class _SteadyClient(threading.Thread):
    """Sends one request after the other, on a connection as long as it lasts, until the port is closed."""

    def __init__(self, server: Server, path: str) -> None:
        super().__init__(daemon=True)
        self.server, self.path = server, path
        self.answers = self.closes = self.lost = 0
        self.answered_some = threading.Event()

    def run(self) -> None:
        while True:
            try:
                connection = self.server.connect()
            except ConnectionError:
                return
            with contextlib.closing(connection):
                try:
                    self._use(connection)
                except ConnectionError as exc:
                    # The kernel may complete a connection in the instant in which the port is closed: it
                    # resets it then, and the server never knew. Any other failure is a lost request.
                    self.lost += exc.errno != errno.ECONNRESET
                    return

    def _use(self, connection: http.client.HTTPConnection) -> None:
        while connection.sock:
            response = get(connection, self.path)
            self.answers += 1
            if self.answers == 10:
                self.answered_some.set()
            if response.getheader("connection") == "close":
                self.closes += 1


def _accepts(address: tuple[str | None, int | None]) -> bool:
    try:
        socket.create_connection(address).close()
    except ConnectionRefusedError:
        return False
    except ConnectionResetError:
        return True
    return True


# The start


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_during_the_start_undoes_it(
    start_server: Callable[..., Server], signum: signal.Signals
) -> None:
    """The application's start-up is cancelled, its own clean-up runs, nothing was served, and it exits with 0."""
    server = start_server(blocked_start=True)
    server.until("starting")
    server.send_signal(signum)
    assert server.exit_code() == 0
    assert server.lines == ["starting", "start undone"]


async def test_a_cancelled_start_has_ended_when_serve_returns() -> None:
    """The application's clean-up is waited for, however long it takes: a database that it started is stopped by it."""
    starting, cleaned_up = asyncio.Event(), asyncio.Event()

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        try:
            starting.set()
            await asyncio.Event().wait()
            yield
        finally:
            await asyncio.sleep(0.05)
            cleaned_up.set()

    serving = asyncio.create_task(_serve(FastAPI(lifespan=lifespan)))
    await starting.wait()
    signal.raise_signal(signal.SIGTERM)
    assert await serving == 0
    assert cleaned_up.is_set()


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_every_loopback_address_is_served(start_server: Callable[..., Server], host: str) -> None:
    """The URL that is reported holds the real port and works, IPv6 in brackets."""
    if host == "::1" and not _has_ipv6():
        pytest.skip("this machine has no IPv6")
    server = start_server(host=host)
    url = server.wait_until_started()
    port = urlsplit(url).port
    assert url == f"http://[::1]:{port}" if host == "::1" else f"http://{host}:{port}"
    with contextlib.closing(server.connect()) as connection:
        assert get(connection, "/").status == 200


def _has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


async def _serve(app: Any, **options: Any) -> int:
    started: Callable[[str], None] = options.pop("on_started", lambda _: None)
    defaults: dict[str, Any] = {"host": "127.0.0.1", "port": 0, "limits": Limits(), "drain_delay_seconds": 0}
    return await serve(app, **{**defaults, **options}, on_drain=lambda: None, on_started=started)


async def _never(scope: Scope, receive: Receive, send: Send) -> None:
    pytest.fail("the application was started")


async def test_nothing_listens_before_the_start_is_complete() -> None:
    """A connection is refused until the application has started, and served from then on."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    starting, complete = asyncio.Event(), asyncio.Event()

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[dict[str, int]]:
        starting.set()
        await complete.wait()
        yield {"answer": 42}

    url: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    serving = asyncio.create_task(_serve(FastAPI(lifespan=lifespan), port=port, on_started=url.set_result))
    await starting.wait()
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", port)
    complete.set()
    assert await url == f"http://127.0.0.1:{port}"
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(REQUEST)
    assert await reader.readline() == b"HTTP/1.1 404 Not Found\r\n"
    signal.raise_signal(signal.SIGTERM)
    assert await serving == 0
    writer.close()


async def test_who_connected_just_before_the_end_is_answered() -> None:
    """A connection that the kernel took after the event loop last looked is served, not reset."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    with server_module.bound_sockets("127.0.0.1", 0) as sockets:
        server = server_module._Server(app, sockets, Limits(), {})
        async with server:
            with socket.create_connection(sockets[0].getsockname(), timeout=10) as client:
                client.sendall(REQUEST)
                await server._close_port()  # no turn of the event loop since it connected
                server.connections.end(server.open)
                assert (await asyncio.to_thread(client.recv, 65536)).startswith(b"HTTP/1.1 200")


async def test_a_taken_port_is_found_before_the_start() -> None:
    """One line that names PORT; the application is not started."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PortTakenError, match=rf"^PORT: {port} is taken[^\n]+$"):
            await _serve(_never, port=port)


async def test_of_two_that_start_together_one_gets_the_port() -> None:
    """The port may be taken during the start: then the application is shut down again, and the error is the same."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    ended = asyncio.Event()

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        with socket.socket() as rival:
            rival.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            rival.bind(("127.0.0.1", port))
            rival.listen()
            yield
        ended.set()

    with pytest.raises(PortTakenError, match="PORT"):
        await _serve(FastAPI(lifespan=lifespan), port=port)
    assert ended.is_set()


@pytest.mark.parametrize("host", ["no-such-host.invalid", "192.0.2.1", "a..b", "x" * 64])
async def test_a_host_that_cannot_be_used_is_named(host: str) -> None:
    """A name that does not resolve or an address of another machine: one line that names HOST."""
    with pytest.raises(SettingsError, match=r"^HOST: [^\n]+$"):
        await _serve(_never, host=host)


@pytest.mark.skipif(os.geteuid() != 0, reason="gives privileges up, and takes them back")
@pytest.mark.skipif(
    int(_LOWEST_FREE_PORT.read_text()) <= 1 if _LOWEST_FREE_PORT.exists() else False,
    reason="this machine has no privileged ports",
)
async def test_a_privileged_port_is_named() -> None:
    """A port that only root may use, for somebody else: one line that names PORT."""
    os.seteuid(65534)
    try:
        with pytest.raises(SettingsError, match=r"^PORT: 1 needs privileges[^\n]+$"):
            await _serve(_never, port=1)
    finally:
        os.seteuid(0)


async def test_what_a_start_raises_reaches_the_caller(caplog: pytest.LogCaptureFixture) -> None:
    """The very exception, and no log of it: the caller prints one line."""
    failure = SettingsError("DATABASE_URL: no")

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        raise failure
        yield

    with caplog.at_level(logging.DEBUG), pytest.raises(SettingsError) as raised:
        await _serve(FastAPI(lifespan=lifespan))
    assert raised.value is failure
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_what_a_shutdown_raises_reaches_the_caller() -> None:
    """An application that cannot end cleanly is not reported as ended cleanly."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        raise LookupError("flush")

    with pytest.raises(LookupError, match="flush"):
        await _serve(FastAPI(lifespan=lifespan), on_started=lambda _: signal.raise_signal(signal.SIGTERM))


async def test_signal_handlers_are_given_back() -> None:
    """After it has served, signals do what they did before."""
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    assert await _serve(FastAPI(), on_started=lambda _: signal.raise_signal(signal.SIGTERM)) == 0
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_the_open_files_limit_is_raised() -> None:
    """The soft limit becomes the hard one."""
    program = (
        "import resource as r; from app.server.serve import raise_open_files_limit as f;"
        "hard = r.getrlimit(r.RLIMIT_NOFILE)[1]; r.setrlimit(r.RLIMIT_NOFILE, (200, hard)); f();"
        "print(r.getrlimit(r.RLIMIT_NOFILE)[0])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) == resource.getrlimit(resource.RLIMIT_NOFILE)[1]
