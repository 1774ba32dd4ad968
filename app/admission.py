"""Admission: the bound on what the service takes on at once."""

from app.errors import Overloaded
from app.metrics import REQUESTS_IN_FLIGHT


class Admission:
    """A bound on what is in flight; past it a request is refused before any work is spent on it."""

    def __init__(self, max_in_flight: int) -> None:
        self.max_in_flight = max_in_flight
        self.in_flight = 0
        REQUESTS_IN_FLIGHT.set_function(lambda: self.in_flight)

    def enter(self, count: int = 1) -> None:
        """Take *count* places; each is given back with `leave`.

        Raises:
            Overloaded: there are not that many; none is taken.
        """
        if self.in_flight + count > self.max_in_flight:
            raise Overloaded(f"more than {self.max_in_flight} orders are in flight", retry_after_seconds=1)
        self.in_flight += count

    def leave(self, count: int = 1) -> None:
        """Give back *count* places."""
        self.in_flight -= count
