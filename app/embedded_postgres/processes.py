"""Server processes on a data directory: found by what they are, not by a recorded number, and stopped."""

import contextlib
import logging
import os
import signal
import subprocess
import time
from pathlib import Path

from app.embedded_postgres.refusals import EmbeddedPostgresError

# Fast, immediate, by force; and how long each may take.
STOP_SECONDS = {signal.SIGINT: 10.0, signal.SIGQUIT: 5.0, signal.SIGKILL: 5.0}

_log = logging.getLogger(__name__)


def server_processes(data: Path) -> list[int]:
    """The pids of all server processes on the data directory *data*, the main one first."""
    postmaster = recorded_postmaster(data)
    if not Path("/proc/self").exists():
        return [postmaster] if postmaster and _is_postmaster_by_ps(postmaster, data) else []
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]
    pids.sort(key=lambda pid: pid != postmaster)
    return [pid for pid in pids if _is_server_process(pid, data)]


def recorded_postmaster(data: Path) -> int | None:
    """The pid that the last main process wrote into *data*, be it alive or not."""
    try:
        return int((data / "postmaster.pid").read_text().partition("\n")[0])
    except (FileNotFoundError, ValueError):
        return None


def stop_leftovers(data: Path) -> None:
    """End the server processes that a killed owner or a killed postmaster left on *data*."""
    for signal_number, seconds in STOP_SECONDS.items():
        pids = server_processes(data)
        if signal_number == signal.SIGINT:  # only for the postmaster it means a fast shutdown
            pids = [pid for pid in pids if pid == recorded_postmaster(data)]
        for pid in pids:
            _log.warning("postgres_leftover_stopping", extra={"pid": pid, "directory": str(data.parent)})
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal_number)
        deadline = time.monotonic() + seconds
        while pids and server_processes(data) and time.monotonic() < deadline:
            time.sleep(0.02)
    if pids := server_processes(data):
        raise EmbeddedPostgresError(f"PostgreSQL processes {pids} in {data.parent} cannot be stopped")


def _is_server_process(pid: int, data: Path) -> bool:
    """True for a live PostgreSQL process on *data*; false for a zombie, a stranger or another server."""
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
