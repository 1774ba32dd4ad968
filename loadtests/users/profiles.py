"""The performance test plan's load profiles, and which of them a run is."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Profile:
    """A load: *users* who each wait between two orders for a uniformly random time within *wait_seconds*."""

    name: str
    user_class: str  # in locustfile.py
    users: int
    spawn_rate: float  # users started per second
    run_time_seconds: int  # from the start, the ramp included
    wait_seconds: tuple[float, float]
    orders_per_second: float | None  # the plan's rate: the least that has to be reached


NORMAL = Profile("normal", "NormalLoadTest", 100, 10, 30 * 60, (1, 2), 10)
PEAK = Profile("peak", "PeakLoadTest", 500, 50, 15 * 60, (0.2, 0.4), 50)
STRESS = Profile("stress", "StressTest", 1000, 100, 10 * 60, (0.05, 0.1), 100)
MIXED = Profile("mixed", "MixedLoadTest", 100, 10, 30 * 60, (1, 2), None)

PROFILES: Mapping[str, Profile] = {profile.name: profile for profile in (NORMAL, PEAK, STRESS, MIXED)}
_BY_USERS = {profile.users: profile for profile in (NORMAL, PEAK, STRESS)}


def choose(users: int | None, override: str | None = None) -> tuple[Profile, str]:
    """The profile of a run for which no user class was named, and why it is that one.

    Args:
        users: how many users the run has; None: not given.
        override: a profile's name (LOADTEST_PROFILE), whatever the number of users; empty counts as none.

    Raises:
        ValueError: *override* is not a profile's name.
    """
    if override:
        if override not in PROFILES:
            raise ValueError(f"LOADTEST_PROFILE={override}: it is one of {', '.join(PROFILES)}")
        return PROFILES[override], f"LOADTEST_PROFILE={override}"
    planned = ", ".join(f"{profile.users} {profile.name}" for profile in _BY_USERS.values())
    if users is None:
        return NORMAL, f"no number of users was given ({planned})"
    if users in _BY_USERS:
        return _BY_USERS[users], f"{users} users are the plan's {_BY_USERS[users].name} load"
    return NORMAL, f"{users} users are none of the plan's loads ({planned})"
