"""Time as the service writes it, to clients and to its log: `2026-11-22T10:00:00.123456Z`."""

import time
from functools import lru_cache

_WITH_MICROSECONDS = 26


def timestamp(moment_ns: int | None = None) -> str:
    """*moment_ns* (nanoseconds since 1970; default: now) as ISO 8601 in UTC, with microseconds."""
    seconds, microseconds = divmod((time.time_ns() if moment_ns is None else moment_ns) // 1000, 1_000_000)
    return f"{_whole_second(seconds)}{microseconds:06d}Z"


def from_postgres(text: str) -> str:
    """A PostgreSQL `timestamp` in UTC, as its text `2026-11-22 10:00:00.12`, as `timestamp` writes it."""
    if len(text) == _WITH_MICROSECONDS:
        return text.replace(" ", "T", 1) + "Z"
    return f"{text[:10]}T{text[11:19]}.{text[20:]:0<6}Z"


@lru_cache(maxsize=2)
def _whole_second(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S.", time.gmtime(seconds))
