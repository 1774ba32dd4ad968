"""Timestamps as the service writes them."""

from datetime import UTC, datetime

import pytest

from app.timestamp import from_postgres, timestamp


def test_the_present_is_the_default() -> None:
    """Written as any other moment."""
    before = datetime.now(UTC)
    text = timestamp()
    assert before <= datetime.fromisoformat(text) <= datetime.now(UTC)


def test_the_start_of_a_second_has_all_its_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Zeros lead, and the second before is not kept for the next."""
    for nanoseconds, text in (
        (1_000_000_000 - 1, "1970-01-01T00:00:00.999999Z"),
        (1_000_000_000, "1970-01-01T00:00:01.000000Z"),
        (1_000_007_000, "1970-01-01T00:00:01.000007Z"),
    ):
        monkeypatch.setattr("time.time_ns", lambda now=nanoseconds: now)
        assert timestamp() == text
        assert timestamp(nanoseconds) == text


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("2026-11-22 10:00:00", "2026-11-22T10:00:00.000000Z"),
        ("2026-11-22 10:00:00.1", "2026-11-22T10:00:00.100000Z"),
        ("2026-11-22 10:00:00.000012", "2026-11-22T10:00:00.000012Z"),
        ("2026-11-22 10:00:00.12345", "2026-11-22T10:00:00.123450Z"),
    ],
)
def test_a_time_as_postgresql_writes_it(text: str, written: str) -> None:
    """It drops zeros at the end; the service does not."""
    assert from_postgres(text) == written
