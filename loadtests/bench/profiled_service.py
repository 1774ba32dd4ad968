"""`python -m loadtests.bench.profiled_service [--allocations]`: the service, and leave to look into it.

It runs `python -m app` in this process, unchanged. Any process of the same account may then attach to it, also where
the kernel grants that to ancestors alone (Yama, ptrace_scope 1), so that a profiler started later needs no privilege.

With `--allocations` it takes orders on standard input, a line each: `start` to keep the origin of every block from
now on (tracemalloc), or the name of a file, to which it writes, as JSON, those of them that are still allocated:
[[line of code, line of app/ on whose behalf, bytes], ...].
"""

import contextlib
import ctypes
import gc
import json
import runpy
import sys
import threading
import tracemalloc
from pathlib import Path

_PR_SET_PTRACER, _PR_SET_PTRACER_ANY = 0x59616D61, -1  # prctl(2); ignored by a kernel without Yama
_FRAMES = 12  # from a library's allocation up to the line of app/ that called it
_ROOT = Path(__file__).parents[2]


def main() -> None:
    """Serve, until SIGTERM."""
    with contextlib.suppress(OSError, AttributeError):  # not Linux
        ctypes.CDLL(None).prctl(_PR_SET_PTRACER, ctypes.c_ulong(_PR_SET_PTRACER_ANY), 0, 0, 0)
    if "--allocations" in sys.argv[1:]:
        threading.Thread(target=_answer, name="allocations", daemon=True).start()
    sys.argv[1:] = []
    runpy.run_module("app", run_name="__main__", alter_sys=True)


def _answer() -> None:
    for line in map(str.strip, sys.stdin):
        if line == "start":
            tracemalloc.start(_FRAMES)
            continue
        partial = Path(f"{line}.partial")
        partial.write_text(json.dumps(_allocated()))
        partial.rename(line)  # whoever waits for it never reads half of it


def _allocated() -> list[tuple[str, str, int]]:
    gc.collect()
    snapshot = tracemalloc.take_snapshot().filter_traces(
        [
            tracemalloc.Filter(inclusive=False, filename_pattern=name)
            for name in (tracemalloc.__file__, __file__)
        ]
    )
    sizes: dict[tuple[str, str], int] = {}
    for statistic in snapshot.statistics("traceback"):
        frames = [_line(frame) for frame in reversed(statistic.traceback)]  # the innermost first
        ours = next((frame for frame in frames if frame.startswith("app/")), "")
        sizes[frames[0], ours] = sizes.get((frames[0], ours), 0) + statistic.size
    return [(where, ours, size) for (where, ours), size in sizes.items()]


def _line(frame: tracemalloc.Frame) -> str:
    path = Path(frame.filename)
    if path.is_relative_to(_ROOT / "app"):
        return f"{path.relative_to(_ROOT)}:{frame.lineno}"
    return f"{'/'.join(path.parts[-2:])}:{frame.lineno}"


if __name__ == "__main__":
    main()
