"""The generator's processes over a run, second by second."""

import math
from collections.abc import Mapping
from typing import Any

from loadtests.samples import Window


class GeneratorSamples:
    """Users, CPU and lateness of each process; a line of its file is a row."""

    def __init__(self) -> None:
        self._rows: dict[str, list[tuple[float, int, float, list[float], int, int]]] = {}

    def add(self, process: str, row: list[Any]) -> None:
        """Take a line of a process's file."""
        at, users, cpu_seconds, lateness_ms, due, sent = row
        self._rows.setdefault(process, []).append((at, users, cpu_seconds, lateness_ms, due, sent))

    @property
    def processes(self) -> int:
        """The number of processes that have reported."""
        return len(self._rows)

    @property
    def users(self) -> int:
        """Users that run now, in all processes."""
        return sum(rows[-1][1] for rows in self._rows.values())

    def cpu_percent(self, window: Window) -> float | None:
        """Percent of one core, the mean of the busiest process over *window*."""
        busiest = None
        for rows in self._rows.values():
            inside = [row for row in rows if window.start <= row[0] <= window.end]
            if len(inside) > 1:
                share = (inside[-1][2] - inside[0][2]) / (inside[-1][0] - inside[0][0]) * 100
                busiest = max(busiest or 0.0, share)
        return busiest

    def lateness_ms(self, window: Window) -> list[float]:
        """The lateness of every timer within *window*, ascending."""
        return sorted(
            late
            for rows in self._rows.values()
            for at, _, _, lateness, *_ in rows
            if window.start <= at <= window.end
            for late in lateness
        )

    def mean_users(self, window: Window) -> float | None:
        """The mean number of users over *window*, all processes together."""
        means = [
            [users for at, users, *_ in rows if window.start <= at <= window.end]
            for rows in self._rows.values()
        ]
        return sum(sum(users) / len(users) for users in means if users) if any(means) else None

    def arrivals(self, window: Window) -> tuple[int, int]:
        """Arrivals that were due, and sent, in *window*; open model."""
        due = sent = 0
        for rows in self._rows.values():
            inside = [row for row in rows if window.start <= row[0] <= window.end]
            if inside:
                due += inside[-1][4] - inside[0][4]
                sent += inside[-1][5] - inside[0][5]
        return due, sent

    def overdue(self, rate_per_second: float) -> float:
        """Arrivals that were due at the end and never sent; open model. Those of the last tenth of a second are not."""
        backlog = sum(rows[-1][4] - rows[-1][5] for rows in self._rows.values())
        return max(0.0, backlog - max(3.0, rate_per_second / 10))

    def per_second(self, origin: float, seconds: range) -> Mapping[str, list[float | None]]:
        """Users, CPU of the busiest process, the worst lateness, over *seconds* since *origin*."""
        users: dict[int, dict[str, int]] = {}
        cpu: dict[int, float] = {}
        late: dict[int, float] = {}
        for process, rows in self._rows.items():
            before = None
            for row in rows:
                second = math.floor(row[0] - origin)
                users.setdefault(second, {})[process] = row[1]
                late[second] = max(late.get(second, 0.0), *row[3])
                if before is not None:
                    share = (row[2] - before[2]) / (row[0] - before[0]) * 100
                    cpu[second] = max(cpu.get(second, 0.0), share)
                before = row
        return {
            "users": [float(sum(users[second].values())) if second in users else None for second in seconds],
            "generator_cpu_percent": [cpu.get(second) for second in seconds],
            "generator_lag_ms": [late.get(second) for second in seconds],
        }
