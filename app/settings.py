"""The service's settings: read once from the environment, checked, and never changed."""

import ipaddress
import re
import socket
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from app.schemas import MAX_BATCH_ORDERS

PRINCIPAL = re.compile(r"[A-Za-z0-9._-]{1,64}")
_FAULTS_TOKEN = re.compile(r"[\x21-\x7e]{8,200}")
_API_KEY_ENTRY = re.compile(rf"{PRINCIPAL.pattern}:[0-9a-fA-F]{{64}}")

# Bounds that no sane value meets: what is beyond them is a slip, and would fail late or never end.
Seconds = Annotated[float, Field(ge=0.001, le=86_400, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=10_000)]

# At the end: how long requests in progress may take at least. With the other steps of a shutdown it fits into the 30 s
# that Kubernetes gives by default.
SHUTDOWN_GRACE_SECONDS = 15.0
OPERATIONS_GRACE_SECONDS = 1.0  # after that, for the last probes and scrapes
TERMINATION_GRACE_PERIOD_SECONDS = 30.0

AnyCase = BeforeValidator(lambda value: value.lower() if isinstance(value, str) else value)

Address = tuple[socket.AddressFamily, int, Any]  # family, protocol, and what `bind` takes


class SettingsError(Exception):
    """A setting cannot be used; the message names the variable."""


def addresses_of(host: str, port: int) -> list[Address]:
    """The addresses to listen on for *host*, a name or an address.

    Raises:
        SettingsError: it cannot be resolved.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as exc:
        raise SettingsError(f"HOST: {host!r} cannot be resolved ({exc})") from exc
    return list(dict.fromkeys((family, protocol, address) for family, _, protocol, _, address in found))


def is_http_url(text: str) -> bool:
    """Whether *text* names a server that can be asked over HTTP, and nothing that would be left out."""
    try:
        url = urlsplit(text)
        port = url.port
    except ValueError:
        return False
    is_plain = text.isascii() and not any(character <= " " or character == "\x7f" for character in text)
    extras = url.query or url.fragment or url.username is not None or "?" in text or "#" in text
    return is_plain and url.scheme in {"http", "https"} and bool(url.hostname) and port != 0 and not extras


class Settings(BaseSettings):
    """One frozen value per environment variable; field names are the variables' names in lower case.

    Raises:
        SettingsError: from `Settings.load`, one line that names the variable.
    """

    model_config = SettingsConfigDict(
        frozen=True, env_ignore_empty=True, extra="ignore", validate_default=True
    )

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    ops_port: Annotated[int, Field(ge=0, le=65535)] | None = (
        None  # unset: PORT serves probes and metrics, too
    )

    database_url: str | None = None  # unset: the embedded PostgreSQL
    embedded_postgres_dir: Path = Path(".data/postgres")
    db_pool_min_size: Count = 10
    db_pool_max_size: Count = 50
    # The plan's value, aiopg's own bound: the three below bound a request.
    db_pool_timeout_seconds: Seconds = 30
    db_acquire_timeout_seconds: Seconds = 1
    db_connect_timeout_seconds: Seconds = 2
    db_statement_timeout_seconds: Seconds = 2
    start_timeout_seconds: Seconds = 30  # how long an unreachable database is retried at start

    request_deadline_seconds: Seconds = 5
    cache_ttl_seconds: Seconds = 300
    batch_max_size: Annotated[int, Field(ge=1, le=10_000)] = 100
    batch_max_wait_seconds: Seconds = 0.5  # past it the order is refused: the plan's p95 limit is 0.5 s
    breaker_fail_max: Count = 3
    breaker_reset_seconds: Seconds = 2
    retry_max_attempts: Annotated[int, Field(ge=1, le=100)] = 3
    retry_budget_ratio: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.1
    max_in_flight: Annotated[int, Field(ge=1, le=1_000_000)] = 2000  # above the plan's 1,000 users
    # Of one principal, where API_KEYS is set.
    max_in_flight_share_per_principal: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 0.5

    payments_url: str | None = None  # unset: orders are confirmed at once
    payments_timeout_seconds: Seconds = 2
    payments_deadline_seconds: Seconds = 5
    payments_max_in_flight: Count = 32

    faults_token: str | None = None  # unset: there is no /faults
    faults_timeline: Path | None = None  # unset: the log alone

    keep_alive_seconds: Seconds = 75
    connection_max_age_seconds: Seconds = 60
    # 5 in a cluster: endpoints are removed while SIGTERM is delivered
    drain_delay_seconds: Annotated[float, Field(ge=0, le=86_400, allow_inf_nan=False)] = 0

    api_keys: str | None = None  # principal:sha256hex,...
    allow_anonymous: bool = False

    migrate_on_start: bool = True
    max_replicas: Count = 1
    catalog_size: Annotated[int, Field(ge=1, le=1_000_000)] = 1000
    catalog_stock: Annotated[int, Field(ge=0, le=2**62)] = 1_000_000_000

    log_level: Annotated[Literal["debug", "info", "warning", "error", "critical"], AnyCase] = "info"
    log_format: Annotated[Literal["auto", "console", "json"], AnyCase] = "auto"

    @classmethod
    def load(cls, **overrides: object) -> Self:
        """Read the environment; *overrides* win over it."""
        try:
            return cls(**overrides)  # type: ignore[arg-type]  # pydantic checks the values
        except ValidationError as exc:
            first = exc.errors(include_url=False, include_input=False)[0]
            name = "_".join(str(part) for part in first["loc"]).upper()
            message = first["msg"].removeprefix("Value error, ")
            raise SettingsError(f"{name}: {message}" if name else message) from None

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.ops_port and self.ops_port == self.port:
            raise ValueError(f"OPS_PORT: {self.ops_port} is PORT; leave it unset to use one port for all")
        if self.db_pool_min_size > self.db_pool_max_size:
            raise ValueError(
                f"DB_POOL_MIN_SIZE: {self.db_pool_min_size} is more than "
                f"DB_POOL_MAX_SIZE ({self.db_pool_max_size})"
            )
        if self.max_in_flight < MAX_BATCH_ORDERS:
            raise ValueError(
                f"MAX_IN_FLIGHT: {self.max_in_flight} is less than a batch may hold ({MAX_BATCH_ORDERS} orders)"
            )
        if self.payments_url is not None and not is_http_url(self.payments_url):
            raise ValueError(
                "PAYMENTS_URL: neither http:// nor https:// with a host, or with more than a path behind it"
            )
        if self.faults_token is not None and not _FAULTS_TOKEN.fullmatch(self.faults_token):
            raise ValueError("FAULTS_TOKEN: 8 to 200 printable ASCII characters, no blank")
        for entry in (self.api_keys or "").split(","):
            if entry.strip() and not _API_KEY_ENTRY.fullmatch(entry.strip()):
                raise ValueError(
                    "API_KEYS: every entry is principal:sha256hex (`python -m app new-key` makes one)"
                )
        if (self.max_in_flight_per_principal or MAX_BATCH_ORDERS) < MAX_BATCH_ORDERS:
            raise ValueError(
                f"MAX_IN_FLIGHT_SHARE_PER_PRINCIPAL: {self.max_in_flight_share_per_principal:g} of MAX_IN_FLIGHT "
                f"({self.max_in_flight}) is less than a batch may hold ({MAX_BATCH_ORDERS} orders)"
            )
        if not self.principals_by_key_hash and not self.allow_anonymous and not self.host_is_loopback:
            raise ValueError(
                f"API_KEYS: needed to listen on {self.host}, which is not a loopback address "
                "(or ALLOW_ANONYMOUS=true, to let anybody in)"
            )
        return self

    @property
    def max_in_flight_per_principal(self) -> int | None:
        """The most places that one principal may hold; None: everybody is anonymous, and may hold all."""
        if not self.principals_by_key_hash:
            return None
        return round(self.max_in_flight * self.max_in_flight_share_per_principal)

    @cached_property
    def host_is_loopback(self) -> bool:
        """True if only this machine can reach the service; every address of a name counts."""
        if self.host.lower() == "localhost":
            return True
        addresses = addresses_of(self.host, self.port)
        return all(ipaddress.ip_address(address[0]).is_loopback for _, _, address in addresses)

    @property
    def shutdown_grace_seconds(self) -> float:
        """How long requests in progress may take at the end: no order is cut off before its deadline."""
        return max(SHUTDOWN_GRACE_SECONDS, self.request_deadline_seconds)

    @property
    def longest_shutdown_seconds(self) -> float:
        """The sum of what bounds each step of a shutdown: drain, requests, queued orders, payments, pool, probes.

        The embedded PostgreSQL takes its own time after that.
        """
        return (
            self.drain_delay_seconds
            + self.shutdown_grace_seconds
            + self.request_deadline_seconds
            + self.db_statement_timeout_seconds
            + (0 if self.ops_port is None else OPERATIONS_GRACE_SECONDS)
            + (self.payments_timeout_seconds if self.payments_url else 0)
        )

    @cached_property
    def principals_by_key_hash(self) -> Mapping[bytes, str]:
        """Principal by the SHA-256 of its token; empty: everybody is anonymous."""
        entries = (
            entry.strip().rpartition(":") for entry in (self.api_keys or "").split(",") if entry.strip()
        )
        return {bytes.fromhex(digest): principal for principal, _, digest in entries}
