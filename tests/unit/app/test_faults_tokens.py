"""A token is the bytes that were sent."""

import hashlib

import pytest

from app.auth import KeyRing
from app.errors import Unauthorized


def test_a_token_is_known_by_its_bytes() -> None:
    """Headers arrive as Latin-1: a token of other bytes is hashed as it was sent, not as it was decoded."""
    token = "schlüssel".encode()
    keys = KeyRing({hashlib.sha256(token).digest(): "alice"})
    assert keys.principal(f"Bearer {token.decode('latin-1')}") == "alice"


@pytest.mark.parametrize("more", ["\xa0", "\x85", "\x1c"])
def test_what_only_python_calls_a_blank_is_part_of_a_token(more: str) -> None:
    """It is another token, and opens nothing."""
    keys = KeyRing({hashlib.sha256(b"token").digest(): "alice"})
    assert keys.principal("Bearer  token\t") == "alice"
    with pytest.raises(Unauthorized):
        keys.principal(f"Bearer token{more}")
