"""The load profile of a run."""

import pytest

from loadtests.users.profiles import NORMAL, PEAK, PROFILES, STRESS, Profile, choose


@pytest.mark.parametrize(
    ("users", "profile"),
    [(100, NORMAL), (500, PEAK), (1000, STRESS), (99, NORMAL), (501, NORMAL), (None, NORMAL)],
)
def test_the_number_of_users_chooses(users: int | None, profile: Profile) -> None:
    """The plan's numbers mean the plan's profiles; any other is normal load."""
    assert choose(users)[0] is profile


@pytest.mark.parametrize("name", PROFILES)
def test_an_override_wins(name: str) -> None:
    """LOADTEST_PROFILE decides whatever the number of users, and is the reason given."""
    profile, why = choose(1000, name)
    assert profile.name == name
    assert why == f"LOADTEST_PROFILE={name}"


def test_an_unknown_override_is_refused() -> None:
    """A typing error is an error, and the message names what there is."""
    with pytest.raises(ValueError, match="LOADTEST_PROFILE=peek: it is one of normal, peak, stress, mixed"):
        choose(100, "peek")


def test_the_plan() -> None:
    """Users, rates, times and waits are those of the performance test plan."""
    plan = {
        "normal": (100, 10, 30 * 60, (1, 2), 10),
        "peak": (500, 50, 15 * 60, (0.2, 0.4), 50),
        "stress": (1000, 100, 10 * 60, (0.05, 0.1), 100),
    }
    for name, expected in plan.items():
        found = PROFILES[name]
        assert (
            found.users,
            found.spawn_rate,
            found.run_time_seconds,
            found.wait_seconds,
            found.orders_per_second,
        ) == expected
