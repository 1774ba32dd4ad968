"""Principals: who an API key stands for, or everybody where there are no keys."""

import hashlib
import hmac
import secrets
from collections.abc import Mapping

from app.errors import Unauthorized

ANONYMOUS = "anonymous"


class KeyRing:
    """The principals by the SHA-256 of their tokens; without any, everybody is `anonymous`.

    The tokens are random (`new_key`), so an unsalted hash is enough: there is nothing to guess.
    """

    def __init__(self, principals_by_key_hash: Mapping[bytes, str]) -> None:
        self._entries = list(principals_by_key_hash.items())

    def principal(self, authorization: str | None) -> str:
        """The principal behind an `Authorization: Bearer <token>` header.

        Raises:
            Unauthorized: keys are configured and this is none of them.
        """
        if not self._entries:
            return ANONYMOUS
        scheme, _, token = (authorization or "").partition(" ")
        # The bytes as they were sent, without HTTP's blanks; str.strip() would take others for blanks, too.
        digest = hashlib.sha256(token.strip(" \t").encode("latin-1")).digest()
        found = None
        for known, principal in self._entries:  # all of them, each in constant time
            if hmac.compare_digest(known, digest):
                found = principal
        if found is None or scheme.lower() != "bearer":
            raise Unauthorized
        return found


def new_key(principal: str) -> tuple[str, str]:
    """A new random token for *principal*, and its entry for `API_KEYS`."""
    token = secrets.token_urlsafe(32)
    return token, f"{principal}:{hashlib.sha256(token.encode()).hexdigest()}"
