"""What the plan does before a test, and the first question to the target."""

import json
import urllib.error
import urllib.parse
import urllib.request

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
    url = f"{elasticsearch_url.rstrip('/')}/logs-*/_delete_by_query?conflicts=proceed"
    request = urllib.request.Request(  # noqa: S310 - the operator's own URL
        url,
        data=json.dumps({"query": {"match_all": {}}}).encode(),
        headers={"Content-Type": "application/json"},
        method="POST",
    )
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS):  # noqa: S310 - as above
            pass
    except (OSError, ValueError) as exc:
        raise PretestError(f"{url}: {exc} (ELASTICSEARCH_URL)") from exc


def count_products(url: str, api_key: str | None = None) -> int:
    """Ask the target for its first page of products.

    Raises:
        PretestError: it does not answer, or not as the order service does, or sells nothing.
    """
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    page = f"{url}/products?limit=100"
    try:
        request = urllib.request.Request(page, headers=headers)  # noqa: S310 - the operator's own URL
        with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as answer:  # noqa: S310 - as above
            products = json.load(answer)["items"]
    except urllib.error.HTTPError as exc:
        hint = " (LOADTEST_API_KEY)" if exc.code == 401 else ""  # noqa: PLR2004
        raise PretestError(f"{page} answers {exc.code}{hint}") from exc
    except (OSError, ValueError) as exc:
        raise PretestError(f"{page} does not answer: {exc}") from exc
    except (KeyError, TypeError) as exc:
        raise PretestError(f"{page} is not the order service's") from exc
    if not products:
        raise PretestError(f"{page} has no products to order")
    return len(products)
