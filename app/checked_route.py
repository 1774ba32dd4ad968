"""What is asked before FastAPI reads a route's parameters: are they the route's own, who asks, and is there room.

As dependencies these would cost a read more than its answer does: FastAPI resolves each anew for every request.
"""

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.types import Message, Receive, Scope, Send

from app.headers import headers_of
from app.parsing import check_coding, check_query


class CheckedRoute(APIRoute):
    """A route that is asked for in a form it knows: no query but its own, no coding of the body."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check, and answer."""
        if scope["method"] in (self.methods or ()):
            check_coding(headers_of(scope).get(b"content-encoding", b""))
            if scope["query_string"]:
                known = {parameter.alias for parameter in self.dependant.query_params}
                check_query(scope["query_string"], known)
        await super().handle(scope, receive, send)


class AdmittedRoute(CheckedRoute):
    """A checked route that a known principal reaches while there is room."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check, and answer; the place is given back as soon as there is an answer, however slowly it is read."""
        if scope["method"] not in (self.methods or ()):
            await super().handle(scope, receive, send)
            return
        state = scope["state"]
        authorization = headers_of(scope).get(b"authorization")
        principal = state["keys"].principal(
            None if authorization is None else authorization.decode("latin-1")
        )
        admission = state["admission"]
        holds_place = False

        async def answer(message: Message) -> None:
            nonlocal holds_place
            if holds_place:
                holds_place = False
                admission.leave(principal)
            await send(message)

        admission.enter(principal)
        holds_place = True
        scope["principal"] = principal
        try:
            await super().handle(scope, receive, answer)
        finally:
            if holds_place:
                admission.leave(principal)


def principal_of(request: Request) -> str:
    """The principal that is asking."""
    principal: str = request.scope["principal"]
    return principal
