"""Figures from readings are the same, however far apart they are and whoever read them."""

import pytest

from loadtests.samples import Window
from loadtests.service_side.metrics_pages import parse
from loadtests.service_side.readings import Page, Pages, Readings

PAGE = """
order_batch_queue_depth {depth}
order_batch_size_sum {orders}
order_batch_size_count {batches}
retries_total{{operation="orders",outcome="success"}} {retries}
orders_total{{status="success",error_type=""}} {orders}
orders_total{{status="error",error_type="timeout"}} 0
process_cpu_seconds_total {cpu}
"""


def page(at: float, *, orders: float = 0, cpu: float = 0, depth: float = 0, retries: float = 0) -> Page:
    text = PAGE.format(depth=depth, orders=orders, batches=orders / 4, retries=retries, cpu=cpu)
    return parse(text, at)


def test_an_empty_label_is_none() -> None:
    """An empty label is none, as to Prometheus, which does not keep it."""
    read = page(0, orders=3)
    assert read.get("orders_total", status="success") == 3
    assert read.get("orders_total", status="success", error_type="") == 3
    assert read.total("orders_total", status="success", error_type="") == 3


def test_figures_are_differences_over_the_window() -> None:
    """From the last reading before it to the last one in it; a counter that began in it began at 0."""
    readings = [
        page(at, orders=100 * at, cpu=0.5 * at, retries=max(0, at - 10)) for at in (0, 5, 10, 15, 20, 25)
    ]
    server = Readings([Pages("a", readings)]).server(
        Window(7, 21), source="prometheus", memory_limit_bytes=2.0**31
    )
    assert server.orders_total == {"success": 1500, "error/timeout": 0}
    assert server.batch_size_mean == 4
    assert server.retries == 10
    assert server.cpu_us_per_order == pytest.approx(5000)
    assert server.replicas[0].cpu_percent_mean == pytest.approx(50)


def test_a_value_stands_until_the_next_reading() -> None:
    """Replicas that are read at different times still add up; one that falls silent does not stand for ever."""
    one = Pages("one", [page(at, depth=1) for at in (0, 5, 10)])
    two = Pages("two", [page(at, depth=2) for at in (2, 7)])
    columns = Readings([one, two]).per_second(0, range(14), hold_seconds=5)
    assert columns["queue_depth"] == [1, 1, *[3] * 10, 1, 1]
    assert Readings([one]).per_second(0, range(6))["queue_depth"] == [1, None, None, None, None, 1]


def test_rise_needs_two_readings() -> None:
    assert Readings([]).success_rise() is None
    assert Readings([Pages("a", [page(0)])]).success_rise() is None
    assert Readings([Pages("a", [page(0, orders=2), page(1, orders=9)])]).success_rise() == 7
