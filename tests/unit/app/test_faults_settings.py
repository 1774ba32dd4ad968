"""Values of settings that would fail late, or never: each is refused by its name; and those that are fine in spite."""

import socket
from typing import Any

import pytest

from app.settings import Settings, SettingsError

_SECONDS = sorted(name.upper() for name in Settings.model_fields if name.endswith("_seconds"))
_NUMBERS = sorted(
    name.upper()
    for name, field in Settings.model_fields.items()
    if isinstance(field.default, (int, float)) and not isinstance(field.default, bool)
)


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)


def _refusal(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> str:
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError) as refused:
        Settings.load()
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("value", ["inf", "-inf", "nan", "1e300", "1e7", "-1", "1e-300"])
@pytest.mark.parametrize("name", _SECONDS)
def test_seconds_are_finite_and_bounded(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    """CONNECTION_MAX_AGE_SECONDS=inf printed the ready line, and then every connection hung."""
    if (name, value) == ("DRAIN_DELAY_SECONDS", "1e-300"):
        return
    assert _refusal(monkeypatch, name, value).startswith(f"{name}: ")


@pytest.mark.parametrize("name", [name for name in _SECONDS if name != "DRAIN_DELAY_SECONDS"])
def test_no_time_at_all_is_no_time(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Only a drain may last 0 seconds."""
    assert _refusal(monkeypatch, name, "0").startswith(f"{name}: ")


@pytest.mark.parametrize("value", ["10000000000000000000", "1e30", "nan", "9" * 5000])
@pytest.mark.parametrize("name", [name for name in _NUMBERS if name != "RETRY_BUDGET_RATIO"])
def test_every_number_is_bounded(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    """DB_POOL_MAX_SIZE=10**19 is a slip of the keyboard."""
    assert _refusal(monkeypatch, name, value).startswith(f"{name}: ")


@pytest.mark.parametrize("name", _SECONDS)
def test_an_hour_is_allowed(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The bounds are far from any use."""
    monkeypatch.setenv(name, "3600")
    assert getattr(Settings.load(), name.lower()) == 3600


@pytest.mark.parametrize("value", ["INFO", "Info", "info", "WARNING", "Debug"])
def test_names_of_levels_in_any_case(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    """Most tools write them in capitals."""
    monkeypatch.setenv("LOG_LEVEL", value)
    monkeypatch.setenv("LOG_FORMAT", "JSON")
    settings = Settings.load()
    assert (settings.log_level, settings.log_format) == (value.lower(), "json")


@pytest.mark.parametrize("host", ["LOCALHOST", "LocalHost"])
def test_localhost_in_any_case(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    """Names of hosts know no case (RFC 4343)."""
    monkeypatch.setenv("HOST", host)
    assert Settings.load().host_is_loopback


@pytest.mark.parametrize(
    "host", ["no.such.host.invalid", "[::1]", "127.0.0.1:8000", "\udcff", "a" * 300, " "]
)
def test_a_host_that_cannot_be_resolved_says_so(host: str) -> None:
    """HOST is what is wrong: it said that API_KEYS were needed."""
    with pytest.raises(SettingsError, match=r"^HOST: .* cannot be resolved"):
        Settings.load(host=host)


@pytest.mark.parametrize(
    ("addresses", "is_loopback"),
    [
        (["127.0.1.1"], True),
        (["::1", "127.0.0.1"], True),
        (["127.0.0.1", "10.0.0.1"], False),
        (["10.0.0.1"], False),
    ],
)
def test_a_name_is_loopback_where_all_its_addresses_are(
    monkeypatch: pytest.MonkeyPatch, addresses: list[str], *, is_loopback: bool
) -> None:
    """Anonymous orders come in over a name of this machine, and over no other."""

    def resolve(_host: str, port: int, **_: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    if is_loopback:
        assert Settings.load(host="shop.test").host_is_loopback
    else:
        with pytest.raises(SettingsError, match=r"API_KEYS: needed to listen on shop\.test"):
            Settings.load(host="shop.test")
