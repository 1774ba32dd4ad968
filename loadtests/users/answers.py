"""The service's answers, as the contract means them: what an answer says of the order it is about."""

from loadtests.samples import INVALID_STATE, OUT_OF_STOCK, Operation, Outcome
from loadtests.users.light_http import Answer
from loadtests.users.orders import MadeOrder

_BAD_REQUEST = 400
_SERVER_ERROR = 500

ACKNOWLEDGED: dict[Operation, int] = {"create": 201, "cancel": 200, "read": 200}
# Refusals that are the shop's right, where they are true: (operation, status, error_type).
EXPECTED_REFUSALS = frozenset({("create", 409, OUT_OF_STOCK), ("cancel", 409, INVALID_STATE)})


class UnexpectedAnswerError(Exception):
    """The service answered, but not what the contract promises for this request."""


def acknowledgement(answer: Answer, made: MadeOrder) -> tuple[str, str]:
    """The id of the order that *answer*, a 201, acknowledges; and how it is not the one that was asked for."""
    document = answer.document()
    wrong = made.differs(document)
    order_id = str(document["id"]) if not wrong else ""
    location = answer.headers.get(b"location", b"")
    if order_id and location.rpartition(b"/")[2].decode("latin-1") not in ("", order_id):
        wrong = "with another id in its Location"
    return order_id, wrong


def cancellation(answer: Answer, order_id: str) -> str:
    """How *answer*, a 200, is not the cancelled order; empty: it is."""
    document = answer.document()
    if document.get("id") != order_id:
        return "of another order"
    return "" if document.get("status") == "cancelled" else "of an order that is not cancelled"


def refusal(answer: Answer) -> tuple[Outcome, str]:
    """The order's outcome and error type, of an answer that is no acknowledgement.

    Only a refusal that says `not_executed`, or that blames the request (4xx), is one: a gateway's 502 or 504 does
    not know what became of the order behind it.
    """
    problem = answer.document()
    said = problem.get("outcome")
    refused = said == "not_executed" or (said != "unknown" and answer.status < _SERVER_ERROR)
    if answer.status < _BAD_REQUEST:  # a success or a redirect that the contract does not know
        refused = False
    return "refused" if refused else "unknown", error_type_of(answer.status, problem)


def error_type_of(status: int, problem: dict[str, object]) -> str:
    """The service's own, or the status where it gave none."""
    error_type = problem.get("error_type")
    return error_type if isinstance(error_type, str) else f"http_{status}"


def unexpected(status: int, error_type: str) -> UnexpectedAnswerError:
    """The failure that such an answer is."""
    return UnexpectedAnswerError(f"{status} {error_type}")
