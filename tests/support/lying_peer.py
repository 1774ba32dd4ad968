"""A contestant for the benchmark that acknowledges every tenth order without storing it."""

import itertools
import json
import uuid

from starlette.types import Receive, Scope, Send

from loadtests.bench.peers import per_request, serving


class Liar:
    """`per_request`, but for the lies."""

    def __init__(self, dsn: str) -> None:
        self._honest = per_request.create_app(dsn)
        self._requests = itertools.count(1)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http" or next(self._requests) % 10:
            await self._honest(scope, receive, send)
            return
        while (await receive()).get("more_body"):
            pass
        answer = json.dumps({"id": str(uuid.uuid4()), "status": "confirmed"}).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(answer))]
        await send({"type": "http.response.start", "status": 201, "headers": headers})
        await send({"type": "http.response.body", "body": answer})


if __name__ == "__main__":
    options = serving.arguments()
    serving.serve(Liar(options.dsn), options.port)
