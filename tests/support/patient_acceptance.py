"""Acceptance criteria for machines that do other work, too."""

from pathlib import Path

from loadtests.judging import acceptance


def patient_acceptance(folder: Path) -> Path:
    """A file of the shipped criteria, with a generator that may be late: other work shares this machine."""
    path = folder / "acceptance.toml"
    text = acceptance.PATH.read_text()
    for limit, wider in (("generator_lag_p95_ms = 50.0", "5000.0"), ("little_tolerance = 0.05", "0.5")):
        assert limit in text
        text = text.replace(limit, f"{limit.split(' = ')[0]} = {wider}")
    path.write_text(text)
    return path
