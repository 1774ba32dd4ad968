"""Reads a page at a steady pace, as Prometheus does: `python -m loadtests.bench.scraper URL INTERVAL_SECONDS`.

It is a process of its own, so that what it measures waits for nothing but the service. Each scrape is a line of JSON on
standard output: [started at by time.perf_counter, seconds, bytes].
"""

import contextlib
import http.client
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from loadtests.machine import processes

# What Prometheus asks for: OpenMetrics, or else the text format.
_ACCEPT = "application/openmetrics-text;version=1.0.0;q=0.6,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
_TIMEOUT_SECONDS = 10.0


@dataclass(frozen=True)
class Scrape:
    """One reading of the page."""

    started_at: float  # by time.perf_counter, which all processes of a machine share
    seconds: float
    size_bytes: int


@dataclass
class Scrapes:
    """The readings of a scraper; filled when its block ends."""

    done: list[Scrape] = field(default_factory=list)


@contextlib.contextmanager
def scraping(url: str, interval_seconds: float) -> Iterator[Scrapes]:
    """Scrape *url* while the block runs.

    Raises:
        RuntimeError: not a single scrape came through.
    """
    scrapes = Scrapes()
    command = [sys.executable, "-m", "loadtests.bench.scraper", url, f"{interval_seconds:g}"]
    with processes.child(command, stdout=subprocess.PIPE) as process:
        yield scrapes
        process.terminate()
        lines = process.stdout.read().splitlines() if process.stdout else []
    scrapes.done = [Scrape(*json.loads(line)) for line in lines]
    if not scrapes.done:
        raise RuntimeError(f"{url} could not be scraped")


def main(url: str, interval_seconds: float) -> None:
    """Scrape for ever."""
    target = urlsplit(url)
    # Kept open, as Prometheus does.
    connection = http.client.HTTPConnection(target.netloc, timeout=_TIMEOUT_SECONDS)
    due_at = time.perf_counter()
    while True:
        started_at = time.perf_counter()
        connection.request("GET", target.path, headers={"Accept": _ACCEPT})
        answer = connection.getresponse()
        size = len(answer.read())
        took = time.perf_counter() - started_at
        if answer.status != http.client.OK:
            sys.exit(f"{url} answers {answer.status}")
        sys.stdout.write(json.dumps([started_at, took, size]) + "\n")
        sys.stdout.flush()
        due_at = max(due_at + interval_seconds, time.perf_counter())
        time.sleep(max(0.0, due_at - time.perf_counter()))


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
