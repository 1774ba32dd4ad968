"""The report of a run, in its directory: report.md, report.html, junit.xml and comparison.json, from its report.json.

python -m loadtests.reports.report DIRECTORY [--baseline RUN]      writes them anew
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree as ET

from loadtests.comparing.comparison import Comparison, compare_run
from loadtests.comparing.stored_runs import read_run
from loadtests.reports import markdown, page
from loadtests.reports.recommendations import recommend
from loadtests.run_record import Check, RunRecord


def write(
    record: RunRecord, directory: Path, *, baseline: str | Path | None = None, earlier: Sequence[Path] = ()
) -> Comparison | None:
    """Write every form of the report of *record*, which stands in *directory*.

    Args:
        baseline: a run to compare with, by directory or name; None: the last one of the same load beside it.
        earlier: directories of runs of the same build, made in one go with this one (RUNS=n): all of them are compared.

    Returns:
        What the comparison came to; None: there was nothing to compare with.

    Raises:
        FileNotFoundError: there is no such baseline.
    """
    comparison = compare_run(record, directory, baseline=baseline, earlier=earlier)
    recommendations = recommend(record)
    (directory / "report.md").write_text(
        markdown.render(record, recommendations, comparison), encoding="utf-8"
    )
    (directory / "report.html").write_text(page.render(record, recommendations, comparison), encoding="utf-8")
    (directory / "junit.xml").write_bytes(junit(record))
    return comparison


def _verdict(check: Check) -> str:
    return "FAIL" if check.verdict == "BREACH" and check.about == "service" else check.verdict


def junit(record: RunRecord) -> bytes:
    """A test case for every criterion and every validity check, as CI systems read them.

    A breach of the instrument's is an error (the run means nothing), a missed criterion and a breach of the service's a
    failure; what was not measured is skipped, unless the run was strict.
    """
    suites = ET.Element("testsuites", name=f"load test: {record.profile}")
    for suite_name, cases in (
        ("criteria", [(c.name, c.title, c.verdict, c.reason) for c in record.criteria]),
        ("validity", [(c.name, c.name, _verdict(c), "\n".join((c.reason, *c.ids))) for c in record.checks]),
    ):
        suite = ET.SubElement(suites, "testsuite", name=suite_name, timestamp=record.started_at[:19])
        counts = {"failure": 0, "error": 0, "skipped": 0}
        for name, title, verdict, reason in cases:
            case = ET.SubElement(
                suite,
                "testcase",
                classname=f"loadtests.{record.profile}.{suite_name}",
                name=title if title == name else f"{title} ({name})",
                time="0",
            )
            outcome = {
                "FAIL": "failure",
                "BREACH": "error",
                "NOT MEASURED": "skipped",
                "NOT CHECKED": "skipped",
            }.get(verdict)
            if outcome == "skipped" and record.strict:
                outcome = "failure" if suite_name == "criteria" else "error"
            if outcome:
                counts[outcome] += 1
                text = _printable(reason)
                ET.SubElement(
                    case, outcome, message=f"{verdict}: {text.splitlines()[0] if text else ''}"
                ).text = text
        suite.set("tests", str(len(cases)))
        suite.set("failures", str(counts["failure"]))
        suite.set("errors", str(counts["error"]))
        suite.set("skipped", str(counts["skipped"]))
        suite.set("time", f"{record.duration_seconds:.3f}")
    ET.indent(suites)
    document: bytes = ET.tostring(suites, encoding="utf-8", xml_declaration=True)
    return document


def _printable(text: str) -> str:
    """Without what XML 1.0 cannot hold."""
    return "".join(character for character in text if character in "\t\n" or character >= " ")


def main(arguments: Sequence[str] | None = None) -> int:
    """Write a run's report anew."""
    parser = argparse.ArgumentParser(prog="python -m loadtests.reports.report", description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--baseline", help="a run to compare with")
    options = parser.parse_args(arguments)
    try:
        record = read_run(options.directory).record
        comparison = write(record, options.directory, baseline=options.baseline)
    except (OSError, ValueError) as exc:
        sys.stderr.write(f"{exc}\n")
        return 1
    if comparison:
        sys.stdout.write(f"{comparison.conclusion}\n")
    sys.stdout.write(f"{options.directory / 'report.html'}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
