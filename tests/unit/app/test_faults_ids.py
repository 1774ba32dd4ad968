"""The ids of new orders rise."""

import uuid
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from app.domain import OrderIds
from app.timestamp import timestamp

_MILLISECOND = 1_000_000


@given(st.lists(st.integers(0, 5 * _MILLISECOND), min_size=2, max_size=50))
def test_ids_rise_whatever_the_clock_does(readings: list[int]) -> None:
    """Strictly, as text and as UUIDs, also when the clock stands still or is set back; and so does their time."""
    clock = iter(readings)
    ids = OrderIds(lambda: next(clock))
    made = [ids.next() for _ in readings]
    assert all(before[0] < after[0] and before[1] <= after[1] for before, after in pairwise(made))
    assert all(uuid.UUID(before[0]) < uuid.UUID(after[0]) for before, after in pairwise(made))
    assert [now_ns for _, now_ns in made] == [max(readings[: n + 1]) for n in range(len(readings))]


def test_an_id_of_a_later_millisecond_begins_anew() -> None:
    """It carries its own millisecond, however many ids there were before it."""
    now_ns = 7 * _MILLISECOND
    ids = OrderIds(lambda: now_ns)
    for _ in range(1000):
        last = ids.next()[0]
    assert uuid.UUID(last).int >> 80 == 7
    now_ns = 8 * _MILLISECOND
    assert uuid.UUID(ids.next()[0]).int >> 80 == 8


def test_more_ids_than_fit_into_a_millisecond_go_on_in_the_next() -> None:
    """A clock that is set back for hours does not end the rise."""
    ids = OrderIds(lambda: 7 * _MILLISECOND)
    before = ids.next()[0]
    ids._tail = 2**48 - 1
    made = [before, *(ids.next()[0] for _ in range(100))]
    assert made == sorted(set(made))
    assert [uuid.UUID(text).int >> 80 for text in made] == [7] + [8] * 100
    assert {uuid.UUID(text).version for text in made} == {7}


def test_two_makers_of_one_millisecond_do_not_meet() -> None:
    """Replicas share no state, and yet no id."""
    makers = [OrderIds(lambda: 0) for _ in range(100)]
    made = [maker.next()[0] for maker in makers for _ in range(100)]
    assert len(set(made)) == len(made)


def test_the_time_of_an_id_is_written_as_any_other() -> None:
    """Nanoseconds are cut to microseconds."""
    assert timestamp(1_795_616_242_154_567_999) == "2026-11-25T14:17:22.154567Z"
