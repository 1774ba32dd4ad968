"""The target of a run: a deployment that runs already, or a service of our own on a fresh embedded Postgres."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from loadtests.machine import processes
from loadtests.service_side.prometheus import Prometheus, PrometheusError
from loadtests.service_side.prometheus_sampler import selling

_CONNECTIONS_PER_REPLICA = 70  # of which its pool of 50 is less than three quarters


@dataclass(frozen=True)
class Target:
    """An address for orders, and what can be asked about it."""

    url: str
    metrics_urls: Sequence[str]  # a `/metrics` page for every replica
    dsn: str | None  # of its database
    pids: Sequence[int] = ()  # of service processes on this machine
    postgres: processes.Postgres | None = None  # ours

    @property
    def trouble(self) -> str:
        """The complaints of the Postgres that was started for this run."""
        return self.postgres.trouble if self.postgres else ""


def deployment(url: str, metrics_urls: Sequence[str], dsn: str | None) -> Target:
    """A target that runs already; without *metrics_urls* its own page is the only replica's."""
    url = url.rstrip("/")
    pages = [page if page.endswith("/metrics") else f"{page.rstrip('/')}/metrics" for page in metrics_urls]
    return Target(url, pages or [f"{url}/metrics"], dsn)


def scraped_by(prometheus: Prometheus) -> str:
    """The URL of the one order service that *prometheus* scrapes.

    Raises:
        PrometheusError: it scrapes none, or several.
    """
    services, pages = selling(prometheus), prometheus.scraped_urls()
    urls = sorted(page for its, page in pages.items() if its in services)
    if len(urls) != 1:
        scraped = ", ".join(urls) or "none that it reaches"
        raise PrometheusError(
            f"{prometheus.url}: HOST must say which order service to test; it scrapes {scraped}"
        )
    return urls[0].removesuffix("/metrics")


@contextlib.contextmanager
def own_service(
    folder: Path,
    *,
    replicas: int = 1,
    command: Sequence[str] = processes.SERVICE,
    settings: Mapping[str, str] | None = None,
    cwd: Path = processes.ROOT,
) -> Iterator[Target]:
    """The service with its shipped settings on a Postgres of its own in *folder*; both end with the block.

    Args:
        replicas: how many of it, on one port.

    Raises:
        RuntimeError: one of them does not start; the message says why.
    """
    with (
        processes.embedded_postgres(
            folder, max_connections=replicas * _CONNECTIONS_PER_REPLICA if replicas > 1 else None
        ) as postgres,
        processes.service(
            postgres.dsn, folder, command=command, replicas=replicas, settings=settings, cwd=cwd
        ) as service,
    ):
        yield Target(service.url, service.metrics_urls, postgres.dsn, [service.process.pid], postgres)
