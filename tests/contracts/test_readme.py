"""The documents and the code say the same: settings, routes, metrics, refusals, commands, figures and links."""

import importlib.util
import re
from collections.abc import Iterator, Sequence
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
from loadtests import marked_block
from loadtests.bench import growth, order_cost
from loadtests.comparing import sensitivity
from loadtests.reports import summary
from tests.support.order_api import new_database
from tests.support.service_process import EVERYTHING, ServiceProcess

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("*.md", "[!.]*/**/*.md")
    for path in ROOT.glob(pattern)
    if not path.is_relative_to(ROOT / "loadtests" / "results")
)
CODE = re.compile(r"^```.*?^```$", flags=re.MULTILINE | re.DOTALL)

# Set where the error is raised, over its class's own: a body that is not JSON, a head that is too large.
OTHER_STATUSES = {"validation": {400, 415, 431, 501}}


@pytest.fixture(scope="module")
def service(postgres: EmbeddedPostgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    """One service for the whole file; nothing here changes it."""
    with new_database(postgres) as dsn:
        running = ServiceProcess(tmp_path_factory.mktemp("service"), dsn, EVERYTHING).start()
        yield running
        running.kill()


def test_settings() -> None:
    """app/README.md lists every setting of `Settings`, no other, each once and with its default."""
    fields = Settings.model_fields.items()
    listed = {row[0]: row[1] for row in table("app/README.md", "Settings")}
    assert listed == {name.upper(): default(field.default) for name, field in fields}


def test_routes() -> None:
    """README.md lists every operation of the OpenAPI document, and every page that is not in it, and no other."""
    app = create_app(Settings.load(faults_token=EVERYTHING["FAULTS_TOKEN"]))
    documented = {
        f"{method.upper()} {path}" for path, methods in app.openapi()["paths"].items() for method in methods
    }
    answered = {
        f"{method} {route.path_format}"
        for route in app.routes
        if isinstance(route, Route | APIRoute)
        for method in (route.methods or set()) - {"HEAD"}
    }
    listed = {row[0] for row in table("README.md", "Routes")}
    assert documented <= listed
    assert listed == answered


def test_metrics(service: ServiceProcess) -> None:
    """The catalogue lists every metric that a running service exports, each with its kind, but for two it names."""
    exposition = httpx.get(f"{service.url}/metrics").text
    exported = dict(re.findall(r"^# TYPE (\S+) (\S+)$", exposition, flags=re.MULTILINE))
    listed = {row[0]: row[1] for row in table("monitoring/README.md", "Metrics")}
    (also,) = re.findall(r"client library also exports ([^.]*)", section("monitoring/README.md", "Metrics"))
    listed |= dict.fromkeys(re.findall(r"`(process_\w+)`", also), "gauge")
    if not any(name.startswith("process_") for name in exported):  # macOS has no /proc
        listed = {name: kind for name, kind in listed.items() if not name.startswith("process_")}
    assert listed == exported


def test_metric_labels() -> None:
    """The catalogue names the labels of every metric of ours."""
    declared = {}
    for instrument in vars(metrics).values():
        if isinstance(instrument, MetricWrapperBase):
            (family,) = instrument.describe()
            name = f"{family.name}_total" if family.type == "counter" else family.name
            declared[name] = set(instrument._labelnames)
    listed = {row[0]: set(re.findall(r"\w+", row[2])) for row in table("monitoring/README.md", "Metrics")}
    assert {name: labels for name, labels in listed.items() if not name.startswith("process_")} == declared


@pytest.mark.parametrize(
    ("metric", "label", "values"),
    [
        ("orders_total", "status", metrics.ORDER_OUTCOMES),
        ("requests_shed_total", "reason", metrics.SHED_REASONS),
        ("order_stage_seconds", "stage", metrics.ORDER_STAGES),
        ("cache_requests_total", "result", metrics.CACHE_RESULTS),
        ("circuit_breaker_transitions_total", "to", metrics.BREAKER_STATES),
        ("retries_total", "outcome", metrics.RETRY_OUTCOMES),
        ("payments_total", "outcome", metrics.PAYMENT_OUTCOMES),
    ],
)
def test_label_values(metric: str, label: str, values: Sequence[str]) -> None:
    """Below the catalogue stand the values of each label that is not told by its name."""
    text = section("monitoring/README.md", "Metrics")
    (line,) = re.findall(
        rf"^- `{metric}`: `{label}` is (.*?)(?=;|^\S|\Z)", text, flags=re.MULTILINE | re.DOTALL
    )
    assert re.findall(r"`(\w+)`", line) == list(values)


def test_refusals() -> None:
    """README.md lists every `error_type`, no other, with the statuses that it can have."""
    statuses: dict[str, set[int]] = {}
    for kind in vars(errors).values():
        if isinstance(kind, type) and issubclass(kind, errors.ServiceError) and hasattr(kind, "error_type"):
            statuses.setdefault(kind.error_type, set(OTHER_STATUSES.get(kind.error_type, ()))).add(
                kind.status
            )
    assert {
        row[0]: {int(status) for status in row[1].split(", ")} for row in table("README.md", "Refusals")
    } == statuses


def test_make_targets() -> None:
    """Every target of the Makefile is in README.md's list, and every `make ...` that a document names is a target."""
    targets = set(re.findall(r"^([a-z0-9-]+):.*## ", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for document in DOCUMENTS:
        code = "\n".join(
            re.findall(r"^```.*?^```$|`[^`\n]+`", read(document), flags=re.MULTILINE | re.DOTALL)
        )
        assert set(re.findall(r"\bmake ([a-z0-9-]+)", code)) <= targets, document
    rows = table("README.md", "Commands")
    assert {row[0].removeprefix("make ") for row in rows if row[0].startswith("make ")} == targets


@pytest.mark.parametrize("document", DOCUMENTS)
def test_modules(document: str) -> None:
    """Every `python -m ...` that a document names is a module that is there."""
    named = set(re.findall(r"python -m ([\w.]+)", read(document)))
    assert {name for name in named if importlib.util.find_spec(name) is None} == set()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_relative_links(document: str) -> None:
    """Every relative link leads to a file that is there, and its anchor to a heading of that file."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", CODE.sub("", read(document))):
        name, _, anchor = link.partition("#")
        path = (ROOT / document).parent / name if name else ROOT / document
        if "://" not in link and not (path.exists() and (not anchor or anchor in anchors(path))):
            broken.append(link)
    assert not broken


def test_readme_is_short() -> None:
    """README.md is for a newcomer: at most 250 lines; what is longer stands in the folders' own."""
    assert len(read("README.md").splitlines()) <= 250


@pytest.mark.parametrize(
    ("block", "headings"),
    [
        ("bench", order_cost._HEADINGS),
        ("bench-growth", growth._headings("orders stored")),
        ("loadtests", summary.HEADINGS),
        ("sensitivity", sensitivity.HEADINGS),
        ("bench-scrape", ()),
    ],
)
def test_figures_are_those_of_the_tools(block: str, headings: Sequence[str]) -> None:
    """The block that a measurement writes is there once, and its table has the form that it writes today."""
    content = marked_block.content_of(read("loadtests/README.md"), block)
    assert content
    if headings:
        assert marked_block.markdown_table(headings, []) in content


def test_every_list_is_found() -> None:
    """A heading that is renamed, or a table that loses its form, does not empty a check."""
    assert {"README.md", "app/README.md", "loadtests/README.md", "monitoring/README.md"} <= set(DOCUMENTS)
    for document, heading in (
        ("README.md", "Commands"),
        ("README.md", "Routes"),
        ("README.md", "Refusals"),
        ("app/README.md", "Settings"),
        ("monitoring/README.md", "Metrics"),
    ):
        names = [row[0] for row in table(document, heading)]
        assert len(names) > 5, heading
        assert len(names) == len(set(names)), f"{heading}: a name stands twice"


def read(document: str) -> str:
    return (ROOT / document).read_text()


def section(document: str, heading: str) -> str:
    """What stands under *heading* of *document*, without its blocks of code."""
    prose = CODE.sub("", read(document))
    found = re.search(rf"^## {heading}$(.*?)(?=^## |\Z)", prose, flags=re.MULTILINE | re.DOTALL)
    assert found is not None, f"{document} has no section {heading!r}"
    return found[1]


def table(document: str, heading: str) -> list[list[str]]:
    """The rows of the tables under *heading*, without backticks; those whose first cell is code."""
    rows = re.findall(r"^\| (`.+) \|$", section(document, heading), flags=re.MULTILINE)
    return [[cell.strip().strip("`") for cell in row.split("|")] for row in rows]


def anchors(path: Path) -> set[str]:
    """The anchors of the headings of the document at *path*; none where it is not one."""
    text = CODE.sub("", path.read_text()) if path.suffix == ".md" else ""
    return {slug(heading) for heading in re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)}


def default(value: Any) -> str:
    """A default as a user would write it into the environment."""
    if value is None:
        return "unset"
    return str(value).lower() if isinstance(value, bool) else str(value)


def slug(heading: str) -> str:
    """The anchor that a heading gets on GitHub."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
