"""A run under way as a page that grows, with the report's charts, and the client's figures for a Prometheus.

A plain `http.server` on loopback: `/` is the page, `/metrics` the figures. Nothing is drawn unless somebody asks.
"""

import contextlib
import http.server
import threading
from collections.abc import Callable, Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from loadtests.judging.acceptance import Acceptance
from loadtests.reports.time_charts import Timeline, charts_of
from loadtests.running.load import Load

_FOLDER = Path(__file__).parent
_REFRESH_SECONDS = 3


def render(load: Load, limits: Acceptance) -> str:
    """The page as it is now."""
    timeline = Timeline(*load.timeline(), limits=_limits(limits, load.plan.profile.name))
    templates = Environment(
        loader=FileSystemLoader(_FOLDER), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return templates.get_template("live.html.jinja").render(
        plan=load.plan,
        line=load.moment.line if load.moment else "starting",
        charts=charts_of(timeline),
        refresh_seconds=_REFRESH_SECONDS,
        css=Markup((_FOLDER / "page.css").read_text()),  # noqa: S704 - our own file
    )


def _limits(limits: Acceptance, profile: str) -> dict[str, float]:
    found = {each.name: each.limit_for(profile) for each in limits.requirements}
    return {name: limit for name, limit in found.items() if limit is not None}


@contextlib.contextmanager
def served(load: Load, limits: Acceptance, port: int) -> Iterator[str]:
    """The URL of the page of *load*, while the block runs; raises OSError where the port is taken.

    Args:
        port: 0: any that is free.
    """
    pages: dict[str, tuple[str, Callable[[], bytes]]] = {
        "/": ("text/html; charset=utf-8", lambda: render(load, limits).encode()),
        "/metrics": ("text/plain; version=0.0.4; charset=utf-8", load.client_page),
    }

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = pages.get(self.path.partition("?")[0])
            if found is None:
                self.send_error(HTTPStatus.NOT_FOUND)
                return
            body = found[1]()
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", found[0])
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, name="live page", daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()
