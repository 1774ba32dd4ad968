"""The JSON of the API: what clients send, checked; and what they get, rendered.

The models document the API exactly. Answers on the order path are rendered by `order_json` instead, from the same
fields in the same order; a contract test holds the two together.
"""

import unicodedata
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

import orjson
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    StringConstraints,
    TypeAdapter,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

from app.domain import Order as DomainOrder
from app.domain import OrderStatus, PlacedOrder
from app.errors import ErrorType, Outcome

MAX_ORDER_BYTES = 64 * 1024
MAX_BATCH_BYTES = 1024 * 1024
MAX_BATCH_ORDERS = 100
MAX_KEY_LENGTH = 255
MAX_QUANTITY = 1000

_NO_NUL = r"^[^\x00]*$"  # PostgreSQL's text cannot hold one
Identifier = Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=_NO_NUL)]

# Printable ASCII, no blank at an end: what a header can carry unchanged, so that a key is one on both routes.
_KEY = r"^[!-~]([ -~]*[!-~])?$"
IdempotencyKey = Annotated[str, StringConstraints(min_length=1, max_length=MAX_KEY_LENGTH, pattern=_KEY)]

# The header says it plainly, or as an RFC 9651 string without parameters, of which nobody says what they mean.
_QUOTED = r'[!#-\[\]-~]|\\["\\]'  # a character inside the quotes that is no blank
KEY_HEADER_PATTERN = (
    rf"^([!#-~]([ -~]{{0,{MAX_KEY_LENGTH - 2}}}[!-~])?"
    rf'|"({_QUOTED})((?: |{_QUOTED}){{0,{MAX_KEY_LENGTH - 2}}}({_QUOTED}))?")$'
)
KeyHeader = Annotated[str, StringConstraints(pattern=KEY_HEADER_PATTERN)]

# One character at least that is no blank; what else cannot be seen, only Unicode's tables can say.
_NOT_BLANK = r"^[^\x00]*[^\x00-\x20\x7f-\xa0\u2000-\u200f\u2028-\u202f\u205f-\u206f\u3000\ufeff][^\x00]*$"
# Of a category that can be seen, and yet drawn as nothing.
_FILLERS = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0")
_UNSEEN = frozenset({"Cc", "Cf", "Zl", "Zp", "Zs"})


def _check_seen(text: str) -> str:
    if not "!" <= text[0] <= "~" and all(
        unicodedata.category(character) in _UNSEEN
        or character in _FILLERS
        or "VARIATION SELECTOR" in unicodedata.name(character, "")
        for character in text
    ):
        raise ValueError("no character of it can be seen")
    return text


CustomerId = Annotated[
    str,
    StringConstraints(min_length=1, max_length=64, pattern=_NO_NUL),
    AfterValidator(_check_seen),
    Field(json_schema_extra={"pattern": _NOT_BLANK}),
]


class _Quantity:
    """An integer as JSON Schema means it: `2.0` is 2.

    Of pydantic's own integers the strict one refuses it, and the other takes `"2"` and `true`, too.
    """

    @classmethod
    def __get_pydantic_core_schema__(cls, _source: type[int], _handler: GetCoreSchemaHandler) -> CoreSchema:
        whole = core_schema.float_schema(strict=True, ge=1, le=MAX_QUANTITY, multiple_of=1)
        return core_schema.union_schema(
            [
                core_schema.int_schema(strict=True, ge=1, le=MAX_QUANTITY),
                core_schema.no_info_after_validator_function(int, whole),
            ],
            mode="left_to_right",
            custom_error_type="quantity",
            custom_error_message=f"Input should be an integer from 1 to {MAX_QUANTITY}",
        )

    @classmethod
    def __get_pydantic_json_schema__(
        cls, _schema: CoreSchema, _handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        return {"type": "integer", "minimum": 1, "maximum": MAX_QUANTITY}


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class OrderItem(_Request):
    """A product and how many of it."""

    product_id: Identifier = Field(examples=["SKU-0001"])
    quantity: Annotated[int, _Quantity] = Field(examples=[2])


class NewOrder(_Request):
    """An order as a client asks for it. No product may stand on two lines."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"customer_id": "c-1", "items": [{"product_id": "SKU-0001", "quantity": 2}]}]
        }
    )

    customer_id: CustomerId
    items: Annotated[list[OrderItem], Field(min_length=1, max_length=50)]

    @model_validator(mode="after")
    def _no_product_twice(self) -> Self:
        if len({item.product_id for item in self.items}) < len(self.items):
            raise ValueError("a product may stand on one line only")
        return self


class NewBatchOrder(NewOrder):
    """An order of a batch, with the key a single order would carry as a header."""

    idempotency_key: IdempotencyKey | None = None


class NewBatch(_Request):
    """Up to 100 orders; each is stored or refused alone."""

    orders: Annotated[list[NewBatchOrder], Field(min_length=1, max_length=MAX_BATCH_ORDERS)]


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")


class OrderLine(_Answer):
    """A line of an order at the price it was sold for."""

    product_id: str = Field(examples=["SKU-0001"])
    quantity: int = Field(examples=[2])
    unit_price_cents: int = Field(examples=[8118])


class Order(_Answer):
    """A stored order. Money is integer cents."""

    id: str = Field(description="A time-ordered UUID.", examples=["019ab5f0-7c3e-7d1a-9c55-0a4f7e1b2c3d"])
    customer_id: str = Field(examples=["c-1"])
    status: OrderStatus
    currency: str = Field(examples=["EUR"])
    total_cents: int = Field(examples=[16236])
    items: list[OrderLine]
    created_at: str = Field(
        examples=["2026-11-22T10:00:00.123456Z"], json_schema_extra={"format": "date-time"}
    )


class OrderPage(_Answer):
    """A page of orders, newest first; `next_cursor` leads to the next one."""

    items: list[Order]
    next_cursor: str | None


class Product(_Answer):
    """A product. Its stock is not told: it changes faster than the cache."""

    id: str = Field(examples=["SKU-0001"])
    name: str = Field(examples=["Product 1"])
    price_cents: int = Field(examples=[8118])
    currency: str = Field(examples=["EUR"])


class ProductPage(_Answer):
    """A page of products by id; `next_cursor` leads to the next one."""

    items: list[Product]
    next_cursor: str | None


class Problem(BaseModel):
    """Why a request was refused (RFC 9457), and what became of its order."""

    type: str = Field(examples=["urn:order-service:out-of-stock"])
    title: str
    status: int
    detail: str
    error_type: ErrorType
    outcome: Outcome = Field(
        description="not_executed: nothing was stored, sending it again cannot store it twice. "
        "unknown: ask again with the same key."
    )
    errors: list[dict[str, Any]] | None = Field(default=None, description="The defects, one by one.")


class BatchStored(_Answer):
    """An order of the batch that is stored; `replayed` when an earlier request had stored it."""

    status: Literal[201]
    replayed: bool
    order: Order


class BatchRefused(_Answer):
    """An order of the batch that is not stored, and why."""

    status: int
    error: Problem


class BatchResult(_Answer):
    """One result per order, in the order they were sent."""

    results: list[BatchStored | BatchRefused]


NEW_ORDER: TypeAdapter[NewOrder] = TypeAdapter(NewOrder)
NEW_BATCH: TypeAdapter[NewBatch] = TypeAdapter(NewBatch)
NEW_BATCH_ORDER: TypeAdapter[NewBatchOrder] = TypeAdapter(NewBatchOrder)


def order_document(order: DomainOrder) -> dict[str, object]:
    """*order* as the API shows it: the fields of `Order`, in its order."""
    order_id, customer_id, status, currency, total_cents, lines, created_at = order
    return {
        "id": order_id,
        "customer_id": customer_id,
        "status": status,
        "currency": currency,
        "total_cents": total_cents,
        "items": [
            {"product_id": product_id, "quantity": quantity, "unit_price_cents": unit_price_cents}
            for product_id, quantity, unit_price_cents in lines
        ],
        "created_at": created_at,
    }


def order_json(order: DomainOrder) -> bytes:
    """*order* as JSON: the same bytes each time, so that a replay is the first answer again."""
    return orjson.dumps(order_document(order))


def batch_json(results: Sequence[PlacedOrder | dict[str, object]]) -> bytes:
    """The answer to a batch: a placed order or a problem for each, in order."""
    return orjson.dumps(
        {
            "results": [
                {"status": 201, "replayed": result.replayed, "order": order_document(result.order)}
                if isinstance(result, PlacedOrder)
                else {"status": result["status"], "error": result}
                for result in results
            ]
        }
    )
