"""`make compare A=... B=...`: two sides, turn by turn, and an exit code that a pipeline can go by."""

import json
from pathlib import Path

import pytest

from loadtests.comparing import interleaved

pytestmark = pytest.mark.timeout(400)

SHORT = ["--profile", "peak", "--users", "60", "--duration", "3"]


@pytest.mark.matrix
def test_a_regression(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Five turns against a side whose batches are of one order: it is worse, and the exit code says so."""
    arguments = ["--a", "", "--b", "BATCH_MAX_SIZE=1,LOG_LEVEL=debug", "--results", str(tmp_path)]
    code = interleaved.main([*arguments, "--profile", "stress", "--users", "150", "--duration", "3"])
    said = capsys.readouterr().out
    assert "turn 5 of 5: A" in said
    assert code == 1, said
    assert json.loads((tmp_path / "compare.json").read_text())["method"] == "rank test"


@pytest.mark.slow
def test_too_few_turns_to_tell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A commit against itself, in one turn: the figures, and no claim."""
    code = interleaved.main(["--a", "HEAD", "--b", "", "--runs", "1", "--results", str(tmp_path), *SHORT])
    said = capsys.readouterr().out
    assert code == 0
    assert "Cannot tell" in said
    assert "| Orders per second |" in said


@pytest.mark.slow
def test_no_such_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert interleaved.main(["--a", "no-such-commit", "--results", str(tmp_path)]) == 2
    assert "A=no-such-commit: neither a commit nor" in capsys.readouterr().err
