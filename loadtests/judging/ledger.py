"""The ledger of a run: what clients were told against what is stored, key by key; the warm-up is in it, too.

Every request is acknowledged, refused, or unknown (no answer, or one that is not the order). Then
    acknowledged <= stored, each under its own key with its own content; stored - acknowledged <= unknown;
    nothing is stored twice; an acknowledged cancellation is stored, and no other;
    a key that is sent again brings its order again.
"""

import contextlib
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import httpx
import psycopg2

from loadtests.run_record import Counts, Ledger
from loadtests.samples import INVALID_STATE, OUT_OF_STOCK, Sample
from loadtests.service_side.http_client import UNANSWERED, http_client, why
from loadtests.users.orders import (
    MAX_PRODUCTS,
    MOST_PIECES,
    PAGE_SIZE,
    MadeOrder,
    Product,
    content_of,
    made_orders,
    products_in,
    variant_of,
)

REPEATED = 20  # keys that are sent again after the run

_TIMEOUT_SECONDS = 30.0
_CREATED = 201
_SERVER_ERROR = 500
_ATTEMPTS = 3

_SELECT_STORED = """
    SELECT id::text, coalesce(idempotency_key, ''), status, total_cents, currency, lines
      FROM orders
     WHERE customer_id = %(customer_id)s
"""

# One statement, one snapshot: true at every moment, whoever else is ordering.
_SELECT_PIECES = """
    SELECT p.id, p.stock + coalesce(sold.quantity, 0)::bigint
      FROM products p
      LEFT JOIN (SELECT l.product_id, sum(l.quantity) AS quantity
                   FROM order_lines l
                   JOIN orders o ON o.principal = l.principal AND o.id = l.order_id
                  WHERE o.status IN ('pending', 'confirmed')
                  GROUP BY 1) sold ON sold.product_id = p.id
"""

_SELECT_SCARCE = "SELECT EXISTS (SELECT FROM products WHERE stock < %(pieces)s)"


class LedgerError(Exception):
    """The stored orders could not be read; the message says why."""


class StoredOrder(NamedTuple):
    """An order as it is stored."""

    id: str
    key: str | None  # None: not told
    status: str = "confirmed"
    content: str = ""  # empty: not told


def stored_in_database(dsn: str, customer_id: str) -> Iterator[StoredOrder]:
    """Every order of *customer_id*; raises LedgerError."""
    with _connection(dsn) as connection, connection.cursor("stored") as cursor:
        cursor.itersize = 10_000
        cursor.execute(_SELECT_STORED, {"customer_id": customer_id})
        for order_id, key, status, total_cents, currency, lines in cursor:
            content = content_of(customer_id, currency, total_cents, lines)
            yield StoredOrder(order_id, key, status, content)


def pieces_in_database(dsn: str) -> dict[str, int]:
    """The stock of every product plus what orders hold of it, a sum no order may change; raises LedgerError."""
    with _connection(dsn) as connection, connection.cursor() as cursor:
        cursor.execute(_SELECT_PIECES)
        return dict(cursor.fetchall())


def is_scarce(dsn: str) -> bool:
    """True where some product cannot serve every order; raises LedgerError."""
    with _connection(dsn) as connection, connection.cursor() as cursor:
        cursor.execute(_SELECT_SCARCE, {"pieces": MOST_PIECES})
        return bool((cursor.fetchone() or (False,))[0])


def stored_by_api(url: str, customer_id: str, api_key: str | None) -> Iterator[StoredOrder]:
    """Every order of *customer_id*, page by page; the API does not tell keys; raises LedgerError."""
    with http_client(timeout_seconds=_TIMEOUT_SECONDS, api_key=api_key) as client:
        query = {"customer_id": customer_id, "limit": str(PAGE_SIZE)}
        for page in _pages(client, f"{url}/orders", query):
            try:
                orders = [
                    StoredOrder(
                        order["id"],
                        None,
                        order["status"],
                        content_of(
                            order["customer_id"],
                            order["currency"],
                            order["total_cents"],
                            [
                                (each["product_id"], each["quantity"], each["unit_price_cents"])
                                for each in order["items"]
                            ],
                        ),
                    )
                    for order in page["items"]
                ]
            except (KeyError, TypeError) as exc:
                raise LedgerError(f"{url}/orders: not the contract's page") from exc
            yield from orders


def orders_of_run(url: str, customer_id: str, api_key: str | None) -> Sequence[MadeOrder]:
    """The orders that the generator made up for *customer_id*; raises LedgerError."""
    products: list[Product] = []
    with http_client(timeout_seconds=_TIMEOUT_SECONDS, api_key=api_key) as client:
        for page in _pages(client, f"{url}/products", {"limit": str(PAGE_SIZE)}):
            try:
                products += products_in(page)
            except (KeyError, TypeError, ValueError) as exc:
                raise LedgerError(f"{url}/products: not the contract's page") from exc
            if len(products) >= MAX_PRODUCTS:
                break
    return made_orders(customer_id, products)


def _pages(client: httpx.Client, url: str, query: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    cursor: Mapping[str, str] = {}
    while True:
        try:
            document = client.get(url, params={**query, **cursor}).raise_for_status().json()
            after = document["next_cursor"]
        except (*UNANSWERED, ValueError, KeyError, TypeError) as exc:
            raise LedgerError(f"{url}: {why(exc)}") from exc
        yield document
        if after is None:
            return
        cursor = {"cursor": after}


@dataclass
class Answers:
    """The clients' side: what a run's requests were told of their orders, noted as the samples come."""

    given: dict[str, str] = field(default_factory=dict)  # id -> the key of the request that it was given to
    given_again: list[str] = field(default_factory=list)  # ids given to another request, too
    unknown_keys: set[str] = field(default_factory=set)
    cancelled: set[str] = field(default_factory=set)  # ids whose cancellation was acknowledged
    perhaps_cancelled: set[str] = field(default_factory=set)
    not_cancelled: set[str] = field(default_factory=set)  # refused: their status forbids it
    sold_out: int = 0
    to_repeat: list[tuple[str, str]] = field(default_factory=list)  # some keys with their ids, by chance
    _acknowledged: int = 0
    _choose: random.Random = field(default_factory=lambda: random.Random(1))  # noqa: S311 - not secret

    def add(self, sample: Sample) -> None:
        """Take one; a read is left out."""
        if sample.operation == "create":
            self._add_order(sample)
        elif sample.operation == "cancel":
            self._add_cancellation(sample)

    def _add_order(self, sample: Sample) -> None:
        self.sold_out += sample.error_type == OUT_OF_STOCK
        if sample.outcome == "unknown":
            self.unknown_keys.add(sample.key)
        if sample.outcome != "acknowledged":
            return
        order_id = sample.order_id or f"none, for the key {sample.key}"
        if order_id in self.given:
            self.given_again.append(order_id)
            return
        self.given[order_id] = sample.key
        self._acknowledged += 1
        if len(self.to_repeat) < REPEATED:
            self.to_repeat.append((sample.key, order_id))
        elif (place := self._choose.randrange(self._acknowledged)) < REPEATED:
            self.to_repeat[place] = sample.key, order_id

    def _add_cancellation(self, sample: Sample) -> None:
        if sample.outcome == "acknowledged":
            self.cancelled.add(sample.order_id)
        elif sample.outcome == "unknown":
            self.perhaps_cancelled.add(sample.order_id)
        elif sample.error_type == INVALID_STATE:
            self.not_cancelled.add(sample.order_id)


def balance(
    answers: Answers,
    stored: Iterable[StoredOrder],
    counts: Counts,
    wanted: Callable[[str], str] | None = None,
) -> Ledger:
    """Hold *answers* against *stored*, the run's orders.

    Where keys are not told, a stored order that nobody acknowledged cannot be matched with one unknown request; then
    their number is held against the number of unknown requests.

    Args:
        counts: of the same samples.
        wanted: the content that the order with a key must have; None: not known.
    """
    books = _Books(answers, wanted)
    for order in stored:
        books.add(order)
    return books.closed(counts)


class _Books:
    """Stored orders, held against what clients were told one by one."""

    def __init__(self, answers: Answers, wanted: Callable[[str], str] | None) -> None:
        self._answers = answers
        self._wanted = wanted
        self._ids: set[str] = set()
        self._keys: Counter[str] = Counter()
        self._by_status: Counter[str] = Counter()
        self._doubled = [f"id {order_id}" for order_id in answers.given_again]
        self._swapped: list[str] = []
        self._altered: list[str] = []
        self._cancellations: list[str] = []
        self._unjust: list[str] = []
        self._unexplained: list[StoredOrder] = []

    def add(self, order: StoredOrder) -> None:
        if order.id in self._ids:
            self._doubled.append(f"id {order.id}")
            return
        self._ids.add(order.id)
        self._by_status[order.status] += 1
        if order.key:
            self._keys[order.key] += 1
        its_key = self._answers.given.get(order.id)
        if its_key is None:
            self._unexplained.append(order)
        elif order.key not in (None, its_key):
            self._swapped.append(order.id)
        own = order.key or its_key
        if self._wanted is not None and own and order.content and order.content != self._wanted(own):
            self._altered.append(order.id)
        self._add_status(order)

    def _add_status(self, order: StoredOrder) -> None:
        answers = self._answers
        if order.status == "cancelled":
            if order.id not in answers.cancelled and order.id not in answers.perhaps_cancelled:
                self._cancellations.append(order.id)
        elif order.id in answers.cancelled:
            self._cancellations.append(order.id)
        elif order.id in answers.not_cancelled and order.status == "confirmed":
            self._unjust.append(order.id)

    def closed(self, counts: Counts) -> Ledger:
        doubled = [*self._doubled, *(f"key {key}" for key, count in self._keys.items() if count > 1)]
        unknown_keys, unexplained = self._answers.unknown_keys, self._unexplained
        if any(order.key is not None for order in unexplained):
            unexpected = [order.id for order in unexplained if order.key not in unknown_keys]
        elif len(unexplained) > len(unknown_keys):
            unexpected = [order.id for order in unexplained]
        else:
            unexpected = []
        # An order may be pending at first: nobody knows what it was when its cancellation came.
        unjust = [] if self._by_status["pending"] or self._by_status["declined"] else self._unjust
        return Ledger(
            counts=counts,
            stored=len(self._ids),
            unknown_stored=len(unexplained) - len(unexpected),
            lost=tuple(sorted(self._answers.given.keys() - self._ids)),
            unexpected=tuple(sorted(unexpected)),
            doubled=tuple(sorted(set(doubled))),
            swapped=tuple(sorted(self._swapped)),
            altered=tuple(sorted(self._altered)),
            cancellations=tuple(sorted(self._cancellations)),
            unjust_refusals=tuple(sorted(unjust)),
        )


def wanted_content(orders: Sequence[MadeOrder]) -> Callable[[str], str]:
    """The content that is wanted under a key, of a run's made-up *orders*."""
    contents = [made.content for made in orders]

    def wanted(key: str) -> str:
        try:
            return contents[variant_of(key)]
        except ValueError:
            return "no order of this run"

    return wanted


def not_replayed(
    url: str, api_key: str | None, orders: Sequence[MadeOrder], answers: Answers
) -> tuple[str, ...]:
    """Send some keys again: those that did not bring their order again, as a replay.

    Raises:
        LedgerError: nobody answers.
    """
    found = []
    with http_client(timeout_seconds=_TIMEOUT_SECONDS, api_key=api_key) as client:
        for key, order_id in answers.to_repeat:
            answer = _sent_again(client, f"{url}/orders", key, orders[variant_of(key)])
            try:
                same = answer.status_code == _CREATED and answer.json()["id"] == order_id
            except (ValueError, KeyError, TypeError):
                same = False
            if not same or answer.headers.get("Idempotency-Replayed") != "true":
                found.append(key)
    return tuple(found)


def _sent_again(client: httpx.Client, url: str, key: str, made: MadeOrder) -> httpx.Response:
    """The answer to an order that is sent again; a 503 says that one may ask once more."""
    for attempt in range(_ATTEMPTS):
        try:
            answer = client.post(url, json=made.document, headers={"Idempotency-Key": key})
        except UNANSWERED as exc:
            raise LedgerError(f"{url}: {why(exc)}") from exc
        if answer.status_code <= _SERVER_ERROR or attempt == _ATTEMPTS - 1:
            break
        time.sleep(1)
    if answer.status_code > _SERVER_ERROR:
        raise LedgerError(f"{url}: {answer.status_code} to a key that was sent again")
    return answer


@contextlib.contextmanager
def _connection(dsn: str) -> Iterator[psycopg2.extensions.connection]:
    try:
        with contextlib.closing(psycopg2.connect(dsn, connect_timeout=10)) as connection:
            yield connection
    except psycopg2.Error as exc:
        raise LedgerError(f"the database: {str(exc).strip()}") from exc
