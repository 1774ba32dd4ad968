"""The benchmarks' common ground on a terminal: progress, tables, targets reached or not, and ends."""

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import ParamSpec, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from loadtests.machine import processes

_P = ParamSpec("_P")

_WIDTH = 100
_COARSE_FROM = 10  # ratios from here on need a decimal less


def report_console() -> Console:
    """Standard output, at least 100 columns wide, so that a table keeps its form in a pipe."""
    return Console(width=max(_WIDTH, Console().width), highlight=False)


def command(main: Callable[_P, int]) -> Callable[_P, int]:
    """Let *main* say in a sentence what ended it: 130 after Ctrl-C, 1 where it came to nothing."""

    @functools.wraps(main)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> int:
        try:
            return main(*args, **kwargs)
        except KeyboardInterrupt:
            report_console().print("stopped")
            return 130
        except (RuntimeError, OSError) as exc:
            report_console().print(str(exc), style="red", markup=False, soft_wrap=True)
            return 1

    return run


class Steps:
    """Says which step runs: one live line on a terminal, a line for each step anywhere else."""

    def __init__(self, console: Console, total: int) -> None:
        self._console = console
        self._total = total
        self._done = -1
        self._started_at = time.monotonic()
        columns = (BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
        self._live = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._live.add_task("", total=total)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def next(self, text: str) -> None:
        """The step before is done, and *text* begins."""
        self._done += 1
        self._live.update(self._task, description=text, completed=self._done)
        if not self._console.is_terminal:
            elapsed = time.monotonic() - self._started_at
            self._console.print(f"{self._done + 1:3d}/{self._total} {elapsed:4.0f} s  {text}", markup=False)


@dataclass(frozen=True)
class Goal:
    """A ratio, [least, median, most] over the rounds, and what its median must be."""

    what: str
    ratio: Sequence[float]
    limit: float
    at_least: bool

    @property
    def reached(self) -> bool:
        """True where the median keeps the limit."""
        return self.ratio[1] >= self.limit if self.at_least else self.ratio[1] <= self.limit

    @property
    def line(self) -> str:
        """The verdict in a line."""
        wanted = f"{'at least' if self.at_least else 'at most'} {self.limit:g}"
        verdict = "reached" if self.reached else "NOT reached"
        return f"{verdict}: {self.what}: {ratio_text(self.ratio)}, wanted {wanted}"


def show_targets(console: Console, targets: Sequence[Goal]) -> None:
    """Print each target's verdict."""
    for target in targets:
        console.print(
            target.line, style="green" if target.reached else "yellow", markup=False, soft_wrap=True
        )


def show_machine(console: Console) -> None:
    """Print what the figures come from."""
    machine = processes.machine()
    console.print(
        f"{machine['cpu']}, {machine['cores']} cores, {machine['kernel']}, Python {machine['python']}",
        style="dim",
    )


def machine_line(made_by: str) -> str:
    """What Markdown tells of where its figures come from: the machine, and the command."""
    machine = processes.machine()
    return f"{machine['cpu']}, {machine['cores']} cores, Python {machine['python']}; `{made_by}`."


def table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table that fits 100 columns: the first column is a name, the others are figures."""
    drawn = Table(
        title=title,
        title_justify="left",
        box=None,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        min_width=len(title),
    )
    for number, heading in enumerate(headings):
        drawn.add_column(heading, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        drawn.add_row(*row)
    return drawn


def ratio_text(ratio: Sequence[float] | None) -> str:
    """`6.52 (6.3-6.6)`: the median, and the least and the most of the rounds."""
    if ratio is None:
        return ""
    least, median, most = ratio
    if median >= _COARSE_FROM:
        return f"{median:.1f} ({least:.0f}-{most:.0f})"
    if median < 1:
        return f"{median:.2f} ({least:.2f}-{most:.2f})"
    return f"{median:.2f} ({least:.1f}-{most:.1f})"


def milliseconds_text(value: float) -> str:
    """Three or four digits."""
    return f"{value:,.0f}" if value >= _COARSE_FROM**3 else f"{value:.1f}"
