"""The head of a request: what it must be before anything is made of it."""

import functools
from collections import Counter

from app.errors import Validation

# Two lines of one of these have no one reading: two readers of the same request could take different ones.
_SINGLE = frozenset(
    {
        b"authorization",
        b"content-length",
        b"content-location",
        b"content-range",
        b"content-type",
        b"date",
        b"from",
        b"host",
        b"idempotency-key",
        b"if-modified-since",
        b"if-range",
        b"if-unmodified-since",
        b"max-forwards",
        b"origin",
        b"proxy-authorization",
        b"range",
        b"referer",
        b"user-agent",
    }
)
_HOST_BYTES = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._~%!$&'()*+,;=:[]"


def check_head(method: bytes, version: str, lines: list[tuple[bytes, bytes]]) -> dict[bytes, bytes]:
    """The headers in *lines* by their names, which are in lower case; of a repeated one the last.

    Raises:
        Validation: 400 where the head has no one reading, 501 where its body's coding is not known here.
    """
    headers = dict(lines)
    if version not in ("1.1", "1.0"):
        raise _malformed("the request is not HTTP/1.1")
    if method == b"CONNECT":
        raise _malformed("CONNECT: this is no proxy")
    if len(headers) < len(lines):
        _check_repetitions(lines)
    host = headers.get(b"host")
    if host is None:
        if version == "1.1":
            raise _malformed("Host: must be sent")
    elif not _is_host(host):
        raise _malformed("Host: must be a name or an address, with or without a port")
    if b"transfer-encoding" in headers:
        if version == "1.0":
            raise _malformed("Transfer-Encoding: there is none in HTTP/1.0")
        if headers[b"transfer-encoding"].strip().lower() != b"chunked":
            raise _unknown_coding()
    return headers


@functools.lru_cache(1024)  # clients send the same few
def _is_host(value: bytes) -> bool:
    return not value.translate(None, _HOST_BYTES)


def _check_repetitions(lines: list[tuple[bytes, bytes]]) -> None:
    times = Counter(name for name, _ in lines)
    for name in sorted(_SINGLE & times.keys()):
        if times[name] > 1:
            raise _malformed(f"{name.decode().title()}: must be sent once")
    if times[b"transfer-encoding"] > 1:
        raise _unknown_coding()


def _malformed(detail: str) -> Validation:
    return Validation(detail, status=400)


def _unknown_coding() -> Validation:
    return Validation("Transfer-Encoding: must be chunked", status=501)
