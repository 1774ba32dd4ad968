import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from loadtests.bench import growth, order_cost, process_stats, request_cost
from tests.support.service_process import ServiceProcess

_ROOT = Path(__file__).parents[2]


def _bench(contestant: order_cost.Contestant, output: Path) -> int:
    arguments = ["--rounds", "1", "--seconds", "0.5", "--connections", "2", "--output", str(output)]
    return order_cost.main(arguments, [contestant])


def test_a_lying_contestant_is_caught(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Where an acknowledged order is not in the database the benchmark says so, fails, and keeps no figures."""
    assert _bench(order_cost.Contestant("liar", "tests.support.lying_peer"), tmp_path / "out") == 1
    assert re.search(r"\d+ acknowledged orders are not in the database", capfd.readouterr().out)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name",
    [
        "service",
        pytest.param("three_replicas", marks=pytest.mark.slow),
        pytest.param("per_request", marks=pytest.mark.slow),
        pytest.param("sqlalchemy_asyncpg", marks=pytest.mark.slow),
    ],
)
def test_an_honest_contestant_is_measured(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Every contestant's acknowledged orders are in the database, and its cost is split in two."""
    (contestant,) = [c for c in order_cost.CONTESTANTS if c.name == name]
    assert _bench(contestant, tmp_path) == 0
    (row,) = json.loads((tmp_path / "bench.json").read_text())["summary"]
    assert (row["missing"], row["refused"], row["broken"]) == (0, 0, 0)
    assert row["service_us"] > 0
    assert row["postgres_us"] > 0
    assert {path.name for path in tmp_path.iterdir()} == {"bench.json", "bench.md", "bench.png", "bench.svg"}


def test_a_contestant_that_does_not_start_ends_the_run(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """What a contestant said before it gave up is shown."""
    assert _bench(order_cost.Contestant("absent", "tests.no_such_peer"), tmp_path) == 1
    assert "No module named tests.no_such_peer" in capfd.readouterr().out


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A temporary directory whose name leaves room for that of a Unix socket."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.mark.parametrize(
    "signal_number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_nothing_is_left_of_a_run_that_was_stopped(signal_number: int, short_path: Path) -> None:
    """Ctrl-C in the middle of a round ends every process that was started, and removes their files."""
    command = [
        sys.executable,
        "-m",
        "loadtests.bench.order_cost",
        "--only",
        "echo",
        "--rounds",
        "1",
        "--connections",
        "2",
    ]
    with subprocess.Popen(
        [*command, "--seconds", "60", "--output", str(short_path / "out")],
        cwd=_ROOT,
        env={**os.environ, "TMPDIR": str(short_path)},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout
        assert any("round 1" in line for line in iter(process.stdout.readline, ""))
        started = process_stats.process_tree(process.pid)
        assert len(started) > 3  # itself, the echo, the Postgres and its processes
        os.killpg(process.pid, signal_number)  # as a terminal does
        rest, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert rest.endswith("stopped\n")
    assert [pid for pid in started if Path(f"/proc/{pid}").exists()] == []
    assert list(short_path.iterdir()) == []


def test_stored_orders_have_the_form_the_service_writes(
    start_service: Callable[..., ServiceProcess], database_url: str
) -> None:
    """Orders put straight into the table are read, paged and summed as if the service had stored them."""
    service = start_service(dsn=database_url)
    growth.store_orders(database_url, 250, on_insert=lambda _: None)
    with service.client() as client:
        first = client.get("/orders", params={"limit": 100}).json()
        second = client.get("/orders", params={"limit": 100, "cursor": first["next_cursor"]}).json()
        orders = first["items"] + second["items"]
        assert len({order["id"] for order in orders}) == 200
        assert orders == sorted(orders, key=lambda order: order["created_at"], reverse=True)
        for order in orders:
            prices = {item["product_id"]: item["unit_price_cents"] for item in order["items"]}
            assert len(prices) == 2
            assert order["total_cents"] == sum(i["quantity"] * i["unit_price_cents"] for i in order["items"])
            assert uuid.UUID(order["id"]).version == 7
            assert client.get(f"/orders/{order['id']}").json() == order
        for product_id, price_cents in prices.items():
            assert client.get(f"/products/{product_id}").json()["price_cents"] == price_cents
        page = client.get("/orders", params={"customer_id": orders[0]["customer_id"], "limit": 100}).json()[
            "items"
        ]
        assert len(page) == 100


def _make(target: str, *arguments: str) -> str:
    """What `make TARGET` prints; -o: the environment is there already."""
    command = ["make", "-o", ".venv/.installed-dev", f"BIN={Path(sys.executable).parent}", target, *arguments]
    run = subprocess.run(command, cwd=_ROOT, check=False, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_make_bench_compares_all_contestants(tmp_path: Path) -> None:
    """`make bench QUICK=1` prints every contestant at every load and every request in 100 columns, and the targets."""
    printed = _make("bench", "QUICK=1", f"ARGS=--output {tmp_path}")
    assert "…" not in printed
    for contestant in order_cost.CONTESTANTS:
        assert len(re.findall(rf"^{contestant.name} .*\)\s+\d+$", printed, re.MULTILINE)) == 3
    for kind in request_cost.KINDS:
        assert len(re.findall(rf"^{re.escape(kind.name)} .*\)$", printed, re.MULTILINE)) == 1
    assert len(re.findall(r"^(?:NOT )?reached: ", printed, re.MULTILINE)) == 5 + 4


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_make_profile_leaves_a_page_and_compares_two(tmp_path: Path) -> None:
    """`make profile` finds the order path on the CPU, in the stages and in memory, and puts it all in one page."""
    _make("profile", "QUICK=1", f"ARGS=--output {tmp_path / 'one'}")
    printed = _make("profile", "QUICK=1", f"BASELINE={tmp_path / 'one'}", f"ARGS=--output {tmp_path / 'two'}")
    assert "difference" in printed
    profile = json.loads((tmp_path / "two/profile.json").read_text())
    assert any(name.startswith("OrderIntake.create_order (app/intake.py") for name in profile["functions"])
    assert all(profile["stages_us"].values())
    assert len(profile["event_loop_lag_ms"]) > 2
    assert any(ours.startswith("app/") for _, ours, *_ in profile["allocations"]["lines"])
    page = (tmp_path / "two/index.html").read_text()
    assert page.count("data:image/svg+xml;base64,") == 3
    assert not re.search(r"""(?:src|href)=["'](?!data:)""", page)  # it needs nothing but itself


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_make_bench_growth_measures_sizes_lines_and_a_soak(tmp_path: Path) -> None:
    """`make bench-growth QUICK=1` measures every workload at every size and length, and soaks."""
    _make("bench-growth", "QUICK=1", "SOAK=2", f"ARGS=--output {tmp_path}")
    report = json.loads((tmp_path / "growth.json").read_text())
    assert len(report["growth"]) == 4 * 2
    assert len(report["lines"]) == 3 * 3
    assert report["soak"]["orders"] > 0
    assert sum(row["refused"] for row in report["growth"] + report["lines"]) == 0
