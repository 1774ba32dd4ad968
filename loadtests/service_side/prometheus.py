"""A Prometheus, as far as a load test asks it."""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import httpx

from loadtests.samples import Window
from loadtests.service_side.http_client import UNANSWERED, http_client, why

_TIMEOUT_SECONDS = 10.0

Instance = tuple[str, str]  # job, instance
# (labels, value) of each series
Vector = list[tuple[Mapping[str, str], float]]
# (labels, [(seconds since the epoch, value)]) of each series
Matrix = list[tuple[Mapping[str, str], list[tuple[float, float]]]]


class PrometheusError(Exception):
    """A Prometheus did not answer, or not with what was asked for."""


class Prometheus:
    """The HTTP API: https://prometheus.io/docs/prometheus/latest/querying/api/."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.ahead_seconds = 0.0  # its clock before ours; all times here are ours
        self._client = http_client(timeout_seconds=_TIMEOUT_SECONDS)

    def reload(self) -> None:
        """POST /-/reload: it reads its configuration again; no metric is reset by it."""
        self._send("POST", "/-/reload")

    def set_clock(self) -> None:
        """Find out how far its clock is before ours: what it calls now, in the middle of the time that it takes."""
        asked_at = time.time()
        its_time = float(self._get("/api/v1/query", query="time()")["result"][1])
        self.ahead_seconds = its_time - (asked_at + time.time()) / 2

    def query(self, promql: str, at: float | None = None) -> Vector:
        """The instant vector at *at*, by default its own now, without NaN."""
        when = {} if at is None else {"time": at + self.ahead_seconds}
        result = self._get("/api/v1/query", query=promql, **when)["result"]
        values = [(series["metric"], float(series["value"][1])) for series in result]
        return [(labels, value) for labels, value in values if not math.isnan(value)]

    def query_range(self, promql: str, window: Window, step_seconds: float) -> Matrix:
        """*promql* at every step of *window*, without NaN."""
        start, end = window.start + self.ahead_seconds, window.end + self.ahead_seconds
        return self._matrix(
            self._get("/api/v1/query_range", query=promql, start=start, end=end, step=step_seconds)["result"]
        )

    def samples(self, selector: str, window: Window) -> Matrix:
        """Every sample of *selector* in *window*, at the times of the scrapes."""
        promql = f"{selector}[{math.ceil(window.seconds)}s]"
        end = window.end + self.ahead_seconds
        return self._matrix(self._get("/api/v1/query", query=promql, time=end)["result"])

    def scraped_urls(self) -> Mapping[Instance, str]:
        """By (job, instance): the page of each target whose last scrape went well."""
        targets = self._get("/api/v1/targets", state="active")["activeTargets"]
        return {
            instance(target["labels"]): target["scrapeUrl"] for target in targets if target["health"] == "up"
        }

    def alerting_rules(self) -> Mapping[str, str]:
        """The alerts that it has loaded, and the health of the worst rule of each."""
        health: dict[str, str] = {}
        for group in self._get("/api/v1/rules", type="alert")["groups"]:
            for rule in group["rules"]:
                if health.get(rule["name"], "ok") == "ok":
                    health[rule["name"]] = rule.get("health", "unknown")
        return health

    def _matrix(self, result: Sequence[Any]) -> Matrix:
        return [
            (
                series["metric"],
                [
                    (at - self.ahead_seconds, value)
                    for at, text in series["values"]
                    if not math.isnan(value := float(text))
                ],
            )
            for series in result
        ]

    def _get(self, path: str, **query: str | float) -> Any:
        answer = self._send("GET", path, query)
        try:
            return answer.json()["data"]
        except (ValueError, KeyError, TypeError) as exc:
            raise PrometheusError(f"{self.url}{path}: not the answer of a Prometheus") from exc

    def _send(self, method: str, path: str, query: Mapping[str, str | float] | None = None) -> httpx.Response:
        try:
            return self._client.request(method, f"{self.url}{path}", params=query).raise_for_status()
        except UNANSWERED as exc:
            raise PrometheusError(f"{self.url}{path}: {why(exc)}") from exc


def instance(labels: Mapping[str, str]) -> Instance:
    """The instance that a series is of."""
    return labels.get("job", ""), labels.get("instance", "")
