import contextlib
import subprocess
import sys
from collections.abc import Iterator

import pytest

from loadtests.bench import process_stats

# Burns half a second in a child that ends, half a second itself, tells what it took, and waits.
_BURN = """
import os, subprocess, sys, time
def burn():
    ends_at = time.process_time() + 0.5
    while time.process_time() < ends_at: pass
if sys.argv[1:] == ["child"]:
    burn()
else:
    open("/proc/self/comm", "w").write("x) 9 (y 8")  # a name that makes /proc/PID/stat hard to read
    subprocess.run([sys.executable, __file__, "child"], check=True)
    burn()
    times = os.times()
    print(sum(times[:4]), flush=True)
    input()
"""


@pytest.fixture
def burnt(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, float]]:
    """A process that has burnt about a second of CPU and now waits, and how much it was."""
    script = tmp_path_factory.mktemp("burn") / "burn.py"
    script.write_text(_BURN)
    command = [sys.executable, str(script)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        yield process.pid, float(process.stdout.readline())
        with contextlib.suppress(BrokenPipeError):
            process.communicate("\n")


def test_cpu_seconds_holds_what_a_process_and_its_ended_children_burnt(burnt: tuple[int, float]) -> None:
    """The CPU of a tree is that of its processes, those that have ended included."""
    pid, seconds = burnt
    assert seconds >= 1.0
    assert process_stats.cpu_seconds(pid) == pytest.approx(seconds, abs=0.1)


def test_cpu_seconds_holds_what_live_children_burnt() -> None:
    """The CPU of a tree holds that of children that are still alive."""
    burn = "import time\nwhile time.process_time() < 0.5: pass\nprint(flush=True); input()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {burn!r}])"
    command = [sys.executable, "-c", parent]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        process.stdout.readline()
        assert len(process_stats.process_tree(process.pid)) == 2
        assert process_stats.cpu_seconds(process.pid) >= 0.45
        assert process_stats.resident_bytes(process.pid) > 5 * 2**20
        process.communicate("\n")


def test_a_process_that_is_gone_costs_nothing() -> None:
    """Asking for a process that has ended raises nothing."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    assert process_stats.cpu_seconds(process.pid) == 0
    assert process_stats.resident_bytes(process.pid) == 0
