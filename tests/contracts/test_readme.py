"""README.md and the code say the same: settings, routes, metrics, refusals, commands and links."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.routing import APIRoute
from prometheus_client.metrics import MetricWrapperBase
from starlette.routing import Route

from app import errors, metrics
from app.embedded_postgres import EmbeddedPostgres
from app.main import create_app
from app.settings import Settings
from tests.support.order_api import new_database
from tests.support.service_process import ServiceProcess

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PROSE = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)

# Set where the error is raised, over its class's own: a body that is not JSON, a head that is too large.
OTHER_STATUSES = {"validation": {400, 431}}


@pytest.fixture(scope="module")
def service(postgres: EmbeddedPostgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    """One service for the whole file; nothing here changes it."""
    with new_database(postgres) as dsn:
        running = ServiceProcess(tmp_path_factory.mktemp("service"), dsn).start()
        yield running
        running.kill()


def test_settings() -> None:
    """README lists every setting of `Settings`, no other, each once and with its default."""
    fields = Settings.model_fields.items()
    listed = {row[0]: row[1] for row in table("Settings")}
    assert listed == {name.upper(): default(field.default) for name, field in fields}


def test_routes() -> None:
    """README lists every operation of the OpenAPI document, and every page that is not in it, and no other."""
    app = create_app(Settings())
    documented = {
        f"{method.upper()} {path}" for path, methods in app.openapi()["paths"].items() for method in methods
    }
    answered = {
        f"{method} {route.path_format}"
        for route in app.routes
        if isinstance(route, Route | APIRoute)
        for method in (route.methods or set()) - {"HEAD"}
    }
    listed = {row[0] for row in table("Routes")}
    assert documented <= listed
    assert listed == answered


def test_metrics(service: ServiceProcess) -> None:
    """README lists every metric that a running service exports, no other, each with its kind."""
    exposition = httpx.get(f"{service.url}/metrics").text
    exported = dict(re.findall(r"^# TYPE (\S+) (\S+)$", exposition, flags=re.MULTILINE))
    listed = {row[0]: row[1] for row in table("Metrics")}
    if not any(name.startswith("process_") for name in exported):  # macOS has no /proc
        listed = {name: kind for name, kind in listed.items() if not name.startswith("process_")}
    assert listed == exported


def test_metric_labels() -> None:
    """README names the labels of every metric of ours."""
    declared = {}
    for instrument in vars(metrics).values():
        if isinstance(instrument, MetricWrapperBase):
            (family,) = instrument.describe()
            name = f"{family.name}_total" if family.type == "counter" else family.name
            declared[name] = ", ".join(instrument._labelnames)
    listed = {row[0]: row[2] for row in table("Metrics")}
    assert {name: labels for name, labels in listed.items() if not name.startswith("process_")} == declared


def test_refusals() -> None:
    """README lists every `error_type`, no other, with the statuses that it can have."""
    statuses: dict[str, set[int]] = {}
    for kind in vars(errors).values():
        if isinstance(kind, type) and issubclass(kind, errors.ServiceError) and hasattr(kind, "error_type"):
            statuses.setdefault(kind.error_type, set(OTHER_STATUSES.get(kind.error_type, ()))).add(
                kind.status
            )
    assert {row[0]: {int(status) for status in row[1].split(", ")} for row in table("Refusals")} == statuses


def test_make_targets() -> None:
    """Every target of the Makefile is in README's list, and every `make ...` that README names is a target."""
    targets = set(re.findall(r"^([a-z0-9-]+):.*## ", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    code = "\n".join(re.findall(r"^```.*?^```$|`[^`\n]+`", README, flags=re.MULTILINE | re.DOTALL))
    assert set(re.findall(r"\bmake ([a-z0-9-]+)", code)) <= targets
    assert {
        row[0].removeprefix("make ") for row in table("Commands") if row[0].startswith("make ")
    } == targets


@pytest.mark.parametrize("document", ["README.md", "CHANGELOG.md"])
def test_relative_links(document: str) -> None:
    """Every relative link leads to a file that is there, or to a heading of the same document."""
    text = (ROOT / document).read_text()
    anchors = {slug(heading) for heading in re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)}
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    broken = [
        link
        for link in links
        if not (link[1:] in anchors if link.startswith("#") else (ROOT / link.partition("#")[0]).exists())
    ]
    assert not broken


def test_every_list_is_found() -> None:
    """A heading that is renamed, or a table that loses its form, does not empty a check."""
    for heading in ("Commands", "Settings", "Routes", "Metrics", "Refusals"):
        names = [row[0] for row in table(heading)]
        assert len(names) > 5, heading
        assert len(names) == len(set(names)), f"{heading}: a name stands twice"


def table(heading: str) -> list[list[str]]:
    """The rows of the tables under README's *heading*, without backticks; those whose first cell is code."""
    section = re.search(rf"^## {heading}$(.*?)(?=^## |\Z)", PROSE, flags=re.MULTILINE | re.DOTALL)
    assert section is not None, f"README.md has no section {heading!r}"
    rows = re.findall(r"^\| (`.+) \|$", section[1], flags=re.MULTILINE)
    return [[cell.strip().strip("`") for cell in row.split("|")] for row in rows]


def default(value: Any) -> str:
    """A default as a user would write it into the environment."""
    if value is None:
        return "unset"
    return str(value).lower() if isinstance(value, bool) else str(value)


def slug(heading: str) -> str:
    """The anchor that a heading gets on GitHub."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
