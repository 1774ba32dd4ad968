"""The acceptance criteria, as `acceptance.toml` says them."""

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

PATH = Path(__file__).parents[1] / "acceptance.toml"


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

    def limit_for(self, profile: str) -> float | None:
        """The limit under *profile*; None: that is not judged by it."""
        return self.limit.get(profile) if isinstance(self.limit, Mapping) else self.limit

    def holds(self, value: float, limit: float) -> bool:
        """True where *value* keeps *limit*."""
        return {"<": value < limit, "<=": value <= limit, ">=": value >= limit}[self.comparison]


class ValidityLimits(_Strict):
    """The limits past which a run means nothing."""

    client_error_percent: float
    generator_cpu_percent: float
    generator_lag_p95_ms: float
    little_tolerance: float
    achieved_share: float


class Acceptance(_Strict):
    """The whole file."""

    criteria: Annotated[Sequence[Requirement], Field(min_length=1)]
    validity: ValidityLimits


def load(path: Path = PATH) -> Acceptance:
    """Read *path*.

    Raises:
        AcceptanceError: it is not there, not TOML, not of this form, or names a criterion twice.
    """
    try:
        acceptance = Acceptance.model_validate(tomllib.loads(path.read_text()))
    except (OSError, tomllib.TOMLDecodeError) as exc:
        raise AcceptanceError(f"{path}: {exc}") from exc
    except ValidationError as exc:
        first = exc.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise AcceptanceError(f"{path}: {where}: {first['msg']}") from exc
    names = [requirement.name for requirement in acceptance.criteria]
    if doubled := {name for name in names if names.count(name) > 1}:
        raise AcceptanceError(f"{path}: named twice: {', '.join(sorted(doubled))}")
    return acceptance
