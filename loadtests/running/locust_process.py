"""Locust in a process of its own, with the plan's locustfile and the recorder."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from loadtests.machine import processes
from loadtests.running.plan import Plan

FOLDER = Path(__file__).parents[1]
_START_SECONDS = 30.0  # more than it needs to import and to connect its own workers
_REMOTE_START_SECONDS = 180.0  # the same where they are started elsewhere, by whoever

_STOP_SECONDS = 40.0  # its own stop timeout, and the workers' last reports


class LocustProcess:
    """A running Locust; its samples, its figures and its log (locust.log) are in a directory."""

    def __init__(self, process: subprocess.Popen[bytes], log_path: Path) -> None:
        self._process = process
        self._log_path = log_path
        self.trouble = ""  # why it did not end as it should; known once it was stopped

    @classmethod
    @contextlib.contextmanager
    def started(cls, plan: Plan, url: str, *, run_id: str, directory: Path) -> Iterator[Self]:
        """Send the load of *plan* to *url* until the block ends, at the latest."""
        log_path = directory / "locust.log"
        command = _command(plan, url, run_id, directory)
        environment = _environment(plan, directory)
        with (
            log_path.open("wb") as log,
            processes.child(command, env=environment, stdout=log, stderr=log) as process,
        ):
            yield cls(process, log_path)

    @property
    def ended(self) -> bool:
        """True once it has ended by itself, or was stopped."""
        return self._process.poll() is not None

    def stop(self) -> None:
        """Ask it to let every request in flight finish, and wait until it has."""
        if self.ended:
            self.trouble = f"Locust ended by itself: {processes.tail(self._log_path)}"
            return
        self._process.terminate()
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.trouble = f"Locust did not end within {_STOP_SECONDS:g} s"


def start_seconds(plan: Plan) -> float:
    """The most that it may take until users start."""
    return _REMOTE_START_SECONDS if plan.workers else _START_SECONDS


def _command(plan: Plan, url: str, run_id: str, directory: Path) -> list[str]:
    file = "locustfile.py" if plan.rate_per_second is None else "open_model.py"
    longest = plan.ramp_seconds + plan.settle_seconds + plan.duration_seconds + 2 * start_seconds(plan)
    files = f"{FOLDER / file},{FOLDER / 'users' / 'recording.py'}"
    command = [sys.executable, "-m", "locust", "-f", files]
    command += ["--headless", "--only-summary", "--exit-code-on-error", "0", "--host", url]
    command += ["-u", str(plan.users), "-r", f"{plan.spawn_rate:g}", "--run-id", run_id]
    command += ["--run-time", f"{round(longest)}s", "--csv", str(directory / "locust")]
    if plan.workers:
        command += ["--master", "--expect-workers", str(plan.workers)]
        command += ["--expect-workers-max-wait", f"{start_seconds(plan):.0f}"]
    elif plan.processes > 1:
        port = str(processes.free_port())
        command += ["--processes", str(plan.processes), "--master-port", port, "--master-bind-port", port]
        command += ["--master-bind-host", "127.0.0.1", "--master-host", "127.0.0.1"]
    if plan.rate_per_second is not None:
        command += ["--rate", f"{plan.rate_per_second:g}"]
    return command


def _environment(plan: Plan, directory: Path) -> dict[str, str]:
    given = {
        "PYTHONPATH": str(processes.ROOT),
        "LOADTEST_PROFILE": plan.profile.name,
        "LOADTEST_RECORD_DIR": str(directory),
    }
    if plan.api_key:
        given["LOADTEST_API_KEY"] = plan.api_key
    if certificates := os.environ.get("SSL_CERT_FILE"):
        given["SSL_CERT_FILE"] = certificates
    return {**processes.plain_environment(), **given}
