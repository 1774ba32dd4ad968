"""The Locust files, run as their users run them: `locust` in a process of its own, in loadtests/."""

import collections
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.auth import new_key
from app.embedded_postgres import EmbeddedPostgres
from tests.support.order_api import Shop, open_shop
from tests.support.scripted_server import Peer, ScriptedServer

LOADTESTS = Path(__file__).resolve().parents[2] / "loadtests"

# A ledger as a runner would keep it: each process appends its records as they come.
LEDGER = """
import json, os
from loadtests.{module} import *
from loadtests.users.order_user import order_sinks

{extra}
out = open({path!r}, "a", buffering=1)
order_sinks.append(lambda record: out.write(json.dumps(record._asdict()) + "\\n"))
"""

one_and_two_processes = pytest.mark.parametrize(
    "processes",
    [
        pytest.param((), id="one-process"),
        pytest.param(("--processes", "2"), id="two-processes", marks=pytest.mark.slow),
    ],
)


@dataclass
class Run:
    """A finished `locust`: its exit code, what it said, Locust's statistics by (method, name)."""

    code: int
    said: str
    statistics: dict[tuple[str, str], dict[str, Any]]

    @property
    def first_line(self) -> str:
        return self.said.partition("\n")[0]


def environment(settings: Mapping[str, str] | None = None) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LOCUST", "LOADTEST"))}
    return {**kept, "PYTHONPATH": str(LOADTESTS.parent), **(settings or {})}


def locust(
    tmp_path: Path,
    arguments: str,
    *more_arguments: str,
    host: str,
    settings: Mapping[str, str] | None = None,
    file: str = "locustfile.py",
) -> Run:
    """Run it to its end, with *arguments* as typed."""
    report = tmp_path / "statistics.json"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "locust", "-f", file, "--headless", *arguments.split(), *more_arguments]
    finished = subprocess.run(
        [*command, "--json-file", str(report.with_suffix(""))],
        check=False,
        cwd=LOADTESTS,
        env=environment({"LOCUST_HOST": host, **(settings or {})}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
    )
    entries = json.loads(report.read_text()) if report.exists() else []
    statistics = {(entry["method"], entry["name"]): entry for entry in entries}
    return Run(finished.returncode, finished.stdout, statistics)


@pytest.fixture(scope="module")
def shop(postgres: EmbeddedPostgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    """A service that refuses no order for being late: these tests are not about this machine's speed."""
    with open_shop(
        postgres, tmp_path_factory.mktemp("shop"), BATCH_MAX_WAIT_SECONDS=30, REQUEST_DEADLINE_SECONDS=60
    ) as opened:
        yield opened


def answered(shop: Shop) -> dict[tuple[str, str], int]:
    """What the service counted: answers by (method, route)."""
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    for (name, labels), value in shop.service.metrics().items():
        if name == "http_requests_total":
            found = dict(labels)
            counts[found["method"], found["route"]] += int(value)
    return dict(counts)


@pytest.mark.parametrize(
    ("arguments", "first_line"),
    [
        pytest.param(
            "-u 100 -r 10 --run-time 5s",
            "loadtest: NormalLoadTest: 100 users are the plan's normal load",
            id="normal",
        ),
        pytest.param(
            "-u 500 -r 50 --run-time 5s",
            "loadtest: PeakLoadTest: 500 users are the plan's peak load",
            id="peak",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "-u 1000 -r 100 --run-time 5s",
            "loadtest: StressTest: 1000 users are the plan's stress load",
            id="stress",
        ),
        pytest.param(
            "-u 100 -r 50 --run-time 5s --processes 2",
            "loadtest: NormalLoadTest: 100 users are the plan's normal load",
            id="two-processes",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_plans_commands(arguments: str, first_line: str, shop: Shop, tmp_path: Path) -> None:
    """They say which profile they are and why, exit with 0, and count what the service counted, no more, no less."""
    before = answered(shop)
    stored = len(shop.sql("SELECT 1 FROM orders"))
    success = shop.service.metric("orders_total", status="success", error_type="")
    run = locust(tmp_path, arguments, host=shop.service.url)
    assert (run.first_line, run.code) == (first_line, 0), run.said
    assert set(run.statistics) == {("POST", "/orders")}  # users of one class, who only order
    orders = run.statistics["POST", "/orders"]
    assert orders["num_requests"] > 20
    assert orders["num_failures"] == 0
    after = answered(shop)
    assert orders["num_requests"] == after["POST", "/orders"] - before.get(("POST", "/orders"), 0)
    assert orders["num_requests"] == len(shop.sql("SELECT 1 FROM orders")) - stored
    assert (
        orders["num_requests"]
        == shop.service.metric("orders_total", status="success", error_type="") - success
    )
    assert sum(orders["response_times"].values()) == orders["num_requests"]


@pytest.mark.slow
def test_mixed_load(shop: Shop, tmp_path: Path) -> None:
    """Browsing, ordering, looking up and cancelling all happen, none fails, and the service counted the same."""
    before = answered(shop)
    run = locust(
        tmp_path,
        "-u 60 -r 60 --run-time 7s",
        host=shop.service.url,
        settings={"LOADTEST_PROFILE": "mixed"},
    )
    assert (run.first_line, run.code) == ("loadtest: MixedLoadTest: LOADTEST_PROFILE=mixed", 0), run.said
    after = answered(shop)
    routes = {
        ("POST", "/orders"): ("POST", "/orders"),
        ("POST", "/orders/{id}/cancel"): ("POST", "/orders/{order_id}/cancel"),
        ("GET", "/orders/{id}"): ("GET", "/orders/{order_id}"),
        ("GET", "/orders?customer_id="): ("GET", "/orders"),
        ("GET", "/products/{id}"): ("GET", "/products/{product_id}"),
    }
    for name, route in routes.items():
        assert run.statistics[name]["num_requests"] == after[route] - before.get(route, 0) > 0, name
    assert all(entry["num_failures"] == 0 for entry in run.statistics.values())


@pytest.mark.slow
@pytest.mark.parametrize("process", ["constant", "poisson"])
def test_the_open_model(process: str, shop: Shop, tmp_path: Path) -> None:
    """Orders come at the rate that was asked for, and the last line says how many of them were achieved."""
    before = answered(shop)
    run = locust(
        tmp_path,
        f"--rate 60 --arrivals {process} -u 40 -r 100 -t 5s",
        host=shop.service.url,
        file="open_model.py",
    )
    assert run.code == 0, run.said
    found = re.search(r"offered (\d+) arrivals in ([\d.]+) s .* achieved (\d+) ", run.said)
    assert found, run.said
    offered, seconds, achieved = int(found[1]), float(found[2]), int(found[3])
    requests = run.statistics["POST", "/orders"]["num_requests"]
    assert requests == answered(shop)["POST", "/orders"] - before.get(("POST", "/orders"), 0)
    assert achieved <= offered
    assert achieved <= requests <= achieved + 1  # one may have been about to start when the end came
    if process == "constant":
        assert offered == pytest.approx(60 * seconds, abs=5)


@pytest.mark.slow
def test_workers_of_the_open_model_share_the_rate(shop: Shop, tmp_path: Path) -> None:
    """Two processes offer the rate together, and the master reports the sum."""
    run = locust(
        tmp_path,
        "--rate 60 --arrivals constant -u 40 -r 100 -t 5s --processes 2",
        host=shop.service.url,
        file="open_model.py",
    )
    assert run.code == 0, run.said
    found = re.search(r"offered (\d+) arrivals in ([\d.]+) s", run.said)
    assert found, run.said
    assert int(found[1]) == pytest.approx(60 * float(found[2]), abs=10)


def write_ledger_file(tmp_path: Path, module: str = "locustfile", extra: str = "") -> tuple[Path, Path]:
    """A locustfile that keeps a ledger, and the ledger's path."""
    file, path = tmp_path / "with_ledger.py", tmp_path / "ledger.jsonl"
    file.write_text(LEDGER.format(module=module, path=str(path), extra=extra))
    return file, path


def read_ledger(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@one_and_two_processes
def test_the_ledger_is_what_was_stored(processes: Sequence[str], shop: Shop, tmp_path: Path) -> None:
    """Every order of the run is in the ledger with its id and key, and what it says acknowledged is stored."""
    file, path = write_ledger_file(tmp_path)
    arguments = f"NormalLoadTest -u 30 -r 30 -t 5s --run-id ledger{len(processes)}"
    run = locust(tmp_path, arguments, *processes, host=shop.service.url, file=str(file))
    assert (run.first_line, run.code) == ("loadtest: NormalLoadTest: named on the command line", 0), run.said
    records = read_ledger(path)
    stored = shop.sql(
        "SELECT id::text, idempotency_key FROM orders WHERE customer_id = %(id)s",
        {"id": f"loadtest-ledger{len(processes)}"},
    )
    assert stored
    assert sorted(stored) == sorted((record["order_id"], record["key"]) for record in records)
    assert {record["outcome"] for record in records} == {"acknowledged"}
    assert run.statistics["POST", "/orders"]["num_requests"] == len(records)
    mean_ms = sum(record["latency_seconds"] for record in records) / len(records) * 1000
    orders = run.statistics["POST", "/orders"]
    assert mean_ms == pytest.approx(orders["total_response_time"] / orders["num_requests"])


@pytest.mark.slow
def test_a_sold_out_shop_is_no_failure(shop: Shop, tmp_path: Path) -> None:
    """out_of_stock is a refusal that the shop has a right to: in a row of its own, no failure, exit code 0."""
    file, path = write_ledger_file(tmp_path)
    shop.sql("UPDATE products SET stock = 0")
    try:
        run = locust(tmp_path, "-u 10 -r 10 -t 3s", host=shop.service.url, file=str(file))
    finally:
        shop.sql("UPDATE products SET stock = 1000000000")
    assert run.code == 0, run.said
    assert set(run.statistics) == {("POST", "/orders [out_of_stock]")}
    assert {(record["status"], record["outcome"], record["error_type"]) for record in read_ledger(path)} == {
        (409, "refused", "out_of_stock")
    }


# A scripted service

PRODUCTS = {
    "items": [{"id": f"SKU-{number}", "price_cents": 100, "currency": "EUR"} for number in (1, 2)],
    "next_cursor": None,
}


def answer(status: int, document: object, *headers: str) -> bytes:
    body = json.dumps(document)
    head = [f"HTTP/1.1 {status} Said", f"Content-Length: {len(body)}", *headers]
    return ("\r\n".join(head) + "\r\n\r\n" + body).encode()


def problem(status: int, error_type: str, outcome: str) -> bytes:
    return answer(status, {"error_type": error_type, "outcome": outcome})


Turn = bytes | Callable[[bytes], bytes] | None


def created(order_id: str, *headers: str, **changes: object) -> Callable[[bytes], bytes]:
    """The answer to an order: the order itself, with *changes*."""

    def made(request: bytes) -> bytes:
        sent = json.loads(request.partition(b"\r\n\r\n")[2])
        items = [{**item, "unit_price_cents": 100} for item in sent["items"]]
        total = sum(item["quantity"] * 100 for item in items)
        order = {**sent, "id": order_id, "items": items, "total_cents": total, "currency": "EUR"}
        return answer(201, {**order, "status": "confirmed", **changes}, *headers)

    return made


class Turns:
    """A service that answers its n-th order, over whichever connection, with the n-th turn; then never again."""

    def __init__(self, *turns: Turn) -> None:
        self._turns = iter(turns)

    def __call__(self, peer: Peer) -> None:
        while True:
            request = peer.read()
            if request.startswith(b"GET /products"):
                peer.send(answer(200, PRODUCTS))
                continue
            try:
                turn = next(self._turns)
            except StopIteration:
                peer.wait_for_close()
                return
            if turn is None:
                peer.reset()
                return
            peer.send(turn(request) if callable(turn) else turn)


@pytest.mark.slow
def test_every_order_has_an_outcome(tmp_path: Path) -> None:
    """Whatever becomes of a request, its record says what is known of the order, and Locust what failed."""
    turns = (
        (created("o-1", "Location: /orders/o-1"), (201, "acknowledged", "", "o-1")),
        (created("o-2"), (201, "acknowledged", "", "o-2")),
        (created("o-3", "Location: /orders/o-4"), (201, "unknown", "wrong_answer", "o-3")),
        (answer(201, {}, "Location: /orders/o-1"), (201, "unknown", "wrong_answer", "")),
        (answer(201, {"id": "o-5"}), (201, "unknown", "wrong_answer", "")),
        (answer(201, ["not", "an", "order"]), (201, "unknown", "wrong_answer", "")),
        (created("o-6", items=[1, 2]), (201, "unknown", "wrong_answer", "")),
        (created("o-7", items=[]), (201, "unknown", "wrong_answer", "")),
        (created("o-8", total_cents=0), (201, "unknown", "wrong_answer", "")),
        (created("o-9", currency="USD"), (201, "unknown", "wrong_answer", "")),
        (created("o-9", customer_id="another"), (201, "unknown", "wrong_answer", "")),
        (created("o-9", status="lost"), (201, "unknown", "wrong_answer", "")),
        (problem(409, "out_of_stock", "not_executed"), (409, "refused", "out_of_stock", "")),
        (problem(422, "validation", "not_executed"), (422, "refused", "validation", "")),
        (problem(503, "overloaded", "not_executed"), (503, "refused", "overloaded", "")),
        (problem(504, "timeout", "unknown"), (504, "unknown", "timeout", "")),
        (problem(408, "timeout", "unknown"), (408, "unknown", "timeout", "")),
        (answer(502, "a gateway's page"), (502, "unknown", "http_502", "")),
        (answer(429, "a gateway's page"), (429, "refused", "http_429", "")),
        (answer(302, {}, "Location: /orders/elsewhere"), (302, "unknown", "http_302", "")),
        (answer(200, {"id": "o-3"}), (200, "unknown", "http_200", "")),
        (None, (0, "unknown", "reset", "")),
        (b"220 mail.example.org\r\n", (0, "unknown", "protocol", "")),
    )
    extra = "class One(NormalLoadTest):\n    wait_time = lambda self: 0\n"
    file, path = write_ledger_file(tmp_path, extra=extra)
    with ScriptedServer(Turns(*(sent for sent, _ in turns))) as server:
        run = locust(
            tmp_path,
            "One -u 1 -t 3s --stop-timeout 1",
            host=server.url,
            file=str(file),
            settings={"LOADTEST_API_KEY": "the-key"},
        )
    records = read_ledger(path)
    found = [(each["status"], each["outcome"], each["error_type"], each["order_id"]) for each in records]
    assert found == [*(expected for _, expected in turns), (0, "unknown", "cut_off", "")]
    orders = [request for request in server.requests if request.startswith(b"POST /orders ")]
    assert len(orders) == len(records)  # each was sent once
    assert len({record["key"] for record in records}) == len(records)
    for request, record in zip(orders, records, strict=True):
        head, _, body = request.partition(b"\r\n\r\n")
        assert f"\r\nIdempotency-Key: {record['key']}".encode() in head
        assert b"\r\nAuthorization: Bearer the-key\r\n" in head
        assert json.loads(body)["customer_id"].startswith("loadtest-")
        assert {item["product_id"] for item in json.loads(body)["items"]} <= {"SKU-1", "SKU-2"}
    assert run.code == 1
    assert run.statistics["POST", "/orders [out_of_stock]"]["num_failures"] == 0
    assert run.statistics["POST", "/orders"]["num_failures"] == 20
    assert run.statistics["POST", "/orders"]["num_requests"] == 22


@pytest.mark.slow
def test_an_answer_that_is_too_late_leaves_the_order_unknown(tmp_path: Path) -> None:
    """A user gives up after its timeout, and the record says that nobody knows what became of the order."""
    extra = "class Hasty(NormalLoadTest):\n    timeout_seconds = 0.3\n"
    file, path = write_ledger_file(tmp_path, extra=extra)
    with ScriptedServer(Turns()) as server:
        run = locust(tmp_path, "Hasty -u 1 -t 2s", host=server.url, file=str(file))
    record = read_ledger(path)[0]
    assert (record["status"], record["outcome"], record["error_type"]) == (0, "unknown", "client_timeout")
    assert record["latency_seconds"] >= 0.3
    assert run.code == 1


@pytest.mark.slow
@one_and_two_processes
def test_orders_in_flight_finish_at_the_end(processes: Sequence[str], tmp_path: Path) -> None:
    """Without a stop timeout of one's own, an order that is on its way when the time is up gets its answer."""

    def slow(peer: Peer) -> None:
        while True:
            if (request := peer.read()).startswith(b"GET"):
                peer.send(answer(200, PRODUCTS))
            else:
                time.sleep(3)  # longer than the test runs
                peer.send(created("o-1")(request))

    file, path = write_ledger_file(tmp_path)
    with ScriptedServer(slow) as server:
        run = locust(tmp_path, "-u 2 -r 2 -t 2s", *processes, host=server.url, file=str(file))
    assert [record["outcome"] for record in read_ledger(path)] == ["acknowledged"] * 2
    assert run.statistics["POST", "/orders"]["num_requests"] == 2, run.said
    assert run.code == 0


@pytest.mark.slow
def test_latency_counts_from_when_an_order_should_have_started(tmp_path: Path) -> None:
    """One worker that is given 50 orders a second and ten answers a second: the backlog is in the latencies."""

    def slow(peer: Peer) -> None:
        while True:
            if (request := peer.read()).startswith(b"GET"):
                peer.send(answer(200, PRODUCTS))
            else:
                time.sleep(0.1)
                peer.send(created("o-1")(request))

    file, path = write_ledger_file(tmp_path, module="open_model")
    with ScriptedServer(slow) as server:
        run = locust(
            tmp_path,
            "--rate 50 --arrivals constant -u 1 -r 1 -t 4s",
            host=server.url,
            file=str(file),
        )
    records = read_ledger(path)
    assert len(records) > 10
    for number, record in enumerate(records[:-1]):
        # The order due after number/50 s cannot start before number answers of 0.1 s each.
        assert record["late_seconds"] >= number * 0.08 - 0.01
        assert record["latency_seconds"] >= record["late_seconds"] + 0.1
    assert [record["started_at"] - records[0]["started_at"] for record in records] == pytest.approx(
        [number / 50 for number in range(len(records))], abs=0.02
    )
    found = re.search(r"offered (\d+) arrivals .* achieved (\d+) ", run.said)
    assert found, run.said
    assert int(found[1]) > 3 * int(found[2])
    longest_ms = max(record["latency_seconds"] for record in records) * 1000
    assert run.statistics["POST", "/orders"]["max_response_time"] == pytest.approx(longest_ms)


# What cannot run


@pytest.mark.slow
def test_a_wrong_api_key_stops_the_test(postgres: EmbeddedPostgres, tmp_path: Path) -> None:
    """Without a valid key nothing is sent but one question, and the exit code says that it could not run."""
    token, entry = new_key("loadtest")
    with open_shop(postgres, tmp_path / "service", token=token, API_KEYS=entry) as shop:
        arguments = "-u 2 -r 2 -t 2s"
        refused = locust(
            tmp_path, arguments, host=shop.service.url, settings={"LOADTEST_API_KEY": "not-the-key"}
        )
        assert refused.code == 2, refused.said
        assert f"no products from {shop.service.url}: 401 unauthorized" in refused.said
        accepted = locust(tmp_path, arguments, host=shop.service.url, settings={"LOADTEST_API_KEY": token})
        assert accepted.code == 0, accepted.said
        assert accepted.statistics["POST", "/orders"]["num_requests"] > 0


@one_and_two_processes
def test_nobody_there(processes: Sequence[str], tmp_path: Path) -> None:
    """A target that does not answer is named, and no exit code says that all went well."""
    with socket.create_server(("127.0.0.1", 0)) as closed_at_once:
        port = closed_at_once.getsockname()[1]
    run = locust(tmp_path, "-u 2 -r 2 -t 2s", *processes, host=f"http://127.0.0.1:{port}")
    assert run.code == (1 if processes else 2), run.said
    assert f"no products from http://127.0.0.1:{port}: Connection refused" in run.said


@pytest.mark.slow
def test_an_empty_catalogue(tmp_path: Path) -> None:
    """A shop that sells nothing cannot be tested."""

    def sells_nothing(peer: Peer) -> None:
        peer.read()
        peer.send(answer(200, {"items": [], "next_cursor": None}))

    with ScriptedServer(sells_nothing) as server:
        run = locust(tmp_path, "-u 1 -t 2s", host=server.url)
    assert run.code == 2
    assert "the catalogue is empty" in run.said


def test_a_misspelt_profile(tmp_path: Path) -> None:
    """LOADTEST_PROFILE with a typing error starts nothing."""
    run = locust(tmp_path, "-u 1 -t 2s", host="http://127.0.0.1:1", settings={"LOADTEST_PROFILE": "peek"})
    assert run.code == 2
    assert "LOADTEST_PROFILE=peek: it is one of normal, peak, stress, mixed" in run.said


# The choice

NO_NUMBER = "NormalLoadTest: no number of users was given (100 normal, 500 peak, 1000 stress)"
CHOICES = [
    ("--headless -u 100", "", "NormalLoadTest: 100 users are the plan's normal load"),
    ("--headless -u 500", "", "PeakLoadTest: 500 users are the plan's peak load"),
    ("--headless -u 1000", "", "StressTest: 1000 users are the plan's stress load"),
    (
        "--headless -u 7",
        "",
        "NormalLoadTest: 7 users are none of the plan's loads (100 normal, 500 peak, 1000 stress)",
    ),
    (
        "--headless",
        "",
        "NormalLoadTest: 1 users are none of the plan's loads (100 normal, 500 peak, 1000 stress)",
    ),
    ("--headless -u 100", "Stress", "StressTest: LOADTEST_PROFILE=stress"),
    ("--headless -u 100 PeakLoadTest", "stress", "PeakLoadTest: named on the command line"),
    ("--headless -u 100 PeakLoadTest StressTest", "", "PeakLoadTest, StressTest: named on the command line"),
    (
        "",
        "",
        f"{NO_NUMBER}; the web interface's number of users chooses anew",
    ),
    ("", "peak", "PeakLoadTest: LOADTEST_PROFILE=peak"),
    ("--worker", "", "a worker runs what its master chooses"),
    ("--class-picker", "", "the user class is chosen in the web interface"),
]

DESCRIBE = """
import json, os, sys
from locust.argument_parser import get_parser
from loadtests import locustfile
said = []
for arguments, profile, _ in json.load(sys.stdin):
    os.environ["LOADTEST_PROFILE"] = profile
    said.append(locustfile.describe_choice(get_parser().parse_args(arguments.split())))
classes = [locustfile.NormalLoadTest, locustfile.PeakLoadTest, locustfile.StressTest, locustfile.MixedLoadTest]
waits = {each.__name__: [each.wait_time(None) for _ in range(1000)] for each in classes}
hosts = [each.host for each in classes]
json.dump({"said": said, "waits": waits, "hosts": hosts}, sys.stdout)
"""


def test_the_choice_and_its_reason() -> None:
    """Class names win over LOADTEST_PROFILE, which wins over the number of users; waits and host are the plan's."""
    finished = subprocess.run(
        [sys.executable, "-c", DESCRIBE],
        input=json.dumps(CHOICES),
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(finished.stdout)
    assert found["said"] == [f"loadtest: {expected}" for _, _, expected in CHOICES]
    assert set(found["hosts"]) == {"http://localhost:8000"}
    for name, (least, most) in {
        "NormalLoadTest": (1, 2),
        "PeakLoadTest": (0.2, 0.4),
        "StressTest": (0.05, 0.1),
        "MixedLoadTest": (1, 2),
    }.items():
        waits = found["waits"][name]
        assert least <= min(waits) < least + (most - least) / 10
        assert most - (most - least) / 10 < max(waits) <= most


@pytest.mark.slow
def test_the_web_interface(shop: Shop, tmp_path: Path) -> None:
    """The number of users entered there chooses, for each test anew, and orders flow."""
    with socket.create_server(("127.0.0.1", 0)) as closed_at_once:
        port = closed_at_once.getsockname()[1]
    log = tmp_path / "locust.log"
    command = [sys.executable, "-m", "locust", "-f", "locustfile.py", "--web-host", "127.0.0.1"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--web-port", str(port)],
            cwd=LOADTESTS,
            env=environment({"LOCUST_HOST": shop.service.url}),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        with httpx.Client(
            base_url=f"http://127.0.0.1:{port}",
            timeout=20,
            transport=httpx.HTTPTransport(),
        ) as web:
            _until(lambda: _is_up(web), process)
            assert "text/html" in web.get("/").headers["content-type"]
            for users, user_class in ((500, "PeakLoadTest"), (100, "NormalLoadTest")):
                form = {"user_count": str(users), "spawn_rate": "50", "host": shop.service.url}
                assert web.post("/swarm", data=form).json()["success"]
                _until(lambda: web.get("/stats/requests").json()["total_rps"] > 0, process)
                assert f"{user_class}: {users} users are the plan's" in log.read_text()
                assert web.post("/stop", data={}).json()["success"]
            assert web.get("/stats/requests").json()["fail_ratio"] == 0
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    said = log.read_text()
    assert said.startswith("loadtest: NormalLoadTest: no number of users was given")
    assert said.count("loadtest: ") == 1


def _is_up(web: httpx.Client) -> bool:
    try:
        return web.get("/").status_code == 200
    except httpx.TransportError:
        return False


def _until(condition: Any, process: subprocess.Popen[bytes]) -> None:
    give_up_at = time.monotonic() + 30
    while not condition():
        assert process.poll() is None
        assert time.monotonic() < give_up_at
        time.sleep(0.05)
