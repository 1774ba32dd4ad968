"""The rules as Prometheus reads them, for what is generated from them and for the tests."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import promql_parser
import yaml  # type: ignore[import-untyped]  # it has no annotations of its own

RULES = Path(__file__).parent / "prometheus" / "rules"


@dataclass(frozen=True)
class Rule:
    """A recording rule (`name` is the series) or an alert."""

    name: str
    group: str
    expr: str
    labels: dict[str, str] = field(default_factory=dict)
    annotations: dict[str, str] = field(default_factory=dict)


def recording_rules() -> Sequence[Rule]:
    """Those of recording.yml and expected.yml, in their order."""
    return [*_read("recording.yml", "record"), *_read("expected.yml", "record")]


def alerting_rules() -> Sequence[Rule]:
    """Those of alerts.yml, in their order."""
    return _read("alerts.yml", "alert")


def expecting(number: int) -> str:
    """The text of expected.yml for *number* replicas at the least."""
    text, found = re.subn(
        r"(?<=max1d \* 0 \+ )\d+$", str(number), (RULES / "expected.yml").read_text(), flags=re.MULTILINE
    )
    if found != 1:
        raise ValueError("expected.yml does not say how many replicas are expected")
    return text


def expect_replicas(rules: Path, number: int) -> None:
    """Let the copy of the rules in *rules* expect *number* replicas at the least."""
    (rules / "expected.yml").write_text(expecting(number))


def metric_names(promql: str) -> set[str]:
    """The names of the series that *promql* asks for.

    Raises:
        ValueError: it is not PromQL, or does not fit together: a rate of what is no range.
    """
    names = set()

    def note(node: promql_parser.Expr) -> None:
        if isinstance(node, promql_parser.VectorSelector) and node.name:
            names.add(node.name)

    promql_parser.walk(promql_parser.parse(promql), note)
    return names


def _read(file: str, kind: str) -> Sequence[Rule]:
    document: Any = yaml.safe_load((RULES / file).read_text())
    return [
        Rule(
            rule[kind],
            group["name"],
            rule["expr"],
            rule.get("labels", {}),
            rule.get("annotations", {}),
        )
        for group in document["groups"]
        for rule in group["rules"]
    ]
