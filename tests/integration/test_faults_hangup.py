"""A terminal that is closed ends what runs in it as SIGTERM does, and what runs under nohup not at all."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from app.embedded_postgres import EmbeddedPostgres
from tests.support.order_api import new_order
from tests.support.service_process import ServiceProcess


def test_sighup_drains_the_service(start_service: Callable[..., ServiceProcess]) -> None:
    """Not ready, still serving for DRAIN_DELAY_SECONDS, and 0 at the end; a shell's second SIGHUP changes nothing."""
    service = start_service(DRAIN_DELAY_SECONDS=1)
    with service.client() as client:
        assert client.get("/readyz").status_code == 200
        asked_at = time.monotonic()
        service.process.send_signal(signal.SIGHUP)
        time.sleep(0.2)
        service.process.send_signal(signal.SIGHUP)
        assert client.get("/readyz").status_code == 503
        placed = client.post("/orders", json=new_order(("SKU-0001", 1)))
        assert (placed.status_code, placed.headers["connection"]) == (201, "close")
    assert service.process.wait(30) == 0
    assert time.monotonic() - asked_at >= 1


def test_a_service_under_nohup_serves_on(tmp_path: Path, database_url: str) -> None:
    """Who starts with SIGHUP ignored wants it ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        service = ServiceProcess(tmp_path, database_url).start()
    finally:
        signal.signal(signal.SIGHUP, before)
    try:
        service.process.send_signal(signal.SIGHUP)
        time.sleep(0.3)
        assert httpx.get(f"{service.url}/readyz").status_code == 200
        assert service.terminate() == 0
    finally:
        service.kill()


def test_sighup_ends_an_embedded_postgres_that_runs_alone(
    tmp_path: Path, postgres_bin_dir: Path | None
) -> None:
    """`python -m app.embedded_postgres` shuts its server down, and leaves no process behind."""
    directory = tmp_path / "postgres"
    options = [] if postgres_bin_dir is None else ["--bin-dir", str(postgres_bin_dir)]
    with subprocess.Popen(
        [sys.executable, "-m", "app.embedded_postgres", str(directory), *options],
        stdout=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        assert process.stdout
        assert process.stdout.readline().startswith(b"postgresql://")
        os.kill(process.pid, signal.SIGHUP)
        assert process.wait(30) == 0
    assert EmbeddedPostgres(directory).processes() == []
    assert "database system is shut down" in (directory / "postgres.log").read_text()


@pytest.mark.parametrize("module", ["loadtests.machine.processes", "loadtests.running.interruption"])
def test_sighup_is_an_end_that_load_tests_clean_up_after(tmp_path: Path, module: str) -> None:
    """What they started ends, and their scratch directory goes, as after Ctrl-C: their children outlive a terminal."""
    script = {
        "loadtests.machine.processes": (
            "import time\n"
            "from loadtests.machine.processes import child, scratch_directory\n"
            "with scratch_directory() as folder, child(['sleep', '60']) as process:\n"
            "    print(folder, process.pid, flush=True)\n"
            "    time.sleep(60)\n"
        ),
        "loadtests.running.interruption": (
            "import time\n"
            "from loadtests.machine.processes import child, scratch_directory\n"
            "from loadtests.running.interruption import Interruption\n"
            "with scratch_directory() as folder, child(['sleep', '60']) as process:\n"
            "    interruption = Interruption()\n"
            "    with interruption.handled():\n"
            "        print(folder, process.pid, flush=True)\n"
            "        while not interruption.asked:\n"
            "            time.sleep(0.05)\n"
        ),
    }[module]
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        assert process.stdout
        folder, pid = process.stdout.readline().split()
        os.kill(process.pid, signal.SIGHUP)
        process.wait(30)
    assert not Path(folder.decode()).exists()
    assert not Path("/proc", pid.decode()).exists()
