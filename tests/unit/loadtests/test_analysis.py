import pytest

from loadtests.judging.analysis import RunData, analyze_results
from loadtests.samples import Outcome, Window
from tests.support.run_records import START, columns_of, outage, record_of, samples


def test_figures_have_the_plans_names_and_units() -> None:
    """Milliseconds in and out, the error rate is a fraction, the throughput is orders per second."""
    data: RunData = {
        "response_times": [100.0, 300.0],
        "errors": [False, False, True, False],
        "requests": {"acknowledged": 120, "seconds": 60.0},
    }
    assert analyze_results(data) == {"avg_response_time": 200.0, "error_rate": 0.25, "throughput": 2.0}


def test_nothing_is_not_zero() -> None:
    """Of no orders there is no average and no error rate: a run that did nothing was not free of errors."""
    data: RunData = {"response_times": [], "errors": [], "requests": {"acknowledged": 0, "seconds": 0.0}}
    assert analyze_results(data) == {"avg_response_time": None, "error_rate": None, "throughput": None}


def test_all_failed_is_an_error_rate_of_one() -> None:
    data: RunData = {"response_times": [], "errors": [True], "requests": {"acknowledged": 0, "seconds": 2.0}}
    assert analyze_results(data) == {"avg_response_time": None, "error_rate": 1.0, "throughput": 0.0}


def test_raw_samples_give_what_the_record_says() -> None:
    """The warm-up and what began after the end stay out; refused orders have no response time."""
    made = samples(trouble=outage)
    record = record_of(made)
    metrics = analyze_results(columns_of(made).test_data(Window(START, START + 30)))
    assert metrics == record.analysis
    assert metrics["avg_response_time"] == pytest.approx(record.acknowledged.mean_ms, rel=1e-4)
    assert metrics["error_rate"] == record.counts.failed / record.counts.sent > 0
    assert metrics["throughput"] == record.orders_per_second


def test_what_is_a_failure_of_the_service() -> None:
    """Whatever is not acknowledged; but for what is sold out, and what the end of the run cut off."""
    plain = samples(seconds=1, rate=8)
    inside = next(i for i, sample in enumerate(plain) if sample.started_at >= START)
    outcomes: list[tuple[Outcome, int, str]] = [
        ("refused", 409, "out_of_stock"),
        ("unknown", 0, "cut_off"),
        ("unknown", 0, "reset"),
        ("refused", 503, ""),
        ("unknown", 200, "http_200"),
        ("unknown", 302, "http_302"),
        ("refused", 422, "unknown_product"),
        ("unknown", 201, "wrong_answer"),
    ]
    for i, (outcome, status, error_type) in enumerate(outcomes, inside):
        plain[i] = plain[i]._replace(outcome=outcome, status=status, error_type=error_type)
    orders = columns_of(plain)
    window = Window(START, START + 1)
    assert orders.test_data(window)["errors"] == [False, False, *[True] * 6]
    counts = orders.counts(window)
    assert (counts.failed, counts.cut_off, counts.agreed, counts.undeclared_errors) == (6, 1, 1, 0)
    orders.refusals_agreed = False  # the database says that nothing was sold out
    assert orders.counts(window).failed == 7
    assert orders.test_data(window)["errors"] == [True, False, *[True] * 6]
