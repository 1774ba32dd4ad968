"""An event loop whose time passes only while it has nothing to do: hours of timers in microseconds.

Mark a test `virtual_time`, or ask for the fixture of that name, and it runs on it: `asyncio.sleep(3600)`
returns at once, one hour later by `loop.time()`, and what would wait for ever fails at once. Every run is the
same. Not for real sockets, threads or subprocesses: time would run ahead of them.
"""

import asyncio
import selectors
from collections.abc import Callable


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """asyncio's own loop on a clock that jumps to the next timer."""

    def __init__(self) -> None:
        self._now = 0.0
        super().__init__(_JumpingSelector(self._jump))

    def time(self) -> float:
        """Virtual seconds since the loop was made."""
        return self._now

    def stall(self, seconds: float) -> None:
        """Let time pass inside a callback, as blocking code or a stopped process would."""
        self._now += seconds

    def _jump(self, timeout: float | None) -> None:
        if timeout is None:
            raise RuntimeError("deadlock: everything waits and no timer is set")
        self._now += timeout


class _JumpingSelector(selectors.SelectSelector):
    """Never waits: where it would, it lets the clock jump."""

    def __init__(self, jump: Callable[[float | None], None]) -> None:
        super().__init__()
        self._jump = jump

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        events = super().select(0)
        if not events and (timeout is None or timeout > 0):
            self._jump(timeout)
        return events
