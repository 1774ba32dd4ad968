"""The service's answers, as the contract means them: what an answer says of the order it is about."""

from loadtests.samples import Operation, Outcome
from loadtests.users.light_http import Answer

_BAD_REQUEST = 400
_SERVER_ERROR = 500

ACKNOWLEDGED: dict[Operation, int] = {"create": 201, "cancel": 200}
# Refusals that are the shop's right, not a failure of the service: (operation, status, error_type).
EXPECTED_REFUSALS = frozenset({("create", 409, "out_of_stock"), ("cancel", 409, "invalid_state")})


class UnexpectedAnswerError(Exception):
    """The service answered, but not what the contract promises for this request."""


def order_id(answer: Answer) -> str:
    """The order's id, from Location or else the body; empty where neither names it."""
    location = answer.headers.get(b"location")
    if location:
        return location.rpartition(b"/")[2].decode("latin-1")
    found = answer.document().get("id")
    return found if isinstance(found, str) else ""


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
