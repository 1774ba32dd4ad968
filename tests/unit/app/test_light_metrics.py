"""Metrics that count without a lock show what prometheus_client's own do."""

import prometheus_client
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest

from app.light_metrics import Counter, Histogram

_BOUNDS = (0.001, 0.5, 1.0)


@given(st.lists(st.tuples(st.sampled_from("ab"), st.floats(0, 3) | st.sampled_from(_BOUNDS))))
def test_a_histogram_shows_the_same(observations: list[tuple[str, float]]) -> None:
    """A page is the same whatever is observed, on the bounds too, and where nothing is."""
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    light = Histogram("h", "Help.", ["kind"], buckets=_BOUNDS, registry=ours)
    stock = prometheus_client.Histogram("h", "Help.", ["kind"], buckets=_BOUNDS, registry=theirs)
    for histogram in (light, stock):
        histogram.labels("a")
        for kind, value in observations:
            histogram.labels(kind).observe(value)
    assert generate_latest(ours) == generate_latest(theirs)


@given(st.lists(st.floats(0, 1e6)))
def test_a_counter_shows_the_same(amounts: list[float]) -> None:
    """A page is the same whatever is added."""
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    for counter in (
        Counter("c", "Help.", registry=ours),
        prometheus_client.Counter("c", "Help.", registry=theirs),
    ):
        counter.inc()
        for amount in amounts:
            counter.inc(amount)
    assert generate_latest(ours) == generate_latest(theirs)


def test_a_counter_does_not_fall() -> None:
    """A negative amount is refused."""
    counter = Counter("c", "Help.", registry=None)
    with pytest.raises(ValueError, match="rises"):
        counter.inc(-1)
