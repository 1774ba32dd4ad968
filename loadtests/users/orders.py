"""The orders of a run, made up from what the target sells: the same in every process that knows the run's id.

An order's key tells which of them it is, so that whoever reads the ledger knows what must be stored under it. Nothing
here imports Locust.
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

ORDER_VARIANTS = 1024
MOST_PIECES = 3  # of one product in an order
PAGE_SIZE = 100
MAX_PRODUCTS = 10_000

_STATUSES = frozenset({"pending", "confirmed", "declined", "cancelled"})


class Product(NamedTuple):
    """What an order line needs to know of a product."""

    id: str
    price_cents: int
    currency: str


@dataclass(frozen=True)
class MadeOrder:
    """An order to send, and what the shop must make of it."""

    customer_id: str
    lines: tuple[tuple[str, int, int], ...]  # product, quantity, price of one in cents
    currency: str

    @property
    def document(self) -> dict[str, Any]:
        """The body of the request."""
        items = [{"product_id": product_id, "quantity": quantity} for product_id, quantity, _ in self.lines]
        return {"customer_id": self.customer_id, "items": items}

    @property
    def total_cents(self) -> int:
        """The sum of its lines."""
        return sum(quantity * price for _, quantity, price in self.lines)

    @property
    def content(self) -> str:
        """Its content in a line, to be compared with that of what is stored."""
        return content_of(self.customer_id, self.currency, self.total_cents, self.lines)

    def differs(self, answer: dict[str, Any]) -> str:
        """How *answer*, an order as the service tells it, differs; empty: it does not."""
        if not isinstance(answer.get("id"), str) or not answer["id"]:
            return "without an order id"
        try:
            lines = [
                (each["product_id"], each["quantity"], each["unit_price_cents"]) for each in answer["items"]
            ]
        except (KeyError, TypeError):
            return "without the order's lines"
        wrong = {
            "with other lines": sorted(lines) != sorted(self.lines),
            "with another total": answer.get("total_cents") != self.total_cents,
            "in another currency": answer.get("currency") != self.currency,
            "of another customer": answer.get("customer_id") != self.customer_id,
            "without a status": answer.get("status") not in _STATUSES,
        }
        return next((how for how, so in wrong.items() if so), "")


def content_of(customer_id: str, currency: str, total_cents: int, lines: Iterable[Sequence[Any]]) -> str:
    """An order's content in a line, whatever the order of its lines."""
    shown = ",".join(sorted(f"{product}*{quantity}@{price}" for product, quantity, price in lines))
    return f"{customer_id} {total_cents} {currency} {shown}"


def products_in(page: dict[str, Any]) -> list[Product]:
    """The products of a page of the catalogue; raises KeyError, TypeError or ValueError where it is not one."""
    return [
        Product(str(item["id"]), int(item["price_cents"]), str(item["currency"])) for item in page["items"]
    ]


def made_orders(customer_id: str, products: Sequence[Product]) -> list[MadeOrder]:
    """Orders of one to three lines, all of a line's products in one currency."""
    choose = random.Random(customer_id)  # noqa: S311 - repeatable, not secret
    made = []
    for _ in range(ORDER_VARIANTS):
        lines = choose.sample(products, min(choose.randint(1, 3), len(products)))
        same = [product for product in lines if product.currency == lines[0].currency]
        made.append(
            MadeOrder(
                customer_id,
                tuple((each.id, choose.randint(1, MOST_PIECES), each.price_cents) for each in same),
                lines[0].currency,
            )
        )
    return made


def key(run_id: str, user: str, count: int) -> str:
    """The idempotency key of a user's order; *user* is 16 hexadecimal digits."""
    return f"{run_id}-{user}-{count}"


def variant_of(key: str) -> int:
    """The place among `made_orders` of the order with this key."""
    _, user, count = key.rsplit("-", 2)
    return (int(user, 16) + int(count)) % ORDER_VARIANTS
