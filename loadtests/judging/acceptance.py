"""The acceptance criteria, as `acceptance.toml` says them."""

import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
)

from loadtests.users.profiles import PROFILES

PATH = Path(__file__).parents[1] / "acceptance.toml"

MEASURED = frozenset(
    {
        "throughput", "latency_p95", "latency_p99", "latency_mean", "error_rate", "critical_errors", "critical_alerts",
        "warning_alerts", "cpu", "memory", "pool", "restarts", "longest_gap", "worst_window_p99",
        "worst_window_errors", "other_errors", "other_p95", "other_p99",
    }
)  # fmt: skip


class AcceptanceError(Exception):
    """The file cannot be used; the message says where."""


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Requirement(_Strict):
    """One criterion, before anything was measured."""

    name: str
    title: str
    comparison: Literal["<", "<=", ">="]
    limit: float | Mapping[str, float]
    unit: str
    definition: str
    source: str
    samples: PositiveInt = 1

    @field_validator("limit")
    @classmethod
    def _knows_profiles(cls, limit: float | Mapping[str, float]) -> float | Mapping[str, float]:
        unknown = [name for name in limit if name not in PROFILES] if isinstance(limit, Mapping) else []
        if unknown:
            raise ValueError(f"no such profile: {', '.join(unknown)} (there are {', '.join(PROFILES)})")
        return limit

    def limit_for(self, profile: str) -> float | None:
        """The limit under *profile*; None: that is not judged by it."""
        return self.limit.get(profile) if isinstance(self.limit, Mapping) else self.limit

    def holds(self, value: float, limit: float) -> bool:
        """True where *value* keeps *limit*."""
        return {"<": value < limit, "<=": value <= limit, ">=": value >= limit}[self.comparison]


class OwnRequirement(Requirement):
    """A criterion of one's own: a figure of one route, or of all requests of a kind."""

    measure: str  # p50, p99.9 and so on, mean, max, error_rate, throughput
    route: str | None = None  # as in the samples; with neither of the two: the orders
    tag: Literal["create", "cancel", "read"] | None = None

    @field_validator("measure")
    @classmethod
    def _is_known(cls, measure: str) -> str:
        if not re.fullmatch(r"mean|max|error_rate|throughput|p\d{1,2}(\.\d+)?", measure):
            raise ValueError(
                f"no such measure: {measure} (p99.9 and the like, mean, max, error_rate, throughput)"
            )
        return measure


class Judging(_Strict):
    """How criteria are judged."""

    confidence: Annotated[float, Field(gt=0.5, lt=1)]
    window_seconds: PositiveFloat


class ValidityLimits(_Strict):
    """The limits past which a run means nothing."""

    generator_cpu_percent: float
    generator_lag_p95_ms: float
    little_tolerance: float
    achieved_share: float


class Acceptance(_Strict):
    """The whole file."""

    criteria: Annotated[Sequence[Requirement], Field(min_length=1)]
    guards: Sequence[Requirement] = ()
    own: Sequence[OwnRequirement] = ()
    judging: Judging
    validity: ValidityLimits

    @property
    def requirements(self) -> Sequence[Requirement]:
        """All criteria, the plan's first."""
        return (*self.criteria, *self.guards, *self.own)


def load(path: Path = PATH) -> Acceptance:
    """Read *path*.

    Raises:
        AcceptanceError: it is not there, not TOML, not of this form, names a criterion twice or one that nothing
            measures.
    """
    try:
        acceptance = Acceptance.model_validate(tomllib.loads(path.read_text()))
    except (OSError, tomllib.TOMLDecodeError) as exc:
        raise AcceptanceError(f"{path}: {exc}") from exc
    except ValidationError as exc:
        first = exc.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise AcceptanceError(f"{path}: {where}: {first['msg']}") from exc
    if unknown := {each.name for each in (*acceptance.criteria, *acceptance.guards)} - MEASURED:
        raise AcceptanceError(f"{path}: nothing measures: {', '.join(sorted(unknown))}")
    names = [requirement.name for requirement in acceptance.requirements]
    if doubled := {name for name in names if names.count(name) > 1}:
        raise AcceptanceError(f"{path}: named twice: {', '.join(sorted(doubled))}")
    return acceptance
