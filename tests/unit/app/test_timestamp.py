"""Timestamps as the service writes them."""

from datetime import UTC, datetime, timedelta, timezone

import pytest

from app.timestamp import timestamp


@pytest.mark.parametrize(
    ("moment", "text"),
    [
        (datetime(2026, 11, 22, 10, 0, 0, 123456, UTC), "2026-11-22T10:00:00.123456Z"),
        (datetime(2026, 11, 22, 10, tzinfo=UTC), "2026-11-22T10:00:00.000000Z"),
        (datetime(2026, 11, 22, 1, tzinfo=timezone(timedelta(hours=2))), "2026-11-21T23:00:00.000000Z"),
    ],
)
def test_time_is_written_in_utc_with_microseconds(moment: datetime, text: str) -> None:
    """Always with the same number of digits: text sorts as time does."""
    assert timestamp(moment) == text


def test_the_present_is_the_default() -> None:
    """Written as any other moment."""
    before = datetime.now(UTC)
    text = timestamp()
    assert before <= datetime.fromisoformat(text) <= datetime.now(UTC)
    assert timestamp(datetime.fromisoformat(text)) == text


def test_the_start_of_a_second_has_all_its_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Zeros lead, and the second before is not kept for the next."""
    for nanoseconds, text in (
        (1_000_000_000 - 1, "1970-01-01T00:00:00.999999Z"),
        (1_000_000_000, "1970-01-01T00:00:01.000000Z"),
        (1_000_007_000, "1970-01-01T00:00:01.000007Z"),
    ):
        monkeypatch.setattr("time.time_ns", lambda now=nanoseconds: now)
        assert timestamp() == text
