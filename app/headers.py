"""The headers of a request by their names: one way to read them, for every route."""

from starlette.types import Scope


def headers_of(scope: Scope) -> dict[bytes, bytes]:
    """The headers of the request in *scope* by their names: as our server found them, or made from another's."""
    found: dict[bytes, bytes] | None = scope.get("headers_by_name")
    return dict(scope["headers"]) if found is None else found
