"""Admission: the bound on what the service takes on at once, and from whom."""

from collections import Counter

from app.errors import Overloaded
from app.metrics import REQUESTS_IN_FLIGHT


class Admission:
    """A bound on what is in flight; past it a request is refused before any work is spent on it.

    A place is for the work alone: taken when the whole request is there, given back when its result is known. A
    client that sends or reads slowly holds none.
    """

    def __init__(self, max_in_flight: int, max_per_principal: int | None = None) -> None:
        """*max_per_principal*: how many places one principal may hold; None: all of them."""
        self.max_in_flight = max_in_flight
        self.max_per_principal = max_per_principal
        self.in_flight = 0
        self._held: Counter[str] = Counter()
        REQUESTS_IN_FLIGHT.set_function(lambda: self.in_flight)

    def enter(self, principal: str, count: int = 1) -> None:
        """Take *count* places; each is given back with `leave`.

        Raises:
            Overloaded: there are not that many; none is taken.
        """
        if self.in_flight + count > self.max_in_flight:
            raise Overloaded(f"more than {self.max_in_flight} orders are in flight", retry_after_seconds=1)
        if self.max_per_principal is not None:
            if self._held[principal] + count > self.max_per_principal:
                raise Overloaded(
                    f"more than {self.max_per_principal} of your orders are in flight", retry_after_seconds=1
                )
            self._held[principal] += count
        self.in_flight += count

    def leave(self, principal: str, count: int = 1) -> None:
        """Give back *count* places."""
        self.in_flight -= count
        if self.max_per_principal is not None:
            self._held[principal] -= count
