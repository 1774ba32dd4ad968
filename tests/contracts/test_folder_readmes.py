"""A folder's README lists its files, each once with what it is, and nothing else."""

import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KINDS = {".py", ".toml", ".jinja", ".css", ".js", ".sql"}
UNTRACKED = {"__pycache__", "results"}


@pytest.mark.parametrize("name", ["app", "loadtests"])
def test_files(name: str) -> None:
    """Under `## Files` a row for every file, by its path from the folder; one without a line of code needs none."""
    folder = ROOT / name
    if not (folder / "README.md").exists():
        pytest.skip(f"{name}/ has no README")
    section = (folder / "README.md").read_text().partition("\n## Files\n")[2].partition("\n## ")[0]
    listed = Counter(re.findall(r"^\| `([^`]+)` \| \S", section, flags=re.MULTILINE))
    files = {
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.suffix in KINDS and not UNTRACKED & set(path.relative_to(folder).parts)
    }
    empty = {path for path in files if not (folder / path).read_text().strip()}
    assert {path for path, count in listed.items() if count > 1} == set()
    assert files - empty - set(listed) == set(), "not in the table"
    assert set(listed) - files == set(), "in the table, and no file"
