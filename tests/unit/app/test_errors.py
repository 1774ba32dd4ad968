"""The tree of refusals, against the contract."""

import json

import pytest

from app import errors
from app.errors import CircuitOpen, Overloaded, ServiceError, Validation
from app.metrics import ORDER_OUTCOMES, SHED_REASONS
from app.problems import problem_answer, problem_response

# error_type and the statuses it may have, from section 3.3 of the contract; `timeout` is 408 where the client was
# late with its request, and `validation` 431 where its head is too large.
STATUSES = {
    "validation": {400, 422},
    "unauthorized": {401},
    "not_found": {404},
    "method_not_allowed": {405},
    "unknown_product": {422},
    "out_of_stock": {409},
    "idempotency_mismatch": {422},
    "invalid_state": {409},
    "too_large": {413},
    "overloaded": {503},
    "circuit_open": {503},
    "database": {503},
    "timeout": {408, 504},
    "internal": {500},
}


def _tree(kind: type[ServiceError]) -> list[type[ServiceError]]:
    return [kind, *(found for child in kind.__subclasses__() for found in _tree(child))]


KINDS = [
    kind
    for kind in dict.fromkeys(_tree(ServiceError))
    if hasattr(kind, "error_type") and kind.__module__ == "app.errors"
]


@pytest.mark.parametrize("kind", KINDS)
def test_every_refusal_is_one_of_the_contracts(kind: type[ServiceError]) -> None:
    """A refusal's type and status belong together; its title is the first line of its docstring."""
    problem = kind().problem()
    assert kind.status in STATUSES[kind.error_type]
    assert list(problem)[:6] == ["type", "title", "status", "detail", "error_type", "outcome"]
    assert problem["title"] == problem["detail"] == (kind.__doc__ or "").partition("\n")[0]
    assert problem["status"] == kind.status
    assert problem["outcome"] == "not_executed"


def test_the_contracts_error_types_all_exist() -> None:
    """Every error type of the contract has a class, and none is beside it."""
    assert {kind.error_type for kind in KINDS} == set(STATUSES)


def test_types_are_named_after_their_classes() -> None:
    """`OutOfStock` is `urn:order-service:out-of-stock`; no two share one."""
    assert errors.OutOfStock.type_uri() == "urn:order-service:out-of-stock"
    assert len({kind.type_uri() for kind in KINDS}) == len(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_whose_fault_it_is_decides_how_it_is_counted(kind: type[ServiceError]) -> None:
    """4xx is `rejected`, 5xx is `error`; what cannot happen to an order is not counted as one."""
    never = {"not_found", "method_not_allowed", "invalid_state"}
    counted = {kind.error_type for kind in KINDS} - never
    assert counted == {*ORDER_OUTCOMES["rejected"], *ORDER_OUTCOMES["error"]}
    if kind.error_type in counted and kind.status != 408:
        assert kind.error_type in ORDER_OUTCOMES["error" if kind.status >= 500 else "rejected"]


def test_the_reasons_to_shed_are_those_that_are_counted() -> None:
    """Every reason to shed an order has its series."""
    assert {Overloaded(reason=reason).reason for reason in ("admission", "queue", "pool")} == set(
        SHED_REASONS
    )


@pytest.mark.parametrize(
    ("seconds", "header"), [(None, b"1"), (0.0, b"1"), (0.2, b"1"), (1.2, b"2"), (7.0, b"7")]
)
def test_every_503_says_when_to_come_back(seconds: float | None, header: bytes) -> None:
    """`Retry-After` is in whole seconds, rounded up, at least one."""
    headers = dict(problem_answer(CircuitOpen(retry_after_seconds=seconds))[0])
    assert headers[b"retry-after"] == header
    for kind in KINDS:
        assert (b"retry-after" in dict(problem_answer(kind())[0])) == (kind.status == 503)
        assert (b"www-authenticate" in dict(problem_answer(kind())[0])) == (kind.status == 401)
        assert dict(problem_answer(kind())[0])[b"content-type"] == b"application/problem+json"


def test_what_a_refusal_is_told_stands_in_its_problem() -> None:
    """Detail, outcome, status and the list of defects."""
    defects: list[dict[str, object]] = [{"loc": ["a"], "msg": "m", "type": "t"}]
    refusal = Validation("not JSON", status=400, errors=defects)
    response = problem_response(refusal)
    assert response.status_code == 400
    assert json.loads(bytes(response.body)) == {
        "type": "urn:order-service:validation",
        "title": "The request is not of the contract's form.",
        "status": 400,
        "detail": "not JSON",
        "error_type": "validation",
        "outcome": "not_executed",
        "errors": defects,
    }
    assert "errors" not in Validation("short").problem()
    assert errors.ConnectionLost(outcome="unknown").problem()["outcome"] == "unknown"


def test_only_lost_connections_and_conflicts_are_repeated_by_the_service() -> None:
    """Whatever else is refused stays refused."""
    assert {kind.__name__ for kind in KINDS if kind.retryable} == {
        "ConnectionLost",
        "TransactionConflict",
        "LockTimeout",
    }
