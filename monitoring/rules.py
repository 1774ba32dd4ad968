"""The rules as Prometheus reads them, for what is generated from them and for the tests."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]  # it has no annotations of its own

RULES = Path(__file__).parent / "prometheus" / "rules"

# In this order: an aggregation's name is one of a function once its list of labels is gone.
_NOT_NAMES = (
    re.compile(r""" "[^"]*" | '[^']*' """, re.VERBOSE),
    re.compile(r"\{[^}]*\} | \[[^\]]*\] | \boffset\s+\S+", re.VERBOSE),
    re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)"),
    re.compile(r"\b[a-z_0-9]+(?=\s*\()"),
    re.compile(r"\b(?:and|or|unless|bool)\b"),
)
_NAME = re.compile(r"(?<![\w.:])[a-zA-Z_][\w:]*")


@dataclass(frozen=True)
class Rule:
    """A recording rule (`name` is the series) or an alert."""

    name: str
    group: str
    expr: str
    labels: dict[str, str] = field(default_factory=dict)
    annotations: dict[str, str] = field(default_factory=dict)


def recording_rules() -> Sequence[Rule]:
    """Those of recording.yml, in their order."""
    return _read("recording.yml", "record")


def alerting_rules() -> Sequence[Rule]:
    """Those of alerts.yml, in their order."""
    return _read("alerts.yml", "alert")


def metric_names(promql: str) -> set[str]:
    """The names of the series that *promql* asks for."""
    for pattern in _NOT_NAMES:
        promql = pattern.sub(" ", promql)
    return set(_NAME.findall(promql))


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
