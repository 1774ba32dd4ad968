"""Several replicas on one port, as their users run them: `python -m app serve --replicas N`."""

import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from tests.support.service_process import ServiceProcess

_REPLICA = re.compile(r"^replica (\d+) on (\S+)   operations (\S+)   process (\d+)\n", re.MULTILINE)
_START_SECONDS = 30


class Replica(NamedTuple):
    """The process that runs now."""

    number: int
    url: str
    operations_url: str
    pid: int


class ReplicaProcesses(ServiceProcess):
    """A running `python -m app serve --replicas *count*` on a free port."""

    def __init__(
        self,
        directory: Path,
        database_url: str | None,
        count: int,
        settings: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__(directory, database_url, settings, arguments=("serve", "--replicas", str(count)))

    @property
    def said(self) -> list[Replica]:
        """The line of every process so far."""
        lines = _REPLICA.findall(self.stderr_path.read_text())
        return [Replica(int(number), url, operations, int(pid)) for number, url, operations, pid in lines]

    @property
    def replicas(self) -> dict[int, Replica]:
        """By number, the process that said so last."""
        return {replica.number: replica for replica in self.said}

    def end(self, number: int, signal_number: int) -> Replica:
        """Send a signal to one replica, and wait until its successor listens; the successor."""
        ended = self.replicas[number]
        os.kill(ended.pid, signal_number)
        give_up_at = time.monotonic() + _START_SECONDS
        while (successor := self.replicas[number]).pid == ended.pid:
            if self.process.poll() is not None or time.monotonic() > give_up_at:
                raise RuntimeError(f"replica {number} has no successor: {self.stderr_path.read_text()}")
            time.sleep(0.02)
        return successor
