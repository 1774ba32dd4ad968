"""Blocks of loadtests/README.md that a measurement writes: the lines between two markers, and no other byte.

<!-- bench: begin (written by `make bench`) -->
...
<!-- bench: end -->
"""

import re
from collections.abc import Sequence
from pathlib import Path

README = Path(__file__).with_name("README.md")

_MARKER = re.compile(r"^<!-- ([a-z-]+): (begin|end)\b[^\n]*-->\r?$", re.MULTILINE)


class MarkerError(RuntimeError):
    """The markers of a block are not one begin and, behind it, one end with no other marker in between."""


def write(name: str, content: str) -> bool:
    """Put *content* into the block *name* of the README; False, and nothing done, where the README has none.

    Raises:
        MarkerError: half of the block is there, or more than one.
    """
    text = _readme()
    if not any(marker[1] == name for marker in _MARKER.finditer(text)):
        return False
    README.write_bytes(replaced(text, name, content).encode())
    return True


def write_row(name: str, headings: Sequence[str], row: Sequence[str]) -> bool:
    """Put *row* into the table that is the block *name*: over the row with the same first cell, or else last.

    Raises:
        MarkerError: as `write`.
    """
    text = _readme()
    if not any(marker[1] == name for marker in _MARKER.finditer(text)):
        return False
    rows = {cells[0]: cells for cells in _rows(content_of(text, name))}
    rows[row[0]] = list(row)
    return write(name, markdown_table(headings, list(rows.values())))


def replaced(text: str, name: str, content: str) -> str:
    """*text* with *content* in the block *name*, a blank line on either side of it.

    Raises:
        MarkerError: the block is missing, there twice, or not closed.
    """
    start, end = _place(text, name)
    return f"{text[:start]}\n\n{content.strip()}\n\n{text[end:]}"


def content_of(text: str, name: str) -> str:
    """What stands in the block *name* of *text*.

    Raises:
        MarkerError: as `replaced`.
    """
    start, end = _place(text, name)
    return text[start:end].strip()


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown: the first column is a name, the others are figures."""
    lines = ["| " + " | ".join(headings) + " |", "| --- |" + " ---: |" * (len(headings) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _place(text: str, name: str) -> tuple[int, int]:
    """From the end of the begin marker to the start of the end marker."""
    markers = list(_MARKER.finditer(text))
    own = [index for index, marker in enumerate(markers) if marker[1] == name]
    kinds = [markers[index][2] for index in own]
    if kinds != ["begin", "end"]:
        found = ", ".join(
            f"{kind} in line {_line(text, markers[i])}" for kind, i in zip(kinds, own, strict=True)
        )
        raise MarkerError(f"block {name!r} needs one begin and then one end marker; found: {found or 'none'}")
    first, last = own
    if last != first + 1:
        other = markers[first + 1]
        raise MarkerError(f"block {name!r} has a marker of {other[1]!r} inside, in line {_line(text, other)}")
    return markers[first].end(), markers[last].start()


def _line(text: str, marker: re.Match[str]) -> int:
    return text.count("\n", 0, marker.start()) + 1


def _rows(table: str) -> list[list[str]]:
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines[2:]]


def _readme() -> str:
    return README.read_bytes().decode() if README.exists() else ""
