"""The service as its users run it: a process of its own, started by `python -m app`."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import httpx
from prometheus_client.parser import text_string_to_metric_families

_STARTED = re.compile(r"order service on (\S+) .*?(?:   operations (\S+))?\n")
_START_SECONDS = 30

# Settings with which a service exports all of its metrics and has all of its routes; nobody is at that address.
EVERYTHING: Mapping[str, object] = {"PAYMENTS_URL": "http://127.0.0.1:9", "FAULTS_TOKEN": "let-it-break"}


class ServiceProcess:
    """A running `python -m app`, with *arguments*, or another *module* that serves it, on a free loopback port.

    `url` is where it listens, `operations_url` where it answers probes and metrics: the same unless OPS_PORT is set.
    `log_path` holds its JSON lines, `stderr_path` what it said at start.
    """

    def __init__(
        self,
        directory: Path,
        database_url: str | None,
        settings: Mapping[str, object] | None = None,
        *,
        module: str = "app",
        arguments: Sequence[str] = (),
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.log_path = directory / "stdout.log"
        self.stderr_path = directory / "stderr.log"
        self._command = [sys.executable, "-m", module, *arguments]
        self._environment = {
            **{
                name: value
                for name, value in os.environ.items()
                if name in {"PATH", "HOME", "TMPDIR", "LANG"}
            },
            "PORT": "0",
            "EMBEDDED_POSTGRES_DIR": str(directory / "postgres"),
            **({} if database_url is None else {"DATABASE_URL": database_url}),
            **{name: str(value) for name, value in (settings or {}).items()},
        }
        self.url = self.operations_url = ""

    def start(self) -> Self:
        """Start it and wait until it listens; raises RuntimeError with what it said where it does not."""
        with self.log_path.open("ab") as stdout, self.stderr_path.open("wb") as stderr:
            self.process = subprocess.Popen(
                self._command,
                env=self._environment,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )
        give_up_at = time.monotonic() + _START_SECONDS
        while (started := _STARTED.search(self.stderr_path.read_text())) is None:
            if self.process.poll() is not None or time.monotonic() > give_up_at:
                self.kill()
                raise RuntimeError(f"the service did not start: {self.stderr_path.read_text()}")
            time.sleep(0.02)
        self.url = started[1]
        self.operations_url = started[2] or self.url
        return self

    def terminate(self, timeout_seconds: float = 30) -> int:
        """SIGTERM, and its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout_seconds)

    def kill(self) -> None:
        """SIGKILL; repeatable."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    def client(self, **options: object) -> httpx.Client:
        """An HTTP client for it, over connections that are kept."""
        return httpx.Client(base_url=self.url, timeout=30, **options)  # type: ignore[arg-type]

    def metrics(self) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
        """Every sample of `/metrics`, by name and sorted labels."""
        text = httpx.get(f"{self.operations_url}/metrics", timeout=10).text
        return {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def metric(self, name: str, **labels: str) -> float:
        """One sample; 0 where it does not exist."""
        return self.metrics().get((name, tuple(sorted(labels.items()))), 0.0)
