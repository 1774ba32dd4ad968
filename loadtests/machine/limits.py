"""The limits that a service process really has, where it runs on this machine: its cgroup's, and what they cost it."""

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from loadtests.service_side.readings import Limits

PLANNED_MEMORY_BYTES = 2 * 2**30  # the plan's limit of a container
PLANNED_CORES = 1.0  # and what it requests

_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
_LISTEN = "0A"  # of /proc/net/tcp


class ProcessLimits:
    """The limits of the processes behind a target, and how long they were throttled since this was made.

    Args:
        pids: of service processes on this machine; without any, whoever listens where *url* says, if that is here.
        memory_bytes, cpu_cores: told by the caller, whatever the processes say.
    """

    def __init__(
        self,
        url: str,
        pids: Sequence[int] = (),
        *,
        memory_bytes: float | None = None,
        cpu_cores: float | None = None,
    ) -> None:
        address = urlsplit(url)
        if not pids and address.hostname in _LOOPBACK:
            pids = [*listening_on(address.port or 80)]
        self._groups = [folders for pid in pids if (folders := _cgroup_folders(pid))]
        self._memory_bytes = memory_bytes
        self._cpu_cores = cpu_cores
        self._throttled_before = self._throttled_seconds()

    def so_far(self) -> Limits:
        """The limits, and the time of throttling until now."""
        memory = [bytes_ for group in self._groups if (bytes_ := _memory_bytes(group)) is not None]
        cores = [share for group in self._groups if (share := _cores(group)) is not None]
        before, now = self._throttled_before, self._throttled_seconds()
        return Limits(
            memory_bytes=self._memory_bytes or float(min(memory, default=PLANNED_MEMORY_BYTES)),
            cpu_cores=self._cpu_cores or min(cores, default=PLANNED_CORES),
            throttled_seconds=None if before is None or now is None else now - before,
        )

    def _throttled_seconds(self) -> float | None:
        found = [seconds for group in self._groups if (seconds := _throttled_seconds(group)) is not None]
        return max(found, default=None)


def listening_on(port: int) -> Iterator[int]:
    """The processes of this machine that listen on *port*, as far as they may be looked at (Linux)."""
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == _LISTEN and int(fields[1].rpartition(":")[2], 16) == port:
                    inodes.add(f"socket:[{fields[9]}]")
    for folder in Path("/proc").glob("[0-9]*/fd") if inodes else ():
        with contextlib.suppress(OSError):
            if any(str(entry.readlink()) in inodes for entry in folder.iterdir()):
                yield int(folder.parent.name)


def _cgroup_folders(pid: int) -> Sequence[Path]:
    """Where the limits of *pid* stand, its own group first, then those around it (Linux, cgroup v2 and v1)."""
    try:
        lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    except OSError:
        return ()
    folders = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        roots = [Path("/sys/fs/cgroup", *(() if not controllers else (controllers,)))]
        if controllers and not {"memory", "cpu"} & set(controllers.split(",")):
            continue
        # In a container the path may be that of the host: its own group is then mounted at the root.
        for root in roots:
            own = root / path.lstrip("/")
            folders += [folder for folder in (own, *own.parents) if folder.is_relative_to(root)]
    return folders


def _memory_bytes(folders: Iterable[Path]) -> int | None:
    """The tightest memory limit; None: there is none."""
    installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limits = []
    for folder in folders:
        for name in ("memory.max", "memory.limit_in_bytes"):
            with contextlib.suppress(OSError, ValueError):  # "max": no limit
                limits.append(int((folder / name).read_text()))
    return min((limit for limit in limits if limit < installed), default=None)


def _cores(folders: Iterable[Path]) -> float | None:
    """The tightest share of cores; None: there is none."""
    limits = []
    for folder in folders:
        with contextlib.suppress(OSError, ValueError):
            quota, period = (folder / "cpu.max").read_text().split()
            limits.append(int(quota) / int(period))
        with contextlib.suppress(OSError, ValueError):
            quota = (folder / "cpu.cfs_quota_us").read_text()
            if int(quota) > 0:
                limits.append(int(quota) / int((folder / "cpu.cfs_period_us").read_text()))
    return min(limits, default=None)


def _throttled_seconds(folders: Iterable[Path]) -> float | None:
    """The time that its quota held a group back so far; None: nothing says."""
    for folder in folders:
        with contextlib.suppress(OSError, ValueError):
            figures = dict(line.split() for line in (folder / "cpu.stat").read_text().splitlines())
            if "throttled_usec" in figures:
                return int(figures["throttled_usec"]) / 1e6
            if "throttled_time" in figures:
                return int(figures["throttled_time"]) / 1e9
    return None
