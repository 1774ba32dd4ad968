"""Orders at a rate, whether or not the service keeps up: `locust -f open_model.py --headless --rate 100 -t 60s`.

The other load tests are closed: a user waits for an answer before the next order, so a slow service is sent less, and
the orders that it would have kept waiting are never measured (coordinated omission). Here arrivals come on a schedule
(`--rate` per second in all, `--arrivals` poisson or constant), from the moment when all users are there. Users (`-u`)
are the workers that send them: the bound on orders in flight. Latency counts from the intended start, in Locust's
figures and in the samples. When the test ends, a line of the log reports the rate that was offered, the part of it
that was achieved, and how much of that was late.

Choose `-u` above rate x latency; without it there is a worker for each arrival of a second, at least 10, at most
2,000. Across worker processes the rate is divided evenly between those that are there when the arrivals start.
"""

import dataclasses
import logging
import os
import sys
import time
from argparse import ArgumentParser, ArgumentTypeError
from pathlib import Path
from typing import Any

import gevent
from locust import events, task
from locust.env import Environment
from locust.runners import LocalRunner, MasterRunner, WorkerRunner

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # Locust imports this file by its path

from loadtests.users import session
from loadtests.users.arrivals import LATE_SECONDS, ArrivalSchedule, ArrivalTotals, Process
from loadtests.users.order_user import OrderUser

_log = logging.getLogger(__name__)

DEFAULT_RATE_PER_SECOND = 100.0
_MIN_WORKERS, _MAX_WORKERS = 10, 2000
_SPAWN_RATE = 100.0  # above it Locust warns
_POLL_SECONDS = 0.02  # of a worker that waits for the others to be there
_MESSAGE = "loadtest_arrivals"


class Arrivals:
    """The arrivals of a run: this process's schedule, and, on a master, what its workers report.

    The events of its environment start, share and end it. `python -m loadtests` judges a run by what the recorder
    writes down of each process's schedule.
    """

    def __init__(self, environment: Environment) -> None:
        options = environment.parsed_options
        self.rate_per_second: float = getattr(options, "rate", DEFAULT_RATE_PER_SECOND)
        self.process: Process = getattr(options, "arrivals", "poisson")
        self.schedule: ArrivalSchedule | None = None
        self._environment = environment
        self._of_workers: dict[str, ArrivalTotals] = {}
        runner = environment.runner
        hooks = environment.events
        hooks.test_start.add_listener(self._reset)
        hooks.test_stopping.add_listener(self._end)
        if isinstance(runner, WorkerRunner):
            runner.register_message(_MESSAGE, self._start_share)
            hooks.report_to_master.add_listener(self._report)
        else:
            hooks.spawning_complete.add_listener(self._start)
            hooks.worker_report.add_listener(self._note)
            hooks.quitting.add_listener(self._print)

    def totals(self) -> ArrivalTotals:
        """Arrivals offered and achieved, by all processes; a master's figures are up to 3 s old until the end."""
        total = ArrivalTotals()
        if self.schedule is not None:
            total.add(self.schedule.totals(time.perf_counter()))
        for totals in self._of_workers.values():
            total.add(totals)
        return total

    def _reset(self, **_: Any) -> None:
        self.schedule = None
        self._of_workers.clear()

    def _end(self, **_: Any) -> None:
        if self.schedule is not None:
            self.schedule.end(time.perf_counter())

    def _start(self, **_: Any) -> None:
        """Begin once all users are there; that comes again whenever users are added, and changes no rate."""
        runner = self._environment.runner
        if isinstance(runner, MasterRunner):
            workers = sorted(runner.clients)
            for index, client_id in enumerate(workers):
                share = {
                    "rate": self.rate_per_second / len(workers),
                    "process": self.process,
                    "phase": index / len(workers),
                }
                runner.send_message(_MESSAGE, share, client_id)
        elif isinstance(runner, LocalRunner):
            self._begin(self.rate_per_second, self.process, 0.0)

    def _start_share(self, msg: Any, **_: Any) -> None:
        self._begin(msg.data["rate"], msg.data["process"], msg.data["phase"])

    def _begin(self, rate_per_second: float, process: Process, phase: float) -> None:
        if self.schedule is None:
            seed = f"{session.run_id(self._environment)} {phase}"
            self.schedule = ArrivalSchedule(
                rate_per_second, process, now=time.perf_counter(), seed=seed, phase=phase
            )

    def _report(self, data: dict[str, Any], **_: Any) -> None:
        if self.schedule is not None:
            data["arrivals"] = dataclasses.asdict(self.schedule.totals(time.perf_counter()))

    def _note(self, client_id: str, data: dict[str, Any], **_: Any) -> None:
        if "arrivals" in data:
            self._of_workers[client_id] = ArrivalTotals(**data["arrivals"])

    def _print(self, **_: Any) -> None:
        totals = self.totals()
        if (ratio := totals.achieved_ratio) is None:
            _log.warning("open model: no arrivals")
            return
        _log.info(
            "open model: offered %d arrivals in %.1f s (%.1f/s), achieved %d (%.4f of them), %d late by more than "
            "%g ms, the worst by %.0f ms",
            totals.offered,
            totals.seconds,
            totals.offered / totals.seconds,
            totals.achieved,
            ratio,
            totals.late,
            LATE_SECONDS * 1000,
            totals.worst_late_seconds * 1000,
        )


class OpenModelTest(OrderUser):
    """A worker that places the next order that is due."""

    arrivals: Arrivals  # of the process
    _due: float | None = None

    def wait_time(self) -> float:
        """Take the next arrival, and wait until it is due."""
        schedule = self.arrivals.schedule
        if schedule is None:
            return _POLL_SECONDS
        self._due = schedule.take()
        return max(0.0, self._due - time.perf_counter())

    @task
    def create_order(self) -> None:
        """Place the order that is due."""
        schedule, due = self.arrivals.schedule, self._due
        if due is None or schedule is None:
            return  # the arrivals have not started
        self._due = None
        while (early := due - time.perf_counter()) > 0:  # the event loop's clock may lag behind
            gevent.sleep(early)
        self.place_order(late_seconds=schedule.start(due, time.perf_counter()))


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not 0 < rate < float("inf"):
        raise ArgumentTypeError("a number above 0")
    return rate


@events.init_command_line_parser.add_listener
def add_arguments(parser: ArgumentParser) -> None:
    """Add `--rate` and `--arrivals`; the environment's RATE and ARRIVALS are their defaults."""
    parser.add_argument(
        "--rate",
        type=_rate,
        default=os.environ.get("RATE", str(DEFAULT_RATE_PER_SECOND)),
        help="Orders per second, by all processes together",
    )
    parser.add_argument(
        "--arrivals",
        choices=("poisson", "constant"),
        default=os.environ.get("ARRIVALS", "poisson"),
        help="Independent customers, or one order after exactly the same time",
    )


@events.init.add_listener
def prepare(environment: Environment, **_: Any) -> None:
    """Set the run's arrivals up, and as many workers as it probably needs."""
    OpenModelTest.arrivals = arrivals = Arrivals(environment)
    options = environment.parsed_options
    if options is not None and options.num_users is None:
        options.num_users = max(_MIN_WORKERS, min(_MAX_WORKERS, round(arrivals.rate_per_second)))
        options.spawn_rate = options.spawn_rate or _SPAWN_RATE
