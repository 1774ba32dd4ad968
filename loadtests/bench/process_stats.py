"""CPU and memory of processes, read from /proc (Linux)."""

import os
from pathlib import Path

_TICK_SECONDS = 1 / os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def _stat(pid: int) -> list[str] | None:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None


def process_tree(root: int) -> list[int]:
    """*root* and all its descendants that are alive."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and (stat := _stat(int(entry.name))) is not None:
            children.setdefault(int(stat[1]), []).append(int(entry.name))
    found = [root]
    for pid in found:
        found.extend(children.get(pid, []))
    return found


def cpu_seconds(root: int) -> float:
    """User and system seconds of the tree so far, those of its children that have ended included."""
    ticks = 0
    for pid in process_tree(root):
        if (stat := _stat(pid)) is not None:
            ticks += sum(map(int, stat[11:15]))  # utime, stime, and the same of the children waited for
    return ticks * _TICK_SECONDS


def resident_bytes(root: int) -> int:
    """Resident memory of the tree; pages that its processes share count once for each."""
    return sum(int(stat[21]) * _PAGE_BYTES for pid in process_tree(root) if (stat := _stat(pid)) is not None)
