"""The serving of every peer: as the service is, on uvloop and httptools, one process, no access log."""

import argparse
from typing import Any, cast

import uvicorn
from starlette.types import ASGIApp


def arguments() -> argparse.Namespace:
    """The peer's command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--dsn", default="", help="of the database to make its tables in")
    return parser.parse_args()


def serve(app: ASGIApp, port: int) -> None:
    """Serve *app* on loopback until SIGTERM."""
    uvicorn.run(
        cast("Any", app),
        host="127.0.0.1",
        port=port,
        loop="uvloop",
        http="httptools",
        access_log=False,
        log_level="warning",
    )
