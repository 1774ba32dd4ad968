"""Time as the service writes it, to clients and to its log: `2026-11-22T10:00:00.123456Z`."""

import time
from datetime import UTC, datetime
from functools import lru_cache


def timestamp(moment: datetime | int | None = None) -> str:
    """*moment* (nanoseconds since 1970 are one, too; default: now) as ISO 8601 in UTC, with microseconds."""
    if moment is None:
        moment = time.time_ns()
    if isinstance(moment, int):
        seconds, microseconds = divmod(moment // 1000, 1_000_000)
        return f"{_whole_second(seconds)}{microseconds:06d}Z"
    # isoformat is six times as fast as strftime.
    return moment.astimezone(UTC).isoformat(timespec="microseconds")[:-6] + "Z"


def from_postgres(text: str) -> str:
    """A PostgreSQL `timestamp` in UTC, as its text `2026-11-22 10:00:00.12`, as `timestamp` writes it."""
    return f"{text[:10]}T{text[11:19]}.{text[20:]:0<6}Z"


@lru_cache(maxsize=2)
def _whole_second(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S.", time.gmtime(seconds))
