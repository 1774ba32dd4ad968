"""Loaded into Locust beside a locustfile: writes down what became of every order, as it comes.

    locust -f loadtests/locustfile.py,loadtests/users/recording.py     with LOADTEST_RECORD_DIR naming a directory

Every process that runs users appends to two files of its own there: `orders-<host>-<pid>.jsonl`, a line per order, an
array of the fields of `Sample`; and `generator-<host>-<pid>.jsonl`, a line per second:
    [time, users, CPU seconds so far, [lateness in ms of a timer that should ring every 50 ms],
     arrivals due so far, arrivals sent so far (open model)]
Locust's own report is locust.html.
"""

import atexit
import os
import socket
import time
from pathlib import Path
from typing import Any

import gevent
import orjson
from locust import events
from locust.env import Environment
from locust.html import get_html_report
from locust.runners import MasterRunner, WorkerRunner

from loadtests.samples import Sample, to_lines
from loadtests.users.order_user import order_sinks

_FLUSH_SECONDS = 0.1
_TICK_SECONDS = 0.05
_LINE_SECONDS = 1.0


class Recorder:
    """The two files of one process."""

    def __init__(self, directory: Path, environment: Environment) -> None:
        self._environment = environment
        own = f"{socket.gethostname()}-{os.getpid()}.jsonl"  # containers often have the same process ids
        self._orders = (directory / f"orders-{own}").open("ab", buffering=0)
        self._generator = (directory / f"generator-{own}").open("ab", buffering=0)
        self._noted: list[Sample] = []
        self.note = self._noted.append

    def flush(self) -> None:
        """Hand over to the kernel what was noted: it is kept even if this process is killed."""
        noted = self._noted[:]
        del self._noted[: len(noted)]
        if noted:
            self._orders.write(to_lines(noted))

    def flush_forever(self) -> None:
        """Write every tenth of a second."""
        while True:
            gevent.sleep(_FLUSH_SECONDS)
            self.flush()

    def watch_forever(self) -> None:
        """Write how this process does, every second."""
        while True:
            lateness_ms = []
            # Not so many ticks: late ones would make lines rare.
            line_due = time.perf_counter() + _LINE_SECONDS
            while (start := time.perf_counter()) < line_due:
                gevent.sleep(_TICK_SECONDS)
                lateness_ms.append(round((time.perf_counter() - start - _TICK_SECONDS) * 1000, 2))
            self._write_line(lateness_ms)

    def end(self) -> None:
        """Write what is left: users end after `quitting`."""
        self.flush()
        self._write_line([0.0])

    def _write_line(self, lateness_ms: list[float]) -> None:
        runner = self._environment.runner
        users = 0 if runner is None else runner.user_count
        line = [time.time(), users, time.process_time(), lateness_ms, *self._arrivals()]
        self._generator.write(orjson.dumps(line) + b"\n")

    def _arrivals(self) -> tuple[int, int]:
        for user_class in self._environment.user_classes:
            schedule = getattr(getattr(user_class, "arrivals", None), "schedule", None)
            if schedule is not None:
                totals = schedule.totals(time.perf_counter())
                return totals.offered, totals.achieved
        return 0, 0


def write_report(environment: Environment, directory: Path) -> None:
    """Locust's report, beside ours."""
    (directory / "locust.html").write_text(get_html_report(environment, show_download_link=False))


@events.init.add_listener
def start(environment: Environment, **_: Any) -> None:
    """Begin, in every process but a master; forks are over by now. Who is no worker writes Locust's own report."""
    directory = Path(os.environ["LOADTEST_RECORD_DIR"])
    if not isinstance(environment.runner, WorkerRunner):
        # --html would do, but for SIGTERM, which ends a run here.
        environment.events.quit.add_listener(lambda **_: write_report(environment, directory))
    if isinstance(environment.runner, MasterRunner):
        return
    recorder = Recorder(directory, environment)
    order_sinks.append(recorder.note)
    gevent.spawn(recorder.flush_forever)
    gevent.spawn(recorder.watch_forever)
    environment.events.quit.add_listener(lambda **_: recorder.end())
    atexit.register(recorder.flush)
