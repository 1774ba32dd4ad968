"""The run on the terminal while it runs: one live line on a terminal, a plain line now and then anywhere else."""

import sys
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.text import Text

_PLAIN_SECONDS = 5.0


@dataclass(frozen=True)
class Moment:
    """The run right now; None: not known (yet)."""

    phase: str
    seconds_left: float
    users: int
    orders_per_second: float
    p95_ms: float | None
    errors: int  # since the start
    cpu_percent: float | None
    pool_in_use: float | None
    pool_max: float | None

    @property
    def line(self) -> str:
        """The moment in a line of fewer than 110 columns."""
        left = max(0, round(self.seconds_left))
        p95 = "-" if self.p95_ms is None else f"{self.p95_ms:.0f} ms"
        cpu = "-" if self.cpu_percent is None else f"{self.cpu_percent:.0f} %"
        pool = "-" if self.pool_in_use is None else f"{self.pool_in_use:.0f}/{self.pool_max or 0:.0f}"
        return (
            f"{self.phase:<8} {left // 60}:{left % 60:02d} left  users {self.users:>4}  "
            f"{self.orders_per_second:>6.0f} orders/s  p95 {p95:>8}  errors {self.errors:>4}  "
            f"CPU {cpu:>5}  pool {pool:>5}"
        )


class LiveLine:
    """Shows moments while its block runs."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(file=sys.stdout, highlight=False)
        self._live = Live(console=self._console, auto_refresh=False, transient=True)
        self._is_terminal = self._console.is_terminal
        self._shown: tuple[str, float] = ("", -_PLAIN_SECONDS)

    def __enter__(self) -> Self:
        if self._is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_terminal:
            self._live.stop()

    def say(self, text: str) -> None:
        """A line that stays."""
        self._console.print(text, markup=False, soft_wrap=True)

    def show(self, moment: Moment) -> None:
        """Replace the live line; where there is none, print one every five seconds and with every new phase."""
        if self._is_terminal:
            self._live.update(Text(moment.line, no_wrap=True, overflow="ellipsis"), refresh=True)
            return
        phase, at = self._shown
        if moment.phase != phase or time.monotonic() - at >= _PLAIN_SECONDS:
            self._shown = moment.phase, time.monotonic()
            self.say(moment.line)
            self._console.file.flush()
