"""The settings: read from the environment, checked together, told by their variable's name."""

import hashlib

import pytest
from pydantic import ValidationError

from app.auth import KeyRing, new_key
from app.errors import Unauthorized
from app.settings import Settings, SettingsError


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)


def test_the_defaults_are_the_contracts() -> None:
    """Every setting of the contract with its default, and no other."""
    settings = Settings.load(embedded_postgres_dir=".").model_dump(mode="json")
    assert {name.upper(): value for name, value in settings.items()} == {
        "HOST": "127.0.0.1",
        "PORT": 8000,
        "OPS_PORT": None,
        "DATABASE_URL": None,
        "EMBEDDED_POSTGRES_DIR": ".",
        "DB_POOL_MIN_SIZE": 10,
        "DB_POOL_MAX_SIZE": 50,
        "DB_POOL_TIMEOUT_SECONDS": 30,
        "DB_ACQUIRE_TIMEOUT_SECONDS": 1,
        "DB_CONNECT_TIMEOUT_SECONDS": 2,
        "DB_STATEMENT_TIMEOUT_SECONDS": 2,
        "START_TIMEOUT_SECONDS": 30,
        "REQUEST_DEADLINE_SECONDS": 5,
        "CACHE_TTL_SECONDS": 300,
        "BATCH_MAX_SIZE": 100,
        "BATCH_MAX_WAIT_SECONDS": 0.5,
        "BREAKER_FAIL_MAX": 3,
        "BREAKER_RESET_SECONDS": 2,
        "RETRY_MAX_ATTEMPTS": 3,
        "RETRY_BUDGET_RATIO": 0.1,
        "MAX_IN_FLIGHT": 2000,
        "MAX_IN_FLIGHT_SHARE_PER_PRINCIPAL": 0.5,
        "PAYMENTS_URL": None,
        "PAYMENTS_TIMEOUT_SECONDS": 2,
        "PAYMENTS_DEADLINE_SECONDS": 5,
        "PAYMENTS_MAX_IN_FLIGHT": 32,
        "FAULTS_TOKEN": None,
        "FAULTS_TIMELINE": None,
        "KEEP_ALIVE_SECONDS": 75,
        "CONNECTION_MAX_AGE_SECONDS": 60,
        "DRAIN_DELAY_SECONDS": 0,
        "API_KEYS": None,
        "ALLOW_ANONYMOUS": False,
        "MIGRATE_ON_START": True,
        "MAX_REPLICAS": 1,
        "CATALOG_SIZE": 1000,
        "CATALOG_STOCK": 1_000_000_000,
        "LOG_LEVEL": "info",
        "LOG_FORMAT": "auto",
    }
    assert str(Settings.load().embedded_postgres_dir) == ".data/postgres"


def test_the_environment_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable wins over the default, an override over the variable, and an empty variable is none."""
    monkeypatch.setenv("PORT", "9000")
    monkeypatch.setenv("MAX_IN_FLIGHT", "700")
    monkeypatch.setenv("DATABASE_URL", "")
    settings = Settings.load(port=9001)
    assert (settings.port, settings.max_in_flight, settings.database_url) == (9001, 700, None)


@pytest.mark.parametrize("name", [name.upper() for name in Settings.model_fields])
def test_every_bad_value_is_told_by_its_name(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """One line that starts with the variable."""
    anything = {"DATABASE_URL", "EMBEDDED_POSTGRES_DIR", "FAULTS_TIMELINE"}  # checked where they are used
    if name in anything:
        return
    monkeypatch.setenv(name, "\x7f, bad")
    with pytest.raises(SettingsError) as refused:
        Settings.load()
    reason = str(refused.value)
    assert reason.startswith(f"{name}: ")
    assert "\n" not in reason


def test_a_bad_key_is_not_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token that was mistaken for its hash is not found in a log."""
    monkeypatch.setenv("API_KEYS", "alice:the-secret-token")
    with pytest.raises(SettingsError) as refused:
        Settings.load()
    assert "the-secret-token" not in str(refused.value)


def test_settings_do_not_change() -> None:
    """A setting cannot be assigned."""
    with pytest.raises(ValidationError):
        Settings.load().port = 1  # type: ignore[misc]


@pytest.mark.parametrize("host", ["127.0.0.1", "127.3.2.1", "::1", "localhost"])
def test_anybody_may_come_in_over_loopback(host: str) -> None:
    """No key is needed where only this machine reaches the service."""
    assert Settings.load(host=host).host_is_loopback


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "192.168.1.1"])  # noqa: S104
def test_nobody_comes_in_from_elsewhere_by_accident(host: str) -> None:
    """Elsewhere it takes a key, or the word that anybody may come."""
    with pytest.raises(SettingsError, match="API_KEYS: needed to listen on"):
        Settings.load(host=host)
    assert not Settings.load(host=host, allow_anonymous=True).host_is_loopback
    assert Settings.load(host=host, api_keys=new_key("alice")[1]).principals_by_key_hash


def test_the_keys_open_for_their_principals() -> None:
    """Entries may be spaced, and their hashes in capitals; a principal may have several."""
    (one, first), (two, second), (three, third) = new_key("alice"), new_key("alice"), new_key("bob.b_1-x")
    settings = Settings.load(api_keys=f" {first} ,{second.upper().replace('ALICE', 'alice')},{third},")
    keys = KeyRing(settings.principals_by_key_hash)
    assert [keys.principal(f"Bearer {token}") for token in (one, two, three)] == [
        "alice",
        "alice",
        "bob.b_1-x",
    ]
    assert hashlib.sha256(one.encode()).digest() in settings.principals_by_key_hash
    for wrong in (None, "", f"Basic {one}", f"Bearer {one}x", f"Bearer {first.split(':')[1]}"):
        with pytest.raises(Unauthorized):
            keys.principal(wrong)


def test_without_keys_everybody_is_anonymous() -> None:
    """A request without keys configured is anonymous, whatever it sends."""
    keys = KeyRing(Settings.load().principals_by_key_hash)
    assert keys.principal(None) == keys.principal("Bearer x") == "anonymous"


@pytest.mark.parametrize(
    "url",
    [
        "payments:8100",
        "ftp://payments",
        "http://",
        "http://payments:99999",
        "http://payments:0",
        "http://user:secret@payments",
        "http://payments/?key=1",
        "http://payments/#there",
        "http://pay ments",
        "http://pay\r\nments",
        "http://zahlung\u00e9n",
    ],
)
def test_a_url_that_cannot_be_asked_is_refused(url: str) -> None:
    """What would be left out, or never reached, is told at the start, and not quoted."""
    with pytest.raises(SettingsError, match=r"^PAYMENTS_URL: ") as refused:
        Settings.load(payments_url=url)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("url", ["http://payments", "https://payments:8443/v1/", "http://[::1]:8100"])
def test_a_url_of_payments(url: str) -> None:
    assert Settings.load(payments_url=url).payments_url == url
