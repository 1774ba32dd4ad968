"""The service of this checkout with SLOWER_BY_US microseconds of CPU more in each order: `python -m` this module.

Load tests know the service from outside. This one file puts something into it, by name and not by import, so that
nothing else here depends on how the service is built.
"""

import importlib
import os
import sys
import time
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send


class SlowerRequests:
    """An application that works for a fixed time before each order, as a build does that has become slower."""

    def __init__(self, application: Any, seconds: float) -> None:
        self._application: ASGIApp = application
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Work, and serve one request."""
        if scope["type"] == "http" and scope["method"] == "POST":
            end = time.thread_time() + self._seconds
            while time.thread_time() < end:
                pass
        await self._application(scope, receive, send)


def main() -> int:
    """Serve as `python -m app` does, until SIGTERM."""
    command = importlib.import_module("app.__main__")
    create_app = command.create_app
    seconds = float(os.environ["SLOWER_BY_US"]) / 1e6
    vars(command)["create_app"] = lambda *given: SlowerRequests(create_app(*given), seconds)
    return int(command.main(sys.argv[1:]))


if __name__ == "__main__":
    sys.exit(main())
