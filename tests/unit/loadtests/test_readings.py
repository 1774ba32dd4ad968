"""Figures from readings are the same, however far apart they are and whoever read them."""

import pytest

from loadtests.run_record import ServiceFigures
from loadtests.samples import Window
from loadtests.service_side.metrics_pages import parse
from loadtests.service_side.readings import Limits, Page, Pages, Readings

PAGE = """
order_batch_queue_depth {depth}
order_batch_size_sum {orders}
order_batch_size_count {batches}
retries_total{{operation="orders",outcome="success"}} {retries}
orders_total{{status="success",error_type=""}} {orders}
orders_total{{status="error",error_type="timeout"}} 0
process_cpu_seconds_total {cpu}
process_start_time_seconds {start}
"""


def page(at: float, *, orders: float = 0, **others: float) -> Page:
    values = {"depth": 0.0, "retries": 0.0, "cpu": 0.0, "start": 1000.0, **others}
    return parse(PAGE.format(orders=orders, batches=orders / 4, **values), at)


def figures(*replicas: Pages) -> ServiceFigures:
    return Readings(replicas).server(Window(7, 21), source="prometheus", limits=Limits(2.0**31))


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
    server = figures(Pages("a", readings))
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


def test_a_restart_is_another_process_for_good() -> None:
    """Another start, later than the first, that stays; its counters go on from 0, and their rise is not known."""
    before = [page(at, orders=10 * at, cpu=at, start=5) for at in (0, 5, 10)]
    after = [page(at, orders=10 * (at - 12), cpu=at - 12, start=12) for at in (15, 20)]
    replica = Pages("a", [*before, *after])
    assert replica.restarted
    assert not replica.takes_turns
    assert not Pages("a", before).restarted
    (found,) = figures(replica).replicas
    assert found.restarted
    assert found.cpu_percent_mean == pytest.approx((10 - 5 + 8) / 15 * 100)
    assert Readings([replica]).success_rise() is None


def test_processes_that_take_turns_behind_an_address_are_no_restart() -> None:
    """Each keeps its own counters, and none of them fell."""
    one = [page(at, orders=10 * at, cpu=0.1 * at, start=-5) for at in (0, 10, 20)]
    two = [page(at, orders=90 * at, cpu=0.5 * at, start=-6) for at in (5, 15)]
    replica = Pages("a", sorted([*one, *two], key=lambda each: each.at))
    assert replica.takes_turns
    assert not replica.restarted
    found = figures(replica).replicas
    assert [each.url for each in found] == ["a (1)", "a (2)"]
    assert [each.cpu_percent_mean for each in found] == [pytest.approx(10), pytest.approx(50)]
    assert Readings([replica]).success_rise() is None
    one[-1] = page(20, start=17)
    assert Pages("a", sorted([*one, *two], key=lambda each: each.at)).restarted  # one of them, meanwhile


def test_a_replica_that_is_gone_keeps_its_part() -> None:
    lost = Pages("lost", [page(at, orders=10 * at, cpu=0.9 * at) for at in (0, 5, 10)], gone=True)
    alive = Pages("alive", [page(at, orders=10 * at, cpu=0.1 * at) for at in (0, 5, 10, 15, 20)])
    server = figures(lost, alive)
    assert [(each.url, each.gone) for each in server.replicas] == [("lost", True), ("alive", False)]
    assert server.replicas[0].cpu_percent == pytest.approx(90)
    assert server.orders_total["success"] == 50 + 150
    assert Readings([lost, alive]).success_rise() is None
