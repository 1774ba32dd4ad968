"""`python -m tests.support.stock_service`: the application on uvicorn and prometheus_client as they come."""

import asyncio
import sys

import prometheus_client
import uvicorn
import uvloop
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from app import light_metrics

light_metrics.Counter = prometheus_client.Counter  # type: ignore[assignment,misc]
light_metrics.Histogram = prometheus_client.Histogram  # type: ignore[assignment,misc]

from app import metrics  # noqa: E402 -- it takes the classes when it is imported
from app.main import create_app  # noqa: E402
from app.settings import Settings  # noqa: E402


async def main() -> None:
    """Serve until a signal comes, and say where on stderr, as `python -m app` does."""
    settings = Settings.load()
    config = uvicorn.Config(
        create_app(settings), host=settings.host, port=settings.port, http=HttpToolsProtocol, ws="none"
    )
    listener = config.bind_socket()
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started and not serving.done():  # noqa: ASYNC110 -- plain attributes of uvicorn's
        await asyncio.sleep(0.02)
    if type(metrics.ORDERS) is not prometheus_client.Counter or "app.server" in sys.modules:
        raise RuntimeError("something of ours still stands in for a library")
    if server.started:
        host, port = listener.getsockname()
        sys.stderr.write(f"order service on http://{host}:{port}   uvicorn\n")
    await serving


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
