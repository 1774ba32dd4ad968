"""Who may import whom."""

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]


def imports(*folders: str) -> Iterator[tuple[Path, str]]:
    """Each file below *folders* with every module that it imports, anywhere in it."""
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from ((path, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield path, f"{node.module}"
                yield from ((path, f"{node.module}.{alias.name}") for alias in node.names)


def test_load_tests_know_the_service_from_outside() -> None:
    """They test any deployment that keeps the contract; the service knows nothing of them either."""
    assert not [(path, module) for path, module in imports("loadtests") if module.split(".")[0] == "app"]
    assert not [(path, module) for path, module in imports("app") if module.split(".")[0] == "loadtests"]


def test_nothing_needs_the_tests() -> None:
    """A checkout without tests/ serves, measures and monitors."""
    found = imports("app", "loadtests", "monitoring")
    assert not [(path, module) for path, module in found if module.split(".")[0] == "tests"]


def test_the_rooms_of_the_load_tests_make_no_circle() -> None:
    """Of any two rooms, or files beside them, at most one knows the other, by whatever way."""
    folder = ROOT / "loadtests"
    rooms = {path.stem for path in folder.iterdir()}
    graph: dict[str, set[str]] = {}
    for path, module in imports("loadtests"):
        room = path.relative_to(folder).parts[0].removesuffix(".py")
        package, _, rest = module.partition(".")
        other = rest.split(".")[0]
        if package == "loadtests" and other in rooms and other != room:
            graph.setdefault(room, set()).add(other)
    assert graph["running"] >= {"judging", "machine", "samples"}  # it has looked
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError
