"""A load test before it runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loadtests.judging import acceptance
from loadtests.users.profiles import Profile

REPLICAS = 3  # the plan's minReplicas


@dataclass(frozen=True)
class Plan:
    """The load, the target, and what the run is judged by."""

    profile: Profile
    users: int
    spawn_rate: float
    duration_seconds: float  # measured, after the warm-up
    settle_seconds: float  # of the warm-up, once all users are there
    command: str
    replicas: int = REPLICAS  # of a service of our own
    host: str | None = None  # None: what Prometheus scrapes; without one a service of our own
    metrics_urls: Sequence[str] = ()
    dsn: str | None = None
    prometheus_url: str | None = None
    elasticsearch_url: str | None = None
    api_key: str | None = None
    strict: bool = False
    processes: int = 1
    workers: int = 0  # Locust workers elsewhere, which record through the results' link `current`
    rate_per_second: float | None = None  # the open model's
    memory_limit_bytes: float | None = None  # of a service process; None: as its cgroup says, or the plan
    cpu_limit_cores: float | None = None
    abort_after_seconds: float | None = None  # of measured time, when a limit is missed; None: it runs on
    live_port: int | None = None  # of the page of the run under way; 0: any; None: there is none
    acceptance_path: Path = acceptance.PATH

    @property
    def ramp_seconds(self) -> float:
        """The time until all users are there."""
        return self.users / self.spawn_rate

    @property
    def load(self) -> str:
        """The load in words."""
        if self.rate_per_second is not None:
            return f"{self.rate_per_second:g} orders/s offered for {self.duration_seconds:g} s"
        least, most = self.profile.wait_seconds
        return f"{self.users} users, {least:g} to {most:g} s between two orders, {self.duration_seconds:g} s"
