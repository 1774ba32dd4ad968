"""Raw headers and bytes to orders: what a request must be before anything is done for it."""

import re
from codecs import BOM_UTF8
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple, TypeGuard
from urllib.parse import parse_qsl

from pydantic import ValidationError
from pydantic_core import from_json
from starlette.types import Message, Receive, Scope

from app.errors import ServiceError, TooLarge, Validation
from app.headers import headers_of
from app.schemas import (
    KEY_HEADER_PATTERN,
    MAX_BATCH_ORDERS,
    MAX_KEY_LENGTH,
    NEW_BATCH,
    NEW_BATCH_ORDER,
    NEW_ORDER,
    NewBatchOrder,
    NewOrder,
)

# Of one order, or of a batch as a whole: listing the 100,000 that fit into one would hold up the loop for a second.
_MAX_DEFECTS = 50

_KEY_HEADER = re.compile(KEY_HEADER_PATTERN)
_ESCAPED = re.compile(r"\\(.)")


class ClientGone(Exception):
    """The client closed the connection before its request was complete."""


class Headers(NamedTuple):
    """The headers that matter to an order."""

    authorization: str | None
    content_type: bytes
    content_encoding: bytes
    content_length: int
    idempotency_keys: list[bytes]

    @classmethod
    def of(cls, scope: Scope) -> "Headers":
        """Those of the request in *scope*."""
        headers = headers_of(scope)
        authorization = headers.get(b"authorization")
        key = headers.get(b"idempotency-key")
        return cls(
            None if authorization is None else authorization.decode("latin-1"),
            headers.get(b"content-type", b""),
            headers.get(b"content-encoding", b""),
            int(headers.get(b"content-length", 0)),  # the parser has let digits through, and nothing else
            [] if key is None else [key],
        )

    def key(self) -> str | None:
        """The idempotency key, if one was sent: as it is, or out of the quotes of an RFC 9651 string."""
        if not self.idempotency_keys:
            return None
        # Blanks and tabs around a header are HTTP's; they are no part of its value (RFC 9110, 5.5).
        value = self.idempotency_keys[0].strip(b" \t").decode("latin-1")
        if len(self.idempotency_keys) > 1 or not _KEY_HEADER.fullmatch(value):
            raise Validation(
                f"Idempotency-Key: one value of 1 to {MAX_KEY_LENGTH} printable ASCII characters, no blank at "
                "an end; one that begins with a quotation mark is a string as in RFC 9651"
            )
        return _ESCAPED.sub(r"\1", value[1:-1]) if value.startswith('"') else value


async def read_body(headers: Headers, receive: Receive, limit: int) -> bytes:
    """The request's body; refused as soon as it is known to be over *limit* bytes, or not to be JSON."""
    check_coding(headers.content_encoding)
    if headers.content_type != b"application/json":
        _check_type(headers.content_type)
    if headers.content_length > limit:
        raise TooLarge(f"the body may be {limit} bytes long")
    message: Message = await receive()
    body: bytes = message.get("body", b"")
    if message.get("more_body") or message["type"] == "http.disconnect":
        chunks, size = [body], len(body)
        while message["type"] != "http.disconnect" and message.get("more_body") and size <= limit:
            message = await receive()
            chunks.append(message.get("body", b""))
            size += len(chunks[-1])
        if message["type"] == "http.disconnect":
            raise ClientGone
        body = b"".join(chunks)
    if len(body) > limit:
        raise TooLarge(f"the body may be {limit} bytes long")
    return body.removeprefix(BOM_UTF8)


def check_query(query: bytes, known: Collection[str] = ()) -> None:
    """Refuse a *query* that names a parameter twice, or another one than those *known*."""
    if not query:
        return
    names = [name for name, _ in parse_qsl(query.decode("latin-1"), keep_blank_values=True)]
    if not set(names) <= set(known):
        raise Validation(f"the query: has {', '.join(sorted(known)) or 'no parameter'}, and no other")
    if len(set(names)) < len(names):
        raise Validation("the query: a parameter may stand once")


def check_coding(coding: bytes) -> None:
    """Refuse a body that is said to be encoded."""
    if coding and coding.strip().lower() != b"identity":
        raise Validation("Content-Encoding: the body must not be encoded", status=415)


def _check_type(content_type: bytes) -> None:
    media_type, *parameters = (part.strip().lower() for part in content_type.split(b";"))
    if media_type != b"application/json":
        raise Validation("Content-Type: must be application/json", status=415)
    for parameter in parameters:
        name, _, value = parameter.partition(b"=")
        if name == b"charset" and value.strip(b'"') not in (b"utf-8", b"utf8"):
            raise Validation("Content-Type: JSON is UTF-8", status=415)


def parse_order(body: bytes) -> NewOrder:
    """The order in *body*.

    Raises:
        Validation: it is none; 400 where it is not even JSON.
    """
    try:
        return NEW_ORDER.validate_json(body)
    except ValidationError as exc:
        raise _validation(exc) from None


def parse_batch(body: bytes) -> Sequence[NewBatchOrder | ServiceError]:
    """The orders of a batch, each parsed alone where not all are well-formed."""
    try:
        return NEW_BATCH.validate_json(body).orders
    except ValidationError as exc:
        if not _is_json(exc) or not _is_batch(document := from_json(body)):
            raise _validation(exc) from None
        return [_parse_item(item) for item in document["orders"]]


def _is_batch(document: object) -> TypeGuard[dict[str, list[object]]]:
    """Whether it holds a list of orders that can be answered one by one."""
    return (
        isinstance(document, dict)
        and set(document) == {"orders"}
        and isinstance(document["orders"], list)
        and 1 <= len(document["orders"]) <= MAX_BATCH_ORDERS
    )


def _parse_item(item: object) -> NewBatchOrder | ServiceError:
    try:
        return NEW_BATCH_ORDER.validate_python(item)
    except ValidationError as exc:
        return _validation(exc)


def _validation(exc: ValidationError) -> Validation:
    if exc.error_count() > _MAX_DEFECTS:
        return Validation(f"{exc.error_count()} defects, too many to list")
    errors = [
        dict(error) for error in exc.errors(include_url=False, include_input=False, include_context=False)
    ]
    if not _is_json(exc):
        return Validation("the body is not JSON", status=400, errors=errors)
    return Validation(
        "; ".join(f"{_path(error['loc'])}: {error['msg']}" for error in errors[:3]), errors=errors
    )


def _is_json(exc: ValidationError) -> bool:
    return (
        exc.error_count() > 1
        or exc.errors(include_url=False, include_input=False)[0]["type"] != "json_invalid"
    )


def _path(loc: object) -> str:
    return ".".join(map(str, loc)) if isinstance(loc, Iterable) and loc else "body"
