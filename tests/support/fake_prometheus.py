"""The part of Prometheus's HTTP API that a load test asks, over the samples of real `/metrics` pages.

https://prometheus.io/docs/prometheus/latest/querying/api/. It evaluates nothing but the rate of CPU: a query that names
one of the service's metrics gets that metric's samples as they are now, whatever is around the name; a plain range gets
the samples of every page that was read so far. Alerts are made up: they began to fire a moment ago.
"""

import contextlib
import http.server
import json
import re
import threading
import time
import urllib.parse
from collections.abc import Iterator, Sequence
from typing import Any

from loadtests.service_side.alerts import our_rules
from loadtests.service_side.http_client import http_client
from loadtests.service_side.metrics_pages import read_page
from loadtests.service_side.readings import Page


class FakePrometheus:
    """The queries it was asked, and the answers to them."""

    def __init__(self, metrics_urls: Sequence[str], alerts: Sequence[tuple[Any, ...]]) -> None:
        self.url = ""
        self.rules_loaded = True
        self.ahead_seconds = 0.0  # of its clock, as `time()` tells it
        self.died = False  # it answers nothing any more
        self.requests: list[str] = []
        self._client = http_client(timeout_seconds=10)
        self._metrics_urls = metrics_urls
        self._alerts = alerts
        self._pages: dict[str, list[Page]] = {url: [] for url in metrics_urls}

    def data(self, path: str, query: dict[str, str]) -> Any:
        """The `data` of an answer."""
        if path == "/api/v1/rules":
            names = {name for name, *_ in self._alerts} | (our_rules() if self.rules_loaded else set())
            return {"groups": [{"rules": [{"name": name, "health": "ok"} for name in sorted(names)]}]}
        if path == "/api/v1/targets":
            return {
                "activeTargets": [
                    {"labels": self._target(url), "scrapeUrl": url, "health": "up"}
                    for url in self._metrics_urls
                ]
            }
        if query["query"] == "time()":
            now = time.time() + self.ahead_seconds
            return {"resultType": "scalar", "result": [now, str(now)]}
        return {"result": list(self._result(query["query"], query, instant=path.endswith("/query")))}

    def _result(self, promql: str, query: dict[str, str], *, instant: bool) -> Iterator[dict[str, Any]]:
        if promql.startswith("ALERTS["):
            yield from self._fired(float(query["time"]))
        elif promql.startswith("up["):
            seconds, end = int(re.findall(r"\[(\d+)s\]", promql)[0]), float(query["time"])
            times = [end - each for each in range(0, seconds, 2)][::-1]
            values = [[at, "1"] for at in times]
            yield {"metric": self._target(self._metrics_urls[0]), "values": values}
        elif promql == "up":
            for url in self._metrics_urls:
                yield {"metric": self._target(url), "value": [time.time() + self.ahead_seconds, "1"]}
        else:
            for url in self._metrics_urls:
                self._pages[url].append(read_page(self._client, url))
            if names := re.fullmatch(r'\{__name__=~"(.*)"\}\[\d+s\]', promql):
                yield from self._samples(re.compile(names[1]))
            elif re.fullmatch(r"orders_total\{.*\}\[\d+s\]", promql):
                yield from self._samples(re.compile("orders_total"))
            else:
                yield from self._series(promql, instant=instant)

    def _fired(self, now: float) -> Iterator[dict[str, Any]]:
        for name, severity, *more in self._alerts:
            labels = {"alertname": name, "severity": severity, "alertstate": "firing"}
            labels |= next((each for each in more if isinstance(each, dict)), {})
            began = now - 1.0 - next((each for each in more if isinstance(each, float)), 0.0)
            values = [[at, "1"] for at in (began, began + 0.5)]
            yield {"metric": {"__name__": "ALERTS", **labels}, "values": values}

    def _samples(self, names: re.Pattern[str]) -> Iterator[dict[str, Any]]:
        for url, pages in self._pages.items():
            for name, labels in pages[-1].values:
                if names.fullmatch(name):
                    metric = {"__name__": name, **dict(labels), **self._target(url)}
                    values = [
                        [page.at + self.ahead_seconds, str(page.values[name, labels])]
                        for page in pages
                        if (name, labels) in page.values
                    ]
                    yield {"metric": metric, "values": values}

    def _target(self, url: str) -> dict[str, str]:
        return {"job": "orders", "instance": urllib.parse.urlsplit(url).netloc}

    def _series(self, promql: str, *, instant: bool) -> Iterator[dict[str, Any]]:
        name = re.findall(
            r"[a-z_]+_(?:bucket|sum|total|bytes|in_use|max|depth|state|flight|seconds)", promql
        )[0]
        for url, pages in self._pages.items():
            page = pages[-1]
            for (its, labels), value in page.values.items():
                wanted = 'status="success"' not in promql or ("status", "success") in labels
                if its != name or not wanted:
                    continue
                at = page.at + self.ahead_seconds
                shown = at if promql.startswith("timestamp") else value
                if promql.startswith("rate(process_cpu") and page.at > pages[0].at:
                    shown = (value - pages[0].values[its, labels]) / (page.at - pages[0].at)
                sample = [at, str(shown)]
                metric = {**dict(labels), **self._target(url)}
                yield (
                    {"metric": metric, "value": sample} if instant else {"metric": metric, "values": [sample]}
                )


@contextlib.contextmanager
def fake_prometheus(
    metrics_urls: Sequence[str], alerts: Sequence[tuple[Any, ...]] = ()
) -> Iterator[FakePrometheus]:
    """Serve while the block runs; *alerts*: (name, severity) of those that fired; their labels; how long ago."""
    fake = FakePrometheus(metrics_urls, alerts)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            target = urllib.parse.urlsplit(self.path)
            query = dict(urllib.parse.parse_qsl(target.query))
            fake.requests.append(query.get("query", target.path))
            if fake.died:
                self.send_error(503)
                return
            body = json.dumps({"status": "success", "data": fake.data(target.path, query)}).encode()
            self._answer(body)

        def do_POST(self) -> None:
            fake.requests.append(self.path)
            self._answer(b"")

        def _answer(self, body: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        fake.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield fake
        finally:
            server.shutdown()
            thread.join()
