"""Questions over HTTP, now and then, to what is tested and to what watches it (orders go another way: `users`)."""

import httpx

# HTTP_PROXY and its like are for what is elsewhere.
_LOOPBACK = {f"all://{host}": None for host in ("localhost", "127.0.0.1", "[::1]")}

UNANSWERED = (httpx.HTTPError, httpx.InvalidURL)  # no answer, none of 2xx, or no URL


def http_client(*, timeout_seconds: float, api_key: str | None = None) -> httpx.Client:
    """A client with a connection for each question: none finds one that was closed meanwhile, replicas take turns.

    Keep it: one takes 20 ms of CPU to make. Answers come uncompressed, which would cost the service that is measured.
    """
    headers = {"Accept-Encoding": "identity"}
    if api_key:
        headers["Authorization"] = f"Bearer {api_key}"
    return httpx.Client(
        timeout=timeout_seconds,
        headers=headers,
        limits=httpx.Limits(max_keepalive_connections=0),
        follow_redirects=True,
        mounts=_LOOPBACK,
    )


def why(exc: Exception) -> str:
    """The reason in a line; httpx adds others, where to read about the status."""
    return str(exc).partition("\n")[0]
