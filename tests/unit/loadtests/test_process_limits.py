"""The limits that a process really has: its cgroup's where there is one, else the plan's, or what is told."""

import os
import socket
from pathlib import Path

import pytest

from loadtests.machine import limits
from loadtests.machine.limits import ProcessLimits, listening_on


def test_who_listens() -> None:
    """The process that listens on a port of this machine is found by it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert list(listening_on(port)) == [os.getpid()]
        url = f"http://127.0.0.1:{port}"
        assert ProcessLimits(url).so_far() == ProcessLimits("http://elsewhere", [os.getpid()]).so_far()
    assert list(listening_on(port)) == []


def test_elsewhere_the_plan_holds_unless_one_is_told() -> None:
    plan = ProcessLimits("http://shop.example").so_far()
    assert (plan.memory_bytes, plan.cpu_cores, plan.throttled_seconds) == (2 * 2**30, 1.0, None)
    told = ProcessLimits("http://shop.example", memory_bytes=2.0**29, cpu_cores=0.5).so_far()
    assert (told.memory_bytes, told.cpu_cores) == (2.0**29, 0.5)


@pytest.mark.parametrize(
    "files",
    [
        pytest.param(
            {
                "memory.max": "536870912",
                "cpu.max": "50000 100000",
                "cpu.stat": "usage_usec 9\nthrottled_usec 1500000",
            },
            id="v2",
        ),
        pytest.param(
            {
                "memory.limit_in_bytes": "536870912",
                "cpu.cfs_quota_us": "50000",
                "cpu.cfs_period_us": "100000",
                "cpu.stat": "nr_throttled 3\nthrottled_time 1500000000",
            },
            id="v1",
        ),
    ],
)
def test_a_cgroup(tmp_path: Path, files: dict[str, str]) -> None:
    """The tightest of a group and those around it."""
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    inner = tmp_path / "inner"
    inner.mkdir()
    (inner / "memory.max").write_text("max")
    folders = [inner, tmp_path]
    assert limits._memory_bytes(folders) == 2**29
    assert limits._cores(folders) == 0.5
    assert limits._throttled_seconds(folders) == 1.5


def test_a_group_without_limits(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("max")
    (tmp_path / "cpu.max").write_text("max 100000")
    folders = [tmp_path]
    assert (
        limits._memory_bytes(folders) is limits._cores(folders) is limits._throttled_seconds(folders) is None
    )
