"""A disk of a few megabytes that a test can fill, and that nobody else sees."""

import contextlib
import ctypes
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

_CLONE_NEWNS = 0x00020000


@contextlib.contextmanager
def small_disk(directory: Path, *, megabytes: int) -> Iterator[None]:
    """Mount a disk at *directory*, in a mount namespace of this thread and of the processes it starts.

    Raises:
        OSError: this process may not do that: it is not root, or its container forbids it.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    before = os.open("/proc/thread-self/ns/mnt", os.O_RDONLY)
    try:
        _check(libc.unshare(_CLONE_NEWNS))
        try:
            _run("mount", "--make-rprivate", "/")
            _run("mount", "-t", "tmpfs", "-o", f"size={megabytes}m,mode=0755", "tmpfs", str(directory))
            yield
        finally:
            here = Path.cwd()
            _check(libc.setns(before, _CLONE_NEWNS))
            os.chdir(here)  # setns() leads to the root of the namespace
    finally:
        os.close(before)


def fill(directory: Path) -> Path:
    """Fill the disk of *directory* to its last byte; removing the file that is returned frees it again."""
    filler = directory / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 16))
    with contextlib.suppress(OSError), filler.open("ab", buffering=0) as file:
        while True:
            file.write(bytes(512))
    return filler


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(done.stderr.strip())


def _check(result: int) -> None:
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
