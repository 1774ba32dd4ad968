"""Orders whose time is up are answered, whatever their batch is doing: it goes on without cutting their neighbours'."""

import asyncio
import time
from collections import deque

from app.domain import IncomingOrder, PlacedOrder
from app.errors import DeadlineExceeded

# A timer this late says that the process itself stood still, and the answers may be in the socket already.
_PAUSED_SECONDS = 0.1


class Deadlines:
    """The orders under way, oldest first, and one timer for the first of them."""

    def __init__(self) -> None:
        self._watched: deque[tuple[IncomingOrder, asyncio.Future[PlacedOrder]]] = deque()
        self._timer: asyncio.TimerHandle | None = None

    def watch(
        self, incoming: IncomingOrder, future: asyncio.Future[PlacedOrder]
    ) -> asyncio.Future[PlacedOrder]:
        """Fail *future* with `DeadlineExceeded` if it is not done at the order's deadline; returns *future*.

        The outcome is `unknown` where the order's batch has begun. An order that came later and is due earlier may be
        answered as late as those before it.
        """
        while self._watched and self._watched[0][1].done():
            self._watched.popleft()
        self._watched.append((incoming, future))
        if self._timer is None:
            self._wait(incoming.deadline - time.monotonic())
        return future

    def _wait(self, seconds: float) -> None:
        due = time.monotonic() + seconds
        self._timer = asyncio.get_running_loop().call_later(max(0.0, seconds), self._notice, due)

    def _notice(self, due: float) -> None:
        if time.monotonic() - due > _PAUSED_SECONDS:
            self._timer = asyncio.get_running_loop().call_later(_PAUSED_SECONDS, self._expire)
        else:
            self._expire()

    def _expire(self) -> None:
        self._timer = None
        now = time.monotonic()
        while self._watched:
            incoming, future = self._watched[0]
            if not future.done():
                if incoming.deadline > now:
                    self._wait(incoming.deadline - now)
                    return
                future.set_exception(
                    DeadlineExceeded(outcome="unknown" if incoming.started_at else "not_executed")
                )
                # Marks it as retrieved: a caller that went away is no error.
                future.exception()
            self._watched.popleft()
