"""The floor: a bare ASGI function on uvicorn that parses an order and answers like the service, with no database."""

import itertools
import json

from starlette.types import Receive, Scope, Send

from loadtests.bench.peers import serving

_ids = itertools.count(1)


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer any POST with the order it carries."""
    if scope["type"] != "http":
        return
    body = b""
    more = True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            return
        body += message["body"]
        more = message["more_body"]
    order = json.loads(body) if body else {}
    answer = json.dumps({"id": next(_ids), "status": "confirmed", **order}).encode()
    await send(
        {
            "type": "http.response.start",
            "status": 201,
            "headers": [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(answer))],
            "trailers": False,
        }
    )
    await send({"type": "http.response.body", "body": answer, "more_body": False})


if __name__ == "__main__":
    serving.serve(app, serving.arguments().port)
