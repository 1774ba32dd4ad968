"""The plan's steps before a test, and the first question to the target."""

from collections.abc import Mapping
from typing import Any

import httpx

from loadtests.service_side.http_client import UNANSWERED, http_client, why
from loadtests.service_side.prometheus import Prometheus, PrometheusError

_TIMEOUT_SECONDS = 10.0


class PretestError(Exception):
    """The test cannot begin; the message says why."""


def reload_prometheus(url: str) -> None:
    """POST /-/reload, as the plan does. It resets no metric: figures are differences over the run.

    Raises:
        PretestError: it did not (Prometheus needs `--web.enable-lifecycle`).
    """
    try:
        Prometheus(url).reload()
    except PrometheusError as exc:
        raise PretestError(f"{exc} (PROMETHEUS_URL; it needs --web.enable-lifecycle)") from exc


def clear_logs(elasticsearch_url: str) -> None:
    """Delete every document of the indices logs-*, as the plan does.

    The plan's request has no body, which Elasticsearch has refused since version 6: it gets the query that it meant.

    Raises:
        PretestError: it did not.
    """
    url = f"{elasticsearch_url.rstrip('/')}/logs-*/_delete_by_query"
    query: Mapping[str, Any] = {"query": {"match_all": {}}}
    try:
        with http_client(timeout_seconds=_TIMEOUT_SECONDS) as client:
            client.post(url, params={"conflicts": "proceed"}, json=query).raise_for_status()
    except UNANSWERED as exc:
        raise PretestError(f"{url}: {why(exc)} (ELASTICSEARCH_URL)") from exc


def count_products(url: str, api_key: str | None = None) -> int:
    """Ask the target for its first page of products.

    Raises:
        PretestError: it does not answer, or not as the order service does, or sells nothing.
    """
    page = f"{url}/products?limit=100"
    try:
        with http_client(timeout_seconds=_TIMEOUT_SECONDS, api_key=api_key) as client:
            products = client.get(page).raise_for_status().json()["items"]
    except httpx.HTTPStatusError as exc:
        hints: Mapping[int, str] = {
            httpx.codes.UNAUTHORIZED: " (LOADTEST_API_KEY)",
            httpx.codes.NOT_FOUND: " (HOST must say where orders are taken, which may not be where metrics are)",
        }
        status = exc.response.status_code
        raise PretestError(f"{page} answers {status}{hints.get(status, '')}") from exc
    except UNANSWERED as exc:
        raise PretestError(f"{page} does not answer: {why(exc)}") from exc
    except (ValueError, KeyError, TypeError) as exc:
        raise PretestError(f"{page} is not the order service's") from exc
    if not products:
        raise PretestError(f"{page} has no products to order")
    return len(products)
