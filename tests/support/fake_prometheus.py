"""The part of Prometheus's HTTP API that a load test asks, over the samples of real `/metrics` pages.

https://prometheus.io/docs/prometheus/latest/querying/api/. It evaluates nothing: a query that names one of the
service's metrics gets that metric's samples as they are now, whatever is around the name; a plain range gets the
samples of every page that was read so far. Alerts are made up.
"""

import contextlib
import http.server
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator, Sequence
from typing import Any

from loadtests.service_side.http_client import http_client
from loadtests.service_side.metrics_pages import read_page
from loadtests.service_side.readings import Page


class FakePrometheus:
    """The queries it was asked, and the answers to them."""

    def __init__(self, metrics_urls: Sequence[str], alerts: Sequence[tuple[str, str]]) -> None:
        self.url = ""
        self.requests: list[str] = []
        self._client = http_client(timeout_seconds=10)
        self._metrics_urls = metrics_urls
        self._alerts = alerts
        self._pages: dict[str, list[Page]] = {url: [] for url in metrics_urls}

    def data(self, path: str, query: dict[str, str]) -> Any:
        """The `data` of an answer."""
        if path == "/api/v1/alerts":
            return {
                "alerts": [
                    {"labels": {"alertname": name, "severity": severity}, "state": "firing"}
                    for name, severity in self._alerts
                ]
            }
        if path == "/api/v1/targets":
            return {
                "activeTargets": [
                    {"labels": self._target(url), "scrapeUrl": url, "health": "up"}
                    for url in self._metrics_urls
                ]
            }
        for url in self._metrics_urls:
            self._pages[url].append(read_page(self._client, url))
        if names := re.fullmatch(r'\{__name__=~"(.*)"\}\[\d+s\]', query["query"]):
            return {"result": list(self._samples(re.compile(names[1])))}
        return {"result": list(self._series(query["query"], instant=path.endswith("/query")))}

    def _samples(self, names: re.Pattern[str]) -> Iterator[dict[str, Any]]:
        for url, pages in self._pages.items():
            for name, labels in pages[-1].values:
                if names.fullmatch(name):
                    metric = {"__name__": name, **dict(labels), **self._target(url)}
                    values = [
                        [page.at, str(page.values[name, labels])]
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
                sample = [page.at, str(page.at if promql.startswith("timestamp") else value)]
                metric = {**dict(labels), **self._target(url)}
                yield (
                    {"metric": metric, "value": sample} if instant else {"metric": metric, "values": [sample]}
                )


@contextlib.contextmanager
def fake_prometheus(
    metrics_urls: Sequence[str], alerts: Sequence[tuple[str, str]] = ()
) -> Iterator[FakePrometheus]:
    """Serve while the block runs; *alerts*: (name, severity) of those that fire."""
    fake = FakePrometheus(metrics_urls, alerts)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            target = urllib.parse.urlsplit(self.path)
            query = dict(urllib.parse.parse_qsl(target.query))
            fake.requests.append(query.get("query", target.path))
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
