"""`make run` on a fresh machine: from a clean checkout to a stored order, for root and for anybody else."""

import contextlib
import itertools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import httpx
import pytest

from tests.support.order_client import OrderRequest
from tests.support.traffic import Traffic, acknowledged

PROJECT = Path(__file__).parents[2]
NOBODY = 65534
ACCOUNTS = {
    "ordinary-user": ("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--"),
    "root": (),
}
MEMORY_LIMIT_MIB = 150

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        sys.platform != "linux" or not Path("/usr/bin/make").exists(), reason="needs Linux and /usr/bin/make"
    ),
]


class Checkout:
    """A clean copy of the tree, in a directory and with a home of its own, used by one account."""

    def __init__(self, directory: Path, account: tuple[str, ...]) -> None:
        self.directory = directory / "order-service"
        self.home = directory / "home"
        self._account = account
        self._outputs = (directory / f"output-{n}.log" for n in itertools.count())
        for path in files_of_the_tree():
            target = self.directory / path
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(PROJECT / path, target, follow_symlinks=False)
        self.home.mkdir()
        directory.chmod(0o755)
        if account:
            for path in [self.home, self.directory, *self.directory.rglob("*")]:
                os.lchown(path, NOBODY, NOBODY)

    def make(self, *arguments: str) -> "Make":
        """Start `make` as a terminal does: in a process group of its own."""
        output = next(self._outputs)
        environment = {
            "PATH": "/usr/bin:/bin",  # so it is the system's Python
            "HOME": str(self.home),
            # Where this machine finds packages is its own affair.
            **{name: value for name, value in os.environ.items() if name.startswith("PIP_")},
            "PIP_CACHE_DIR": str(self.home / "pip-cache"),
        }
        return Make([*self._account, "make", *arguments], self.directory, environment, output)

    def processes(self) -> dict[int, str]:
        """Every live process that works in, or was started with a path of, the checkout."""
        found = {}
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError):
                pid, command = int(entry.name), (entry / "cmdline").read_bytes().decode(errors="replace")
                inside = (entry / "cwd").readlink().is_relative_to(self.directory)
                if command and (inside or str(self.directory) in command):
                    found[pid] = command.replace("\0", " ")
        return found


class Make:
    """A `make` that runs."""

    def __init__(
        self, command: list[str], directory: Path, environment: Mapping[str, str], output_path: Path
    ) -> None:
        self._output_path = output_path
        self.started_at = time.monotonic()
        with output_path.open("wb") as output:
            self.process = subprocess.Popen(
                command,
                cwd=directory,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        """What it has said so far."""
        return self._output_path.read_text()

    def url(self, timeout_seconds: float = 300) -> str:
        """Where the service listens, once it does."""
        give_up_at = time.monotonic() + timeout_seconds
        while (ready := re.search(r"order service on (http\S+)", self.output)) is None:
            assert self.process.poll() is None, self.output
            assert time.monotonic() < give_up_at, self.output
            time.sleep(0.01)
        return ready[1]

    def interrupt(self) -> int:
        """Ctrl-C: SIGINT to the process group; the exit code."""
        os.killpg(self.process.pid, signal.SIGINT)
        return self.process.wait(30)

    def service_pid(self) -> int:
        """The service's process, which is make's child."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(children[0])


def files_of_the_tree() -> list[Path]:
    """What a clone would hold, were everything committed that is not ignored."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=PROJECT, check=True, capture_output=True
    )
    paths = [Path(os.fsdecode(name)) for name in listed.stdout.split(b"\0") if name]
    return [path for path in paths if (PROJECT / path).exists()]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(condition: Callable[[], object], seconds: float = 30) -> None:
    give_up_at = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up_at, "the awaited condition did not come about"
        time.sleep(0.02)


def place_order(url: str) -> str:
    """The path of an order that was acknowledged."""
    answer = httpx.post(f"{url}/orders", json=OrderRequest((("SKU-0001", 2),)).document(), timeout=30)
    assert answer.status_code == 201, answer.text
    return str(answer.headers["location"])


def report(measured: str) -> None:
    """Say what was measured; `pytest -rP` shows it."""
    sys.stdout.write(f"{measured}\n")


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def status_of(url: str) -> int:
    return httpx.get(url, timeout=30).status_code


@pytest.fixture(scope="module", params=list(ACCOUNTS))
def checkout(request: pytest.FixtureRequest) -> Iterator[Checkout]:
    """A fresh checkout for each account, installed by its first `make run`."""
    account = ACCOUNTS[request.param]
    if os.geteuid() != 0 and request.param == "root":
        pytest.skip("these tests do not run as root")
    directory = Path(tempfile.mkdtemp(prefix="order-service-", dir="/tmp"))
    checkout = Checkout(directory, account if os.geteuid() == 0 else ())
    try:
        yield checkout
    finally:
        for pid in checkout.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not checkout.processes())
        shutil.rmtree(directory)


def test_make_run_alone_sets_up_and_serves(checkout: Checkout) -> None:
    """`make run` on a fresh checkout installs, serves an order, and Ctrl-C ends everything it has started."""
    port = free_port()
    run = checkout.make("run", f"PORT={port}")
    url = run.url(timeout_seconds=500)
    report(f"installed and ready in {time.monotonic() - run.started_at:.1f} s")
    assert url == f"http://127.0.0.1:{port}"
    place_order(url)
    run.interrupt()
    # The rest of the output is the log: no line of it says that something went wrong.
    assert not re.search(r"Traceback|\b(warning|error|critical)\b", run.output, re.IGNORECASE), run.output
    assert checkout.processes() == {}
    with pytest.raises(httpx.ConnectError):
        httpx.get(url)


def test_first_start_after_the_installation(checkout: Checkout) -> None:
    """Once installed, a first start makes its database and serves; how long it takes is recorded."""
    run = checkout.make("run", f"PORT={free_port()}", "EMBEDDED_POSTGRES_DIR=.data/other")
    url = run.url()
    report(f"first start after the installation in {time.monotonic() - run.started_at:.2f} s")
    place_order(url)
    run.interrupt()
    assert checkout.processes() == {}


def test_next_run_keeps_the_data(checkout: Checkout) -> None:
    """An order of one `make run` is there in the next one."""
    first = checkout.make("run", f"PORT={free_port()}")
    order = place_order(first.url())
    first.interrupt()
    second = checkout.make("run", f"PORT={free_port()}")
    assert status_of(second.url() + order) == 200
    second.interrupt()
    assert checkout.processes() == {}


def test_killed_service_keeps_the_data(checkout: Checkout) -> None:
    """After `kill -9` of the service its Postgres ends too, and the next `make run` has every acknowledged order."""
    killed = checkout.make("run", f"PORT={free_port()}")
    url = killed.url()
    orders = [place_order(url) for _ in range(20)]
    os.kill(killed.service_pid(), signal.SIGKILL)
    assert killed.process.wait(30) != 0
    wait_until(lambda: not checkout.processes())
    again = checkout.make("run", f"PORT={free_port()}")
    url = again.url()
    assert {status_of(url + order) for order in orders} == {200}
    place_order(url)
    again.interrupt()
    assert checkout.processes() == {}


def test_taken_port_is_one_clear_line(checkout: Checkout) -> None:
    """With the port taken it says so in one line, exits with an error, and harms nobody."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        run = checkout.make("run", f"PORT={port}")
        assert run.process.wait(60) != 0
    lines = [line for line in run.output.splitlines() if not line.startswith("make: ")]
    assert len(lines) == 1, run.output
    assert lines[0].startswith("order service: PORT: ")
    assert str(port) in lines[0]
    assert checkout.processes() == {}


def test_second_run_says_how_to_join_the_first(checkout: Checkout) -> None:
    """A second `make run` beside the first, says in one line how to share its database; with that it runs."""
    first = checkout.make("run", f"PORT={free_port()}")
    order = place_order(first.url())
    second = checkout.make("run", f"PORT={free_port()}")
    assert second.process.wait(60) != 0
    lines = [line for line in second.output.splitlines() if not line.startswith("make: ")]
    assert len(lines) == 1, second.output
    dsn = re.search(r"DATABASE_URL='([^']+)'", lines[0])
    assert dsn is not None, lines[0]
    joined = checkout.make("run", f"PORT={free_port()}", f"DATABASE_URL={dsn[1]}")
    assert status_of(joined.url() + order) == 200
    joined.interrupt()
    place_order(first.url())
    first.interrupt()
    assert checkout.processes() == {}


def test_replicas_on_one_port(checkout: Checkout) -> None:
    """`make run REPLICAS=3`: a line for each, one database, and one Ctrl-C ends them all."""
    run = checkout.make("run", "REPLICAS=3", f"PORT={free_port()}", "OPS_PORT=0")
    url = run.url()
    orders = [place_order(url) for _ in range(12)]
    pages = re.findall(r"^replica \d on (\S+)   operations (\S+)", run.output, re.MULTILINE)
    assert {api for api, _ in pages} == {url}
    assert [httpx.get(f"{page}/readyz").status_code for _, page in pages] == [200] * 3
    assert {status_of(url + order) for order in orders} == {200}
    run.interrupt()
    assert not re.search(r"Traceback|\b(warning|error|critical)\b", run.output, re.IGNORECASE), run.output
    assert checkout.processes() == {}


async def test_memory_under_load(checkout: Checkout) -> None:
    """A service that takes 200 orders a second stays small."""
    run = checkout.make("run", f"PORT={free_port()}")
    url = run.url()
    async with Traffic(url, orders_per_second=200, reads_per_second=100) as traffic:
        await traffic.until(lambda: len(acknowledged(traffic.orders)) >= 2000, 60)
    resident = resident_bytes(run.service_pid())
    report(f"{resident / 2**20:.0f} MiB resident under load")
    run.interrupt()
    assert resident / 2**20 < MEMORY_LIMIT_MIB
