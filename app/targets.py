"""Targets of requests: a path is matched before its slashes are decoded, and what is no UTF-8 names nothing.

ASGI's `path` is decoded as a whole: `/orders%2Fbatch` would be another route, `/products/A%2FB` could not be read, and
bytes that are no UTF-8 would all be one and the same replacement character.
"""

import re
from urllib.parse import quote, unquote, unquote_to_bytes

from starlette.convertors import StringConvertor, register_url_convertor
from starlette.types import Scope

from app.errors import NotFound, ServiceError, Validation

_MALFORMED = re.compile(rb"%(?![0-9A-Fa-f]{2})")
_KEPT = re.compile(rb"%(?=2[Ff]|25)")


def read_target(scope: Scope) -> ServiceError | None:
    """Make *scope*'s path the one to match; why there is nothing at this target, where there cannot be.

    The path is decoded but for encoded slashes and percent signs, which a route's `{name:segment}` decodes.
    """
    raw_path, query = scope["raw_path"], scope["query_string"]
    if b"%" in raw_path:
        path = None if _MALFORMED.search(raw_path) else _decoded(_KEPT.sub(b"%25", raw_path))
        if path is None:
            return NotFound("the path is not percent-encoded UTF-8")
        scope["path"] = path
    if b"%" in query and _decoded(query) is None:
        return Validation("the query is not percent-encoded UTF-8")
    return None


def _decoded(encoded: bytes) -> str | None:
    try:
        return unquote_to_bytes(encoded).decode()
    except UnicodeDecodeError:
        return None


class _Segment(StringConvertor):
    def convert(self, value: str) -> str:
        return unquote(value)

    def to_string(self, value: str) -> str:
        return quote(value, safe="")


register_url_convertor("segment", _Segment())
