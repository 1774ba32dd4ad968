"""The target of a run: a deployment that runs already, or a service of our own on a fresh embedded Postgres."""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from loadtests.machine import processes
from loadtests.service_side.prometheus import Prometheus, PrometheusError
from loadtests.service_side.prometheus_sampler import selling

_CONNECTIONS_PER_REPLICA = 70  # of which its pool of 50 is less than three quarters
_DEFAULT_MEMORY_BYTES = 2 * 2**30  # the plan's limit of a container


@dataclass(frozen=True)
class Target:
    """An address for orders, and what can be asked about it."""

    url: str
    metrics_urls: Sequence[str]  # a `/metrics` page for every replica
    dsn: str | None  # of its database
    pids: Sequence[int] = ()  # of service processes on this machine
    postgres: processes.Postgres | None = None  # ours

    @property
    def memory_limit_bytes(self) -> float:
        """The limit of one service process: its cgroup's where it is ours and has one, else the plan's 2 GiB."""
        limits = [limit for pid in self.pids if (limit := cgroup_memory_limit_bytes(pid)) is not None]
        return float(min(limits, default=_DEFAULT_MEMORY_BYTES))

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
            postgres.dsn, folder, command=command, replicas=replicas, settings=settings
        ) as service,
    ):
        yield Target(service.url, service.metrics_urls, postgres.dsn, [service.process.pid], postgres)


def cgroup_memory_limit_bytes(pid: int) -> int | None:
    """The memory limit that applies to *pid*; None: there is none, or no cgroups (Linux, v2 and v1)."""
    try:
        groups = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    except OSError:
        return None
    for line in groups:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, name = Path("/sys/fs/cgroup"), "memory.max"
        elif "memory" in controllers.split(","):
            root, name = Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"
        else:
            continue
        # In a container the path may be that of the host: its own group is then mounted at the root.
        for folder in (root / path.lstrip("/"), root):
            with contextlib.suppress(OSError, ValueError):
                limit = int((folder / name).read_text())
                if limit < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
                    return limit
    return None
