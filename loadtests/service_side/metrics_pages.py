"""The server's side of a run from its own `/metrics` pages, read once a second."""

import threading
import time
from collections.abc import Iterable, Mapping
from typing import Self

import httpx
from prometheus_client.parser import text_string_to_metric_families

from loadtests.run_record import ServiceFigures
from loadtests.samples import Window
from loadtests.service_side.http_client import UNANSWERED, http_client, why
from loadtests.service_side.readings import Limits, Page, Pages, Readings

_TIMEOUT_SECONDS = 5.0
_LAST_ATTEMPTS = 3


class PageError(Exception):
    """A page could not be read, or is not the order service's; the message says why."""


def parse(text: str, at: float) -> Page:
    """The samples of a page in the text format; raises ValueError where it is not one."""
    # 4 ms of CPU for a page of 340 lines: of ten replicas, once a second, 4 % of a core.
    return Page(
        at,
        {
            (sample.name, tuple(sorted(pair for pair in sample.labels.items() if pair[1]))): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        },
    )


def read_page(client: httpx.Client, url: str) -> Page:
    """Read *url* now.

    Raises:
        PageError: there is no page, or no order service's.
    """
    try:
        page = parse(client.get(url).raise_for_status().text, time.time())
    except (*UNANSWERED, ValueError) as exc:
        raise PageError(f"{url}: {why(exc)}") from exc
    if page.get("orders_total", status="success", error_type="") is None:
        raise PageError(f"{url} has no orders_total")
    return page


class MetricsSampler:
    """Reads every replica's page once a second, in a thread of its own, while its block runs."""

    def __init__(self, urls: Iterable[str], *, interval_seconds: float = 1.0) -> None:
        self._readings = Readings([Pages(url) for url in urls])
        self.trouble: dict[str, str] = {}  # url -> why its page could not be read, the last time
        self._client = http_client(timeout_seconds=_TIMEOUT_SECONDS)
        self._interval_seconds = interval_seconds
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)

    def __enter__(self) -> Self:
        self.read()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._client.close()

    def read(self) -> None:
        """Read all pages now."""
        for replica in self._readings.replicas:
            try:
                replica.readings.append(read_page(self._client, replica.url))
                self.trouble.pop(replica.url, None)
            except PageError as exc:
                self.trouble[replica.url] = str(exc)

    @property
    def unread(self) -> str:
        """Why the rise of the counters is not known; empty: it is."""
        turns = [one.url for one in self._readings.replicas if one.takes_turns]
        said = [f"{url}: several processes take turns behind it" for url in turns]
        return "; ".join([*self.trouble.values(), *said])

    def finish(self) -> None:
        """Stop reading, after one last time: everything that was asked for has ended."""
        self._ended.set()
        self._thread.join()
        for _ in range(_LAST_ATTEMPTS):  # one that is only slow answers in the end
            self.read()
            if not self.trouble:
                break
        for replica in self._readings.replicas:
            replica.gone = replica.url in self.trouble and bool(replica.readings)

    def _run(self) -> None:
        while not self._ended.wait(self._interval_seconds):
            self.read()

    def success_rise(self) -> float | None:
        """The rise of `orders_total{status="success"}` from the first reading to the last, all replicas."""
        return None if self.trouble else self._readings.success_rise()

    def server(self, window: Window, *, limits: Limits) -> ServiceFigures:
        """The figures over *window*."""
        return self._readings.server(window, source="metrics", limits=limits)

    def per_second(self, origin: float, seconds: range) -> Mapping[str, list[float | None]]:
        """The server's columns over *seconds* since *origin* (see `SERIES`)."""
        return self._readings.per_second(origin, seconds)

    def now(self) -> tuple[float | None, float | None, float | None]:
        """The live line's figures: CPU percent of the busiest replica in the last seconds, pool in use, pool max."""
        cpu: float | None = None
        in_use = pool_max = None
        for replica in self._readings.replicas:
            recent = replica.readings[-3:]
            if len(recent) > 1:
                cpu = max(cpu or 0.0, replica.cpu_percent(recent, 2 * self._interval_seconds) or 0.0)
            if recent and (lent := recent[-1].get("db_pool_in_use")) is not None and lent >= (in_use or 0):
                in_use, pool_max = lent, recent[-1].get("db_pool_max")
        return cpu, in_use, pool_max
