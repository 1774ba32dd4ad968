"""The directory of a server, and its one owner.

DIRECTORY/
    owner.lock     flock'd by the process that owns the server; holds the DSN to join it
    password       of the role `app`, for TCP only
    data/          the PostgreSQL data directory
    socket/        the Unix socket, mode 0700, so that only the owner's account connects
    postgres.log   and postgres.log.1, at most about 10 MiB each
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
import stat
import tempfile
from pathlib import Path

from app.embedded_postgres.accounts import Account
from app.embedded_postgres.refusals import WAY_OUT, AlreadyRunningError, EmbeddedPostgresError

_SOCKET_PATH_MAX_BYTES = 103  # sun_path holds 108 bytes on Linux, 104 on macOS, the final NUL included
_LOG_MAX_BYTES = 10 * 1024 * 1024


class ServerDirectory:
    """The paths below one directory, its lock, and what a killed owner left in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = path / "data"
        self.password = path / "password"
        self.log = path / "postgres.log"
        self.socket = _socket_dir(path)
        self._lock: int | None = None

    @property
    def owned(self) -> bool:
        """True between `lock` and `release`."""
        return self._lock is not None

    def lock(self, dsn: str) -> None:
        """Make the directory and become its owner; *dsn* is told to whoever comes later.

        Raises:
            AlreadyRunningError: a live process owns it.
            EmbeddedPostgresError: it holds something that is not ours.
        """
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self.path / "owner.lock"
        if not path.exists() and any(self.path.iterdir()):
            raise EmbeddedPostgresError(
                f"{self.path} is neither empty nor made by us: choose another EMBEDDED_POSTGRES_DIR"
            )
        # Children do not inherit Python's descriptors, so the lock is free as soon as this process is gone.
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owners_dsn = os.read(lock, 4096).decode() or dsn
            os.close(lock)
            raise AlreadyRunningError(self.path, owners_dsn) from None
        self._lock = lock
        os.ftruncate(lock, 0)
        os.write(lock, dsn.encode())

    def release(self) -> None:
        """Let the next owner in."""
        if self._lock is None:
            return
        if self.socket.parent != self.path:
            with contextlib.suppress(OSError):
                self.socket.rmdir()
        os.close(self._lock)
        self._lock = None

    def give_to(self, account: Account) -> None:
        """Make what is missing, and give what is ours to *account*."""
        os.close(self.open_log())
        _make_private(self.socket, account.uid)
        if self.data.exists() and self.data.stat().st_uid != account.uid:
            # Bottom-up: the owner of data/ itself, changed last, stands for all of it.
            for folder, _, names in os.walk(self.data, topdown=False):
                for path in (*(Path(folder, name) for name in names), Path(folder)):
                    account.own(path)
        for path in (*self.path.iterdir(), self.socket, self.path):
            account.own(path)

    def remove_leftovers(self) -> None:
        """Remove what was left by a killed server or first start, once no server of ours is alive."""
        # PostgreSQL takes any process with a recorded pid for its own, be it a zombie or a stranger, and will
        # not start. What still guards against a server we cannot see is the shared memory block, which it
        # finds by the data directory's inode.
        for path in (self.data / "postmaster.pid", *self.socket.glob(".s.PGSQL.*")):
            path.unlink(missing_ok=True)
        for unfinished in self.path.glob("initdb-*"):
            shutil.rmtree(unfinished, ignore_errors=True)

    def open_log(self) -> int:
        """A descriptor that appends to the log."""
        # O_APPEND lets the file be truncated under the server: the next line goes to the new end.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
        return os.open(self.log, flags, 0o600)

    def log_is_full(self) -> bool:
        """True once the log is to be put aside."""
        try:
            return self.log.stat().st_size > _LOG_MAX_BYTES
        except FileNotFoundError:
            return False

    def rotate_log(self) -> None:
        """Put the log aside, over the one before, and empty it under the server."""
        with contextlib.suppress(FileNotFoundError):
            shutil.copyfile(self.log, self.log.with_suffix(".log.1"))
            os.truncate(self.log, 0)


def _socket_dir(directory: Path) -> Path:
    """The folder of the socket: in *directory*, or where its path is too long, a short private one."""
    digest = hashlib.sha256(os.fsencode(directory)).hexdigest()[:16]
    for folder in (directory / "socket", Path(tempfile.gettempdir()) / f"orders-postgres-{digest}"):
        path = os.fsencode(folder / f".s.PGSQL.{2**16 - 1}")
        if len(path) <= _SOCKET_PATH_MAX_BYTES and b"," not in path:  # libpq splits a host at commas
            return folder
    raise EmbeddedPostgresError(f"{folder} is no path for a Unix socket: set a shorter TMPDIR, or {WAY_OUT}")


def _make_private(folder: Path, uid: int) -> None:
    """Make *folder* ours alone, or trust the one that is there: its owner could pose as our server."""
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    status = folder.lstat()
    owned = stat.S_ISDIR(status.st_mode) and status.st_uid in {os.geteuid(), uid}
    if not owned or status.st_mode & 0o077:
        raise EmbeddedPostgresError(f"{folder} is not a private directory of ours: remove it")
