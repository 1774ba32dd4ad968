"""The long-lived objects of the process, as a request finds them: `main.py` makes each of them once."""

from dataclasses import dataclass
from typing import TypedDict, cast

from fastapi import Request

from app.admission import Admission
from app.auth import KeyRing
from app.catalogue import Catalogue
from app.intake import OrderIntake
from app.resilience import CircuitBreaker
from app.service import OrderService


@dataclass
class Lifecycle:
    """The phase of life the process is in."""

    draining: bool = False

    def drain(self) -> None:
        """Say from now on that the process is ending."""
        self.draining = True


class State(TypedDict):
    """The contents of `scope["state"]`."""

    orders: OrderService
    catalogue: Catalogue
    intake: OrderIntake
    keys: KeyRing
    admission: Admission
    breakers: tuple[CircuitBreaker, ...]
    lifecycle: Lifecycle


def state_of(request: Request) -> State:
    """The state that *request* came with, typed."""
    return cast("State", request.scope["state"])
