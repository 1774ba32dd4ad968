from typing import Any

import pytest

from loadtests.bench import flame_graphs, growth, measurement, order_cost
from loadtests.bench.reporting import Goal, ratio_text


def _cost(
    service_us: float, postgres_us: float = 0.0, *, p50_ms: float = 1.0, answers: int = 10
) -> measurement.Cost:
    return measurement.Cost(
        answers=answers,
        per_second=100.0,
        p50_ms=p50_ms,
        p99_ms=2.0,
        service_us=service_us,
        postgres_us=postgres_us,
        total_us=service_us + postgres_us,
        generator_us=10.0,
        generator_share=0.1,
        service_rss_mib=50.0,
        refused=1,
        broken=0,
    )


def _rounds(connections: int = 64) -> list[order_cost.Round]:
    costs = {
        "service": [_cost(100, 100, p50_ms=2), _cost(150, 150, p50_ms=3), _cost(200, 200, p50_ms=4)],
        "per_request": [_cost(800, 800, p50_ms=4), _cost(1500, 1500, p50_ms=3), _cost(1800, 1800, p50_ms=16)],
        "echo": [_cost(50), _cost(50), _cost(100)],
    }
    return [
        order_cost.Round(name, connections, its[number], missing=number)
        for number in range(3)
        for name, its in costs.items()
    ]


def _row(summary: list[dict[str, Any]], contestant: str, connections: int = 64) -> dict[str, Any]:
    (row,) = [r for r in summary if (r["contestant"], r["connections"]) == (contestant, connections)]
    return row


def test_figures_are_medians_and_counts_are_sums() -> None:
    """A row holds the median of every figure, and the sum of what was answered, refused and missing."""
    row = _row(order_cost.summarise(_rounds()), "per_request")
    assert (row["service_us"], row["postgres_us"], row["total_us"]) == (1500, 1500, 3000)
    assert (row["answers"], row["refused"], row["missing"]) == (30, 3, 3)


def test_ratios_compare_rounds_of_the_same_number() -> None:
    """A ratio is taken round by round, so that a machine that slows down in between does not bend it."""
    summary = order_cost.summarise(_rounds())
    assert _row(summary, "per_request")["cost_ratio"] == [8, 9, 10]
    assert _row(summary, "per_request")["latency_ratio"] == [1, 2, 4]
    assert _row(summary, "service")["own_ratio"] == [2, 2, 3]
    assert _row(summary, "service")["cost_ratio"] == [1, 1, 1]


def test_loads_are_summed_up_apart() -> None:
    """Rounds under another number of connections have a row of their own."""
    summary = order_cost.summarise([*_rounds(64), *_rounds(500)])
    assert _row(summary, "echo", 64) | {"connections": 500} == _row(summary, "echo", 500)
    assert len(summary) == 6


def test_without_the_service_or_the_echo_there_is_no_ratio_to_them() -> None:
    """A run of some contestants alone gives their figures, and no ratios to those that are not there."""
    row = _row(order_cost.summarise([r for r in _rounds() if r.contestant == "per_request"]), "per_request")
    assert "cost_ratio" not in row
    assert "own_ratio" not in row
    assert order_cost.reached([row]) == []


def test_a_round_without_a_tick_of_cpu_gives_no_ratio() -> None:
    """Where a round is too short for the kernel's clock the ratio is left out."""
    rounds = [order_cost.Round("service", 1, _cost(0), 0), order_cost.Round("echo", 1, _cost(50), 0)]
    assert _row(order_cost.summarise(rounds), "echo", 1)["cost_ratio"] is None


def test_targets_are_told_for_what_was_measured() -> None:
    """Each target compares the median with its limit, in its direction."""
    targets = order_cost.reached(order_cost.summarise(_rounds()))
    assert [(t.ratio[1], t.limit, t.reached) for t in targets] == [(9, 8, True), (2, 3, True)]
    (slow,) = order_cost.reached(order_cost.summarise(_rounds(500)))
    assert (slow.limit, slow.reached) == (10, False)
    assert slow.line.startswith("NOT reached: ")
    (lone,) = order_cost.reached(order_cost.summarise(_rounds(1)))
    assert (lone.ratio[1], lone.reached) == (2, True)


@pytest.mark.parametrize(
    ("median", "at_least", "reached"),
    [(3.0, True, True), (2.9, True, False), (3.0, False, True), (3.1, False, False)],
)
def test_a_target_is_reached_at_its_limit(median: float, at_least: bool, reached: bool) -> None:  # noqa: FBT001
    assert Goal("x", [0, median, 9], 3.0, at_least=at_least).reached is reached


def test_ratios_are_short_enough_for_their_column() -> None:
    """A ratio and its spread have as many digits as tell something, in at most sixteen characters."""
    assert ratio_text([0.051, 0.0571, 0.07]) == "0.06 (0.05-0.07)"
    assert ratio_text([6.31, 6.516, 6.6]) == "6.52 (6.3-6.6)"
    assert ratio_text([20.3, 24.44, 28.6]) == "24.4 (20-29)"
    assert ratio_text(None) == ""


def test_growth_is_the_cost_over_that_at_the_smallest_size() -> None:
    """Each workload is compared with itself at the fewest stored orders, round by round."""
    rounds = [
        growth.Round("GET", size, _cost(cost))
        for size, costs in {10: (100, 200), 1000: (110, 240)}.items()
        for cost in costs
    ]
    summary = growth.summarise(rounds)
    assert [row["key"] for row in summary] == [10, 1000]
    assert summary[1]["cost_ratio"] == pytest.approx([1.1, 1.15, 1.2])
    (target,) = growth.reached(summary)
    assert target.reached
    assert growth.reached(summary[:1]) == []


_SVG = """<svg xmlns="http://www.w3.org/2000/svg" xmlns:fg="http://github.com/jonhoo/inferno">{}</svg>"""


def _flame_graph(*frames: tuple[str, int, int, int]) -> str:
    return _SVG.format(
        "".join(
            f'<g><title>{name} ({samples:,} samples, 1.00%)</title><rect x="0%" y="{36 + 16 * depth}" fg:x="{start}" '
            f'fg:w="{samples}"/></g>'
            for name, depth, start, samples in frames
        )
    )


def test_functions_are_counted_from_the_flame_graph() -> None:
    """A function's own samples are its box without those below it; a recursive call counts once in the whole."""
    picture = _flame_graph(
        ("inner (app/b.py:7)", 3, 10, 30),
        ("all", 0, 0, 1000),
        ("outer (app/a.py:1)", 1, 0, 900),
        ("inner (app/b.py:7)", 2, 0, 100),
        ("other (app/c.py:1)", 2, 100, 300),
        ("other (app/c.py:1)", 1, 900, 100),
    )
    assert flame_graphs.functions(picture) == {
        "samples": 1000,
        "functions": {
            "outer (app/a.py:1)": [500, 900],
            "inner (app/b.py:7)": [100, 100],
            "other (app/c.py:1)": [400, 400],
        },
    }


def _profile(service_us: float, **functions: list[int]) -> dict[str, Any]:
    named = {f"{name} (app/x.py:{number})": counts for number, (name, counts) in enumerate(functions.items())}
    return {"cost": {"service_us": service_us}, "samples": 100, "functions": named}


def test_profiles_are_compared_by_what_an_order_costs() -> None:
    """Differences are µs per order, found again wherever the lines have moved, the largest first."""
    before = _profile(200, gone=[5, 5], same=[50, 60], worse=[10, 10])
    now = _profile(400, worse=[20, 30], same=[25, 25])
    assert flame_graphs.by_cost(now, before) == [
        ["worse (app/x.py)", 80, 120, 20],
        ["gone (app/x.py)", 0, 0, 10],
        ["same (app/x.py)", 100, 100, 100],
    ]


def test_a_lone_profile_shows_its_dearest_function_first() -> None:
    assert flame_graphs.by_cost(_profile(200, small=[10, 100], large=[90, 90]), None) == [
        ["large (app/x.py)", 180, 180, None],
        ["small (app/x.py)", 20, 200, None],
    ]
