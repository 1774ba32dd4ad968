"""A criterion as the reports' tables show it."""

from dataclasses import dataclass

from loadtests.quantities import change, quantity
from loadtests.run_record import Criterion


@dataclass(frozen=True)
class CriterionRow:
    """The cells of one row."""

    of: Criterion

    @property
    def value(self) -> str:
        """The value that was measured."""
        return quantity(self.of.value, self.of.unit)

    @property
    def limit(self) -> str:
        """The limit, with its comparison."""
        return f"{self.of.comparison} {quantity(self.of.limit, self.of.unit)}"

    @property
    def margin(self) -> str:
        """The distance to the limit, as a share of the limit; negative: beyond it."""
        if self.of.value is None or not self.of.limit:
            return "-"
        share = self.of.value / self.of.limit - 1
        return change(1 + (share if self.of.comparison == ">=" else -share))

    @property
    def used(self) -> float | None:
        """The part of the limit that is used up, in percent, at most 100; None: no such thing."""
        if self.of.value is None or not self.of.limit:
            return None
        if self.of.comparison == ">=":
            return min(100.0, self.of.limit / self.of.value * 100) if self.of.value else 100.0
        return min(100.0, self.of.value / self.of.limit * 100)
