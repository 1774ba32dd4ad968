"""Signs that the machine changed during a run."""

from pathlib import Path

import pytest

from loadtests.machine import calibration
from loadtests.machine.calibration import CpuTimes


def test_stolen_time_is_a_share_of_all_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stolen time is the eighth column, as the kernel counts it; guests are not counted twice."""
    pages = iter(["cpu  10 1 4 80 2 1 2 0 5 0\ncpu0 1", "cpu  20 1 14 150 2 1 2 10 9 0\ncpu0 2"])
    monkeypatch.setattr(Path, "read_text", lambda self: next(pages))
    before, after = calibration.cpu_times(), calibration.cpu_times()
    assert before == CpuTimes(0, 100)
    assert after == CpuTimes(10, 200)
    assert after.stolen_percent_since(before) == 10.0


def test_no_time_no_share() -> None:
    """Two readings within a tick say nothing."""
    assert CpuTimes(1, 100).stolen_percent_since(CpuTimes(1, 100)) is None


def test_a_machine_without_proc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Stolen time is not known where there is no /proc."""
    monkeypatch.setattr(calibration, "Path", lambda _: tmp_path / "stat")
    assert calibration.cpu_times() is None
