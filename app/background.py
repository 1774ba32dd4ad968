"""Work that goes on beside the requests for as long as the process lives, whatever goes wrong in it."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

_log = logging.getLogger(__name__)


def _for_ever() -> bool:
    return True


async def keep_running(
    name: str,
    step: Callable[[], Awaitable[object]],
    *,
    pause_seconds: float = 1.0,
    wanted: Callable[[], bool] = _for_ever,
) -> None:
    """Await `step()` again and again, until cancelled or no longer *wanted*.

    Args:
        name: names the work in the log.
        step: one round of it, its own waiting included. An exception ends this round only: it is logged, and
            the next round begins after the pause.
        pause_seconds: how long to wait after an exception, so that a lasting one costs neither CPU nor log.
        wanted: asked before every round.
    """
    while wanted():
        try:
            await step()
        except (Exception, asyncio.CancelledError) as exc:
            this = asyncio.current_task()
            if this is None or this.cancelling():
                raise
            # A CancelledError that nobody asked for is a library's, leaked into this task: a failure as any other.
            _log.exception("background_work_failed", extra={"work": name, "reason": repr(exc)})
            await asyncio.sleep(pause_seconds)
