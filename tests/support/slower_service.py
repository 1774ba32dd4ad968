"""`python -m tests.support.slower_service`: the service, but each order costs SLOWER_BY_US microseconds of CPU more."""

import os
import sys
import time

from fastapi import FastAPI
from starlette.types import Receive, Scope, Send

import app.__main__ as command
from app.main import create_app
from app.settings import Settings


class SlowerRequests:
    """An application that works for a fixed time before each order, as a build does that has become slower."""

    def __init__(self, application: FastAPI, seconds: float) -> None:
        self._application = application
        self._seconds = seconds
        self.state = application.state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Work, and serve one request."""
        if scope["type"] == "http" and scope["method"] == "POST":
            end = time.thread_time() + self._seconds
            while time.thread_time() < end:
                pass
        await self._application(scope, receive, send)


def _create_slower_app(settings: Settings) -> SlowerRequests:
    return SlowerRequests(create_app(settings), float(os.environ["SLOWER_BY_US"]) / 1e6)


if __name__ == "__main__":
    vars(command)["create_app"] = _create_slower_app
    sys.exit(command.main(sys.argv[1:]))
