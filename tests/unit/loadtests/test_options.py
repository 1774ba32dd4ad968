"""The options of `python -m loadtests`: flags, their variables, and the plan they make."""

import pytest

from loadtests.options import parse
from loadtests.users.profiles import STRESS


def test_the_profile_alone_is_the_plans_load() -> None:
    _, plan = parse(["stress"], {})
    assert (plan.users, plan.spawn_rate, plan.duration_seconds) == (
        STRESS.users,
        STRESS.spawn_rate,
        STRESS.run_time_seconds,
    )
    assert (plan.host, plan.metrics_urls, plan.dsn, plan.strict) == (None, [], None, False)


def test_a_variable_counts_as_its_flag_and_the_flag_wins() -> None:
    """An empty variable is none, as make hands one on."""
    given = {
        "DURATION": "2m",
        "USERS": "7",
        "HOST": "example:8000",
        "STRICT": "1",
        "RATE": "",
        "WARM_UP": " ",
    }
    options, plan = parse(["normal", "--users", "9"], given)
    assert (plan.duration_seconds, plan.users, plan.settle_seconds) == (120.0, 9, 5.0)
    assert (plan.host, plan.strict, plan.rate_per_second) == ("http://example:8000", True, None)
    assert options.runs == 1


def test_the_command_in_the_report_tells_all_but_the_dsn() -> None:
    """A variable that a flag overrides is left out: what is shown makes the same run."""
    given = {
        "DURATION": "2m",
        "USERS": "7",
        "METRICS_URLS": "a, b",
        "DSN": "password=secret",
        "UNRELATED": "1",
    }
    _, plan = parse(["normal", "--users", "9"], given)
    assert plan.command == "DURATION=2m METRICS_URLS='a, b' python -m loadtests normal --users 9"
    assert plan.metrics_urls == ["http://a", "http://b"]
    assert plan.dsn == "password=secret"
    for arguments in (["--dsn", "password=secret"], ["--dsn=password=secret"]):
        _, plan = parse(["normal", *arguments], {})
        assert (plan.dsn, "secret" in plan.command) == ("password=secret", False)


def test_the_open_model_has_a_worker_for_each_order_of_a_second() -> None:
    assert parse(["normal", "--rate", "400"], {})[1].users == 400
    assert parse(["normal", "--rate", "0.5"], {})[1].users == 10
    assert parse(["normal", "--rate", "400", "--users", "3"], {})[1].users == 3


@pytest.mark.parametrize(
    ("arguments", "given", "said"),
    [
        pytest.param([], {"DURATION": "soon"}, "--duration: 'soon' is not a time", id="duration"),
        pytest.param(["--runs", "0"], {}, "--runs: '0' is not a number of at least 1", id="runs"),
        pytest.param([], {"STRICT": "perhaps"}, "STRICT: 'perhaps'", id="strict"),
        pytest.param(["--ds", "password=secret"], {}, "--ds", id="no-abbreviations"),
    ],
)
def test_what_makes_no_plan(
    arguments: list[str], given: dict[str, str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2 and a line that names the option."""
    with pytest.raises(SystemExit, match="2"):
        parse(["normal", *arguments], given)
    assert said in capsys.readouterr().err
