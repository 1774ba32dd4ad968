"""The ledger of a run: sets of ids, told to clients against stored. The whole run counts, the warm-up too.

Every request is acknowledged, refused, or unknown (no answer). Then
    acknowledged <= stored, stored - acknowledged <= unknown, nothing is stored twice.
"""

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator

import psycopg2

from loadtests.run_record import Counts, Ledger
from loadtests.samples import Sample
from loadtests.service_side.http_client import UNANSWERED, http_client, why

_TIMEOUT_SECONDS = 30.0
_PAGE_SIZE = 100

_SELECT_STORED = """
    SELECT id::text, coalesce(idempotency_key, '')
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


class LedgerError(Exception):
    """The stored orders could not be read; the message says why."""


def stored_in_database(dsn: str, customer_id: str) -> Iterator[tuple[str, str]]:
    """Id and idempotency key of every order of *customer_id*; raises LedgerError."""
    with _connection(dsn) as connection, connection.cursor("stored") as cursor:
        cursor.itersize = 10_000
        cursor.execute(_SELECT_STORED, {"customer_id": customer_id})
        yield from cursor


def pieces_in_database(dsn: str) -> dict[str, int]:
    """The stock of every product plus what orders hold of it, a sum no order may change; raises LedgerError."""
    with _connection(dsn) as connection, connection.cursor() as cursor:
        cursor.execute(_SELECT_PIECES)
        return dict(cursor.fetchall())


def stored_by_api(url: str, customer_id: str, api_key: str | None) -> Iterator[tuple[str, None]]:
    """Id of every order of *customer_id*, page by page; the API does not tell keys; raises LedgerError."""
    page = f"{url}/orders"
    query = {"customer_id": customer_id, "limit": str(_PAGE_SIZE)}
    with http_client(timeout_seconds=_TIMEOUT_SECONDS, api_key=api_key) as client:
        while True:
            try:
                document = client.get(page, params=query).raise_for_status().json()
                ids = [order["id"] for order in document["items"]]
                cursor = document["next_cursor"]
            except (*UNANSWERED, ValueError, KeyError, TypeError) as exc:
                raise LedgerError(f"{page}: {why(exc)}") from exc
            yield from ((order_id, None) for order_id in ids)
            if cursor is None:
                return
            query["cursor"] = cursor


class Answers:
    """The clients' side: what a run's requests were told of their orders, noted as the samples come."""

    def __init__(self) -> None:
        self.given: Counter[str] = Counter()  # ids given to a request
        self.unknown_keys: set[str] = set()

    def add(self, sample: Sample) -> None:
        """Take one; anything but the creation of an order is left out."""
        if sample.operation != "create":
            return
        if sample.outcome == "acknowledged":
            self.given[sample.order_id or f"none, for the key {sample.key}"] += 1
        elif sample.outcome == "unknown":
            self.unknown_keys.add(sample.key)


def balance(answers: Answers, stored: Iterable[tuple[str, str | None]], counts: Counts) -> Ledger:
    """Hold *answers* against *stored*, (id, idempotency key or None where it is not told) of the run's orders.

    Without keys a stored order that nobody acknowledged cannot be matched with one unknown request; then their number
    is held against the number of unknown requests.

    Args:
        counts: of the same samples.
    """
    given, unknown_keys = answers.given, answers.unknown_keys
    ids: set[str] = set()
    keys: Counter[str] = Counter()
    doubled = [f"id {order_id}" for order_id, count in given.items() if count > 1]
    unexplained: list[tuple[str, str | None]] = []
    for order_id, key in stored:
        if order_id in ids:
            doubled.append(f"id {order_id}")
            continue
        ids.add(order_id)
        if key:
            keys[key] += 1
        if order_id not in given:
            unexplained.append((order_id, key))
    doubled += [f"key {key}" for key, count in keys.items() if count > 1]
    if any(key is not None for _, key in unexplained):
        unexpected = [order_id for order_id, key in unexplained if key not in unknown_keys]
    else:
        unexpected = [order_id for order_id, _ in unexplained] if len(unexplained) > len(unknown_keys) else []
    return Ledger(
        counts=counts,
        stored=len(ids),
        unknown_stored=len(unexplained) - len(unexpected),
        lost=tuple(sorted(given.keys() - ids)),
        unexpected=tuple(sorted(unexpected)),
        doubled=tuple(sorted(set(doubled))),
    )


@contextlib.contextmanager
def _connection(dsn: str) -> Iterator[psycopg2.extensions.connection]:
    try:
        with contextlib.closing(psycopg2.connect(dsn, connect_timeout=10)) as connection:
            yield connection
    except psycopg2.Error as exc:
        raise LedgerError(f"the database: {str(exc).strip()}") from exc
