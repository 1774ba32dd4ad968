"""Every refusal the service can give, as one tree.

    ServiceError
     ├── Validation             400/422  the body, a header or a parameter is not of the contract's form
     │    └── TooLarge          413      the body or the batch is over its limit
     ├── Unauthorized           401      no key, or not one of ours
     ├── NotFound               404      no such route or resource (another principal's order, too)
     ├── MethodNotAllowed       405
     ├── RequestTimeout         408      the client did not send the whole request in time
     ├── UnknownProduct         422      a line names a product that is not in the catalogue
     ├── OutOfStock             409
     ├── IdempotencyMismatch    422      the key belongs to another order
     ├── InvalidState           409      the order's status forbids it
     └── Unavailable            503      ours, not the client's; carries Retry-After
          ├── Overloaded        503      shed by admission, by the queue or by the pool
          ├── Draining          503      only what asks whether to send requests here
          ├── CircuitOpen       503      the breaker refuses while the database is away
          ├── DatabaseError     503      the database failed, the connection was lost, or a lock did not come
          ├── DeadlineExceeded  504      no answer in time
          └── InternalError     500      a defect of the service
               └── StatementRejected     the database refused the values

`outcome` tells a client what became of its order: `not_executed` (nothing was stored; sending it again cannot
store it twice) or `unknown` (it may be stored: ask again with the same key).
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

Outcome = Literal["not_executed", "unknown"]
ShedReason = Literal["admission", "queue", "pool"]
ErrorType = Literal[
    "validation",
    "unauthorized",
    "not_found",
    "method_not_allowed",
    "unknown_product",
    "out_of_stock",
    "idempotency_mismatch",
    "invalid_state",
    "too_large",
    "overloaded",
    "circuit_open",
    "database",
    "timeout",
    "internal",
]


class ServiceError(Exception):
    """The request was refused."""

    status: ClassVar[int]
    error_type: ClassVar[ErrorType]
    retryable: ClassVar[bool] = False  # by the service itself, under the same order id

    def __init__(
        self,
        detail: str | None = None,
        *,
        outcome: Outcome = "not_executed",
        status: int | None = None,
        retry_after_seconds: float | None = None,
    ) -> None:
        """Refuse with *detail* (default: the class's docstring).

        Args:
            detail: a sentence for the client; never SQL, a key or a body.
            outcome: whether the order may have been stored.
            status: overrides the class's HTTP status (400 for a body that is not JSON).
            retry_after_seconds: sent as `Retry-After`, rounded up; every 503 has one.
        """
        super().__init__(detail or self.title())
        self.detail = detail or self.title()
        self.outcome = outcome
        self.http_status = status or self.status
        self.retry_after_seconds = retry_after_seconds

    @classmethod
    def title(cls) -> str:
        """The first line of the docstring: what this kind of refusal means."""
        return (cls.__doc__ or cls.__name__).partition("\n")[0]

    @classmethod
    def type_uri(cls) -> str:
        """The problem type, from the class name: `OutOfStock` is `urn:order-service:out-of-stock`."""
        name = "".join(f"-{letter.lower()}" if letter.isupper() else letter for letter in cls.__name__)
        return f"urn:order-service:{name.lstrip('-')}"

    def problem(self) -> dict[str, object]:
        """The RFC 9457 problem: type, title, status, detail, and our error_type and outcome."""
        return {
            "type": self.type_uri(),
            "title": self.title(),
            "status": self.http_status,
            "detail": self.detail,
            "error_type": self.error_type,
            "outcome": self.outcome,
        }


class Validation(ServiceError):
    """The request is not of the contract's form."""

    status = 422
    error_type = "validation"

    def __init__(
        self,
        detail: str | None = None,
        *,
        status: int | None = None,
        errors: list[dict[str, object]] | None = None,
    ) -> None:
        """*errors*: one entry a defect, `{"loc": [...], "msg": "...", "type": "..."}`; never the input itself."""
        super().__init__(detail, status=status)
        self.errors = errors

    def problem(self) -> dict[str, object]:
        """The problem, with the list of defects where there is one."""
        problem = super().problem()
        if self.errors is not None:
            problem["errors"] = self.errors
        return problem


class TooLarge(ServiceError):
    """The request is over its size limit."""

    status = 413
    error_type = "too_large"


class Unauthorized(ServiceError):
    """A valid API key is needed: `Authorization: Bearer <token>`."""

    status = 401
    error_type = "unauthorized"


class NotFound(ServiceError):
    """There is no such resource."""

    status = 404
    error_type = "not_found"


class MethodNotAllowed(ServiceError):
    """The resource does not answer this method."""

    status = 405
    error_type = "method_not_allowed"


class RequestTimeout(ServiceError):
    """The request did not arrive in time."""

    status = 408
    error_type = "timeout"


class _OfProducts(ServiceError):
    def __init__(self, detail: str | None = None, *, product_ids: Sequence[str] = ()) -> None:
        """*product_ids*: those that led to the refusal, where they are known."""
        if detail is None and product_ids:
            detail = f"{self.title()[:-1]}: {', '.join(map(repr, product_ids))}"
        super().__init__(detail)
        self.product_ids = tuple(product_ids)


class UnknownProduct(_OfProducts):
    """A line names a product that is not in the catalogue."""

    status = 422
    error_type = "unknown_product"


class OutOfStock(_OfProducts):
    """Not enough stock for at least one line."""

    status = 409
    error_type = "out_of_stock"


class IdempotencyMismatch(ServiceError):
    """The idempotency key was already used for a different order."""

    status = 422
    error_type = "idempotency_mismatch"


class InvalidState(ServiceError):
    """The order's status does not allow this."""

    status = 409
    error_type = "invalid_state"


class Unavailable(ServiceError):
    """The service cannot do this now."""

    status = 503


class Overloaded(Unavailable):
    """The service has more work than it can finish in time."""

    error_type = "overloaded"

    def __init__(
        self,
        detail: str | None = None,
        *,
        reason: ShedReason = "admission",
        outcome: Outcome = "not_executed",
        retry_after_seconds: float | None = None,
    ) -> None:
        """*reason*: which limit was reached; the label of `requests_shed_total`."""
        super().__init__(detail, outcome=outcome, retry_after_seconds=retry_after_seconds)
        self.reason = reason


class Draining(Unavailable):
    """The service is ending; send no more requests to it."""

    error_type = "overloaded"


class CircuitOpen(Unavailable):
    """The database is away; requests are refused until it answers again."""

    error_type = "circuit_open"


class DatabaseError(Unavailable):
    """The database failed."""

    error_type = "database"


class ConnectionLost(DatabaseError):
    """The connection to the database broke."""

    retryable = True


class TransactionConflict(DatabaseError):
    """The transaction lost to a concurrent one."""

    retryable = True


class LockTimeout(_OfProducts, TransactionConflict):
    """Another transaction holds what this one needs."""


class DeadlineExceeded(Unavailable):
    """No answer in time."""

    status = 504
    error_type = "timeout"


class InternalError(Unavailable):
    """A defect of the service."""

    status = 500
    error_type = "internal"


class StatementRejected(InternalError):
    """The database refused the values."""
