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
        self._client = http_client(timeout_seconds=_TIMEOUT_SECONDS)

    def reload(self) -> None:
        """POST /-/reload: it reads its configuration again; no metric is reset by it."""
        self._send("POST", "/-/reload")

    def query(self, promql: str, at: float | None = None) -> Vector:
        """The instant vector at *at*, by default now, without NaN."""
        result = self._get("/api/v1/query", query=promql, time=time.time() if at is None else at)["result"]
        values = [(series["metric"], float(series["value"][1])) for series in result]
        return [(labels, value) for labels, value in values if not math.isnan(value)]

    def query_range(self, promql: str, window: Window, step_seconds: float) -> Matrix:
        """*promql* at every step of *window*, without NaN."""
        return _matrix(
            self._get(
                "/api/v1/query_range", query=promql, start=window.start, end=window.end, step=step_seconds
            )["result"]
        )

    def samples(self, selector: str, window: Window) -> Matrix:
        """Every sample of *selector* in *window*, at the times of the scrapes."""
        promql = f"{selector}[{math.ceil(window.seconds)}s]"
        return _matrix(self._get("/api/v1/query", query=promql, time=window.end)["result"])

    def scraped_urls(self) -> Mapping[Instance, str]:
        """By (job, instance): the page of each target whose last scrape went well."""
        targets = self._get("/api/v1/targets", state="active")["activeTargets"]
        return {
            instance(target["labels"]): target["scrapeUrl"] for target in targets if target["health"] == "up"
        }

    def firing(self) -> set[tuple[str, str]]:
        """(severity, alert and its labels) of all that fire now."""
        return {
            (alert["labels"].get("severity", ""), _alert_name(alert["labels"]))
            for alert in self._get("/api/v1/alerts")["alerts"]
            if alert["state"] == "firing"
        }

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


def _matrix(result: Sequence[Any]) -> Matrix:
    return [
        (
            series["metric"],
            [(at, value) for at, text in series["values"] if not math.isnan(value := float(text))],
        )
        for series in result
    ]


def _alert_name(labels: Mapping[str, str]) -> str:
    rest = ", ".join(f"{k}={v}" for k, v in sorted(labels.items()) if k not in ("alertname", "severity"))
    return f"{labels.get('alertname', '')}{{{rest}}}"
