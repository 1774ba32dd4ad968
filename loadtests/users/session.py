"""A Locust run's id, and an end of it that cuts off neither a request nor a worker's last figures."""

import inspect
import os
import re
import uuid
from argparse import ArgumentParser, ArgumentTypeError
from typing import Any

import gevent
from locust import events
from locust.env import Environment
from locust.runners import MasterRunner, WorkerRunner

STOP_TIMEOUT_SECONDS = 12.0  # longer than any request: see LightUser.timeout_seconds

_DRAIN, _DRAINED = "loadtest_drain", "loadtest_drained"


def _run_id(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,40}", text):
        raise ArgumentTypeError("letters, digits, - and _, at most 40")
    return text


_OWN_RUN_ID = _run_id(os.environ.get("LOADTEST_RUN_ID") or uuid.uuid4().hex[:12])  # forked workers share it


def run_id(environment: Environment) -> str:
    """The run's id: `--run-id` or LOADTEST_RUN_ID, else made up; a master's goes to its workers."""
    return getattr(environment.parsed_options, "run_id", None) or _OWN_RUN_ID


def customer_id(environment: Environment) -> str:
    """The customer of all the run's orders."""
    return f"loadtest-{run_id(environment)}"


@events.init_command_line_parser.add_listener
def add_arguments(parser: ArgumentParser) -> None:
    """Add `--run-id`."""
    parser.add_argument(
        "--run-id",
        type=_run_id,
        default=_OWN_RUN_ID,
        include_in_web_ui=False,
        help="Marks the run's orders: their customer is loadtest-<run id>",
    )


@events.init.add_listener
def prepare(environment: Environment, **_: Any) -> None:
    """Let requests in flight finish at the end, on every node, where no `--stop-timeout` was given.

    Locust's default is to kill users at once: what they had sent would end as unknown. And its master waits half
    a second for the workers' last figures, whatever they still wait for: here it asks them to stop first.
    """
    environment.stop_timeout = environment.stop_timeout or STOP_TIMEOUT_SECONDS
    inspect.stack()  # Runner.stop() calls it; the first call reads every module's source, and stalls for 0.1 s
    gevent.get_hub().loop.update_now()  # --run-time counts from the loop's time, which is that before the imports
    runner = environment.runner
    if isinstance(runner, WorkerRunner):
        runner.register_message(_DRAIN, _Drain(runner).stop, concurrent=True)
    elif isinstance(runner, MasterRunner):
        workers = _Workers(runner)
        runner.register_message(_DRAINED, workers.note)
        environment.events.test_stop.add_listener(workers.drain)


class _Drain:
    """A worker's end of it."""

    def __init__(self, runner: WorkerRunner) -> None:
        self._runner = runner

    def stop(self, **_: Any) -> None:
        """Let the users finish, and say so."""
        self._runner.stop()
        self._runner.send_message(_DRAINED)


class _Workers:
    """A master's workers, and which of them have not stopped yet."""

    def __init__(self, runner: MasterRunner) -> None:
        self._runner = runner
        self._waiting_for: set[str] = set()

    def drain(self, environment: Environment, **_: Any) -> None:
        """Ask all workers to stop, and wait until they have."""
        runner = self._runner
        if runner.user_count == 0:
            return  # they were stopped one by one, from the web interface
        self._waiting_for = {worker.id for worker in runner.clients.all}
        runner.send_message(_DRAIN)
        with gevent.Timeout(environment.stop_timeout + 1, False):  # noqa: FBT003 - gevent's way to not raise
            while self._waiting_for & set(runner.clients):
                gevent.sleep(0.02)

    def note(self, msg: Any, **_: Any) -> None:
        """Note that one has stopped."""
        self._waiting_for.discard(msg.node_id)
