"""The processes that a measurement starts and ends: a Postgres, and servers on databases of their own."""

import contextlib
import dataclasses
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg2
from psycopg2.extensions import make_dsn

ROOT = Path(__file__).parents[2]
SERVICE = (sys.executable, "-m", "app")

# What the service says where it is several replicas: a line for each, and one once all of them listen.
_REPLICA = re.compile(r"^replica \d+ on \S+   operations (\S+)", re.MULTILINE)
_ALL_LISTEN = re.compile(r"^order service on ", re.MULTILINE)

_START_SECONDS = 60.0
_STOP_SECONDS = 20.0

# What asks to end: Ctrl-C, `kill`, and a terminal that is closed, but for `nohup`.
_HANGUP = () if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else (signal.SIGHUP,)
ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, *_HANGUP)


@dataclass(frozen=True)
class Postgres:
    """A running PostgreSQL: its process tree, and a role that may do everything."""

    pid: int
    dsn: str
    log_path: Path

    @property
    def trouble(self) -> str:
        """The complaints so far; empty: none.

        The launcher restarts a server that dies, so that a run would go on and nobody notice.
        """
        return self.log_path.read_text(errors="replace").strip()

    def create_database(self, name: str) -> str:
        """Make an empty database; its DSN."""
        with contextlib.closing(psycopg2.connect(self.dsn)) as connection:
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute(f"CREATE DATABASE {name}")
        dsn: str = make_dsn(self.dsn, dbname=name)
        return dsn


@dataclass(frozen=True)
class Server:
    """A running HTTP server over a database of its own."""

    name: str
    process: subprocess.Popen[bytes]
    url: str
    dsn: str
    log_path: Path
    metrics_urls: Sequence[str] = ()  # of the service: a page for each replica


@contextlib.contextmanager
def scratch_directory() -> Iterator[Path]:
    """A temporary directory, gone when the block ends, also when that is by one of `ENDING_SIGNALS`."""
    # As Ctrl-C, which asyncio knows to turn into a cancellation: an exception raised by a handler of our own could
    # end up in any callback of the event loop, and be swallowed there.
    others = ENDING_SIGNALS[1:]
    previous = {
        number: signal.signal(number, lambda *_: signal.raise_signal(signal.SIGINT)) for number in others
    }
    folder = Path(tempfile.mkdtemp(prefix="order-bench-"))
    try:
        yield folder
    finally:
        with _undisturbed():
            shutil.rmtree(folder, ignore_errors=True)
            for number, handler in previous.items():
                signal.signal(number, handler)


@contextlib.contextmanager
def embedded_postgres(folder: Path, *, max_connections: int | None = None) -> Iterator[Postgres]:
    """The embedded Postgres in a process of its own, with the settings the service ships; it ends with the block.

    Raises:
        RuntimeError: it does not start; the message holds the end of what it said.
    """
    # From here on this process talks to no other: libpq's settings are for one of the user's own.
    for name in [name for name in os.environ if name.startswith("PG")]:
        del os.environ[name]
    log_path = folder / "postgres.log"
    command = [sys.executable, "-m", "app.embedded_postgres", str(folder / "postgres")]
    if max_connections:
        command += ["--max-connections", str(max_connections)]
    with log_path.open("wb") as log, child(command, stdout=subprocess.PIPE, stderr=log) as process:
        dsn = process.stdout.readline().decode().strip() if process.stdout else ""
        if not dsn:
            raise RuntimeError(f"the embedded Postgres did not start: {tail(log_path)}")
        yield Postgres(process.pid, dsn, log_path)


@contextlib.contextmanager
def steady_postgres(folder: Path, *, max_connections: int | None = None) -> Iterator[Postgres]:
    """The same, where nobody asks for its trouble: a RuntimeError at the end of the block if it had any."""
    with embedded_postgres(folder, max_connections=max_connections) as postgres:
        yield postgres
        if postgres.trouble:
            raise RuntimeError(f"the embedded Postgres did not keep running: {postgres.trouble}")


@contextlib.contextmanager
def server(
    name: str,
    command: Sequence[str],
    *,
    port: int,
    dsn: str,
    folder: Path,
    says: re.Pattern[str] | None = None,
    **options: Any,
) -> Iterator[Server]:
    """Start *command*, wait until it listens on *port*, and *says* what it is to say, and end it with the block.

    Raises:
        RuntimeError: it does not listen; the message holds the end of what it said.
    """
    log_path = folder / f"{name}.log"
    with log_path.open("wb") as log, child(command, stdout=log, stderr=log, **options) as process:
        give_up_at = time.monotonic() + _START_SECONDS
        while not (_listens(port) if says is None else says.search(log_path.read_text(errors="replace"))):
            if process.poll() is not None or time.monotonic() > give_up_at:
                raise RuntimeError(f"{name} does not listen on port {port}: {tail(log_path)}")
            time.sleep(0.02)
        yield Server(name, process, f"http://127.0.0.1:{port}", dsn, log_path)


@contextlib.contextmanager
def service(
    dsn: str,
    folder: Path,
    *,
    name: str = "service",
    command: Sequence[str] = SERVICE,
    replicas: int = 1,
    settings: Mapping[str, str] | None = None,
    **options: Any,
) -> Iterator[Server]:
    """The order service with its shipped settings, whatever the caller's environment says, and *settings*."""
    port = free_port()
    environment = {**plain_environment(), "PORT": str(port), "DATABASE_URL": dsn, **(settings or {})}
    if replicas > 1:
        command = [*command, "serve", "--replicas", str(replicas)]
        environment["OPS_PORT"] = "0"
        options["says"] = _ALL_LISTEN
    with server(name, command, port=port, dsn=dsn, folder=folder, env=environment, **options) as started:
        urls = [started.url] if replicas == 1 else _REPLICA.findall(started.log_path.read_text())
        yield dataclasses.replace(started, metrics_urls=[f"{url}/metrics" for url in urls])


@contextlib.contextmanager
def child(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A process that ends when the block does; Ctrl-C reaches it only through us."""
    options.setdefault("env", plain_environment())
    options.setdefault("cwd", ROOT)
    with subprocess.Popen(command, start_new_session=True, **options) as process:  # noqa: S603
        try:
            yield process
        finally:
            with _undisturbed():
                process.terminate()
                try:
                    process.wait(_STOP_SECONDS)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def plain_environment() -> dict[str, str]:
    """The environment without anything that could be a setting of the service."""
    kept = {"PATH", "HOME", "USER", "LANG", "LC_ALL", "TMPDIR", "VIRTUAL_ENV", "LD_LIBRARY_PATH"}
    return {name: value for name, value in os.environ.items() if name in kept}


def free_port() -> int:
    """A loopback port that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def tail(path: Path, characters: int = 2000) -> str:
    """The end of a log."""
    return path.read_text(errors="replace")[-characters:]


def machine() -> dict[str, str | int | None]:
    """The hardware and the interpreter that the figures come from."""
    processors = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.*)", processors.read_text()) if processors.exists() else None
    return {
        "cpu": cpu[1] if cpu else platform.processor(),
        "cores": os.cpu_count(),
        "kernel": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def _listens(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
    except OSError:
        return False


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Hold back a second Ctrl-C until the block is done: it would leave processes behind."""
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDING_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING_SIGNALS)
