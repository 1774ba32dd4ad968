"""A profile as one page that needs nothing but itself: `index.html`."""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from loadtests.bench import charts, flame_graphs

_SHOWN = 30

_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Order path: a profile</title>
<style>
:root {{ color-scheme: light dark; --line: color-mix(in srgb, currentColor 20%, transparent) }}
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 78rem; margin: 2rem auto; padding: 0 1rem }}
h1 {{ font-size: 1.6rem }} h2 {{ font-size: 1.2rem; margin-top: 2.5rem }}
p {{ max-width: 48rem }}
.facts {{ display: flex; flex-wrap: wrap; gap: .75rem; padding: 0; list-style: none }}
.facts li {{ border: 1px solid var(--line); border-radius: .5rem; padding: .5rem .9rem }}
.facts b {{ display: block; font-size: 1.3rem }}
iframe {{ width: 100%; border: 1px solid var(--line); border-radius: .5rem; background: #eeeee2 }}
img {{ max-width: 100% }}
table {{ border-collapse: collapse; font-size: .85rem; width: 100% }}
th, td {{ padding: .2rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap }}
th:first-child, td:first-child, .where td:nth-child(2), .where th:nth-child(2) {{ text-align: left }}
td:first-child {{ font-family: ui-monospace, monospace; white-space: normal; overflow-wrap: anywhere }}
.up {{ color: light-dark(#d1242f, #ff7b72) }} .down {{ color: light-dark(#1a7f37, #3fb950) }}
</style>
<h1>The order path, profiled</h1>
<ul class="facts">{facts}</ul>
<p>{machine}. Every figure of this page is in <code>profile.json</code>.</p>
<h2>Where the CPU goes</h2>
<p>Each box is a function, as wide as its share of {samples:,} samples, below the one that called it; click to zoom,
Ctrl-F to search. A sample is of the thread that holds the interpreter's lock, so what runs without it (psycopg2 while
it sends, the thread that writes the log) is not in the picture, and its CPU is spread over the rest.</p>
<iframe title="CPU flame graph" height="{flame_height}" src="data:image/svg+xml;base64,{flame_graph}"></iframe>
<h2>CPU-µs per order, by function{against}</h2>
{functions}
<h2>Where the time goes</h2>
<p>What an order spends in each stage of its path (<code>order_stage_seconds</code>): waiting for its batch and for
the commit is no work of the service's, but it is what the customer sees.</p>
<img alt="Shares of the stages of the order path" src="data:image/svg+xml;base64,{stages}">
{stage_table}
<h2>How late the event loop is</h2>
<p>The worst delay of a timer in the 15 seconds before (<code>event_loop_lag_seconds</code>), while the load was on.</p>
<img alt="Event-loop lag over time" src="data:image/svg+xml;base64,{lag}">
<h2>What the memory is held by</h2>
<p>From a second run, warmed up and then under tracemalloc: the lines of code whose memory, allocated in this run, is
still held in the middle of it, and when {orders:,} orders were answered and the load was off. What grows with every
order shows in the last column.</p>
{allocations}
</html>
"""


def write(folder: Path, profile: Mapping[str, Any], baseline: Mapping[str, Any] | None) -> Path:
    """Draw the pictures into *folder*, which holds `cpu.svg`, and write the page; its path."""
    both = {"now": profile} | ({"baseline": baseline} if baseline else {})
    charts.shares({name: one["stages_us"] for name, one in both.items()}, folder / "stages", unit="µs")
    charts.lines(
        {
            "": {
                name: (
                    [at for at, _ in one["event_loop_lag_ms"]],
                    [lag for _, lag in one["event_loop_lag_ms"]],
                )
                for name, one in both.items()
            }
        },
        folder / "lag",
        x_label="seconds under load",
        y_label="event-loop lag (ms)",
    )
    flame_graph = (folder / "cpu.svg").read_text()
    page = folder / "index.html"
    page.write_text(
        _PAGE.format(
            facts=_facts(profile, baseline),
            machine=escape("{cpu}, {cores} cores, {kernel}, Python {python}".format_map(profile["machine"])),
            samples=profile["samples"],
            flame_graph=base64.b64encode(flame_graph.encode()).decode(),
            flame_height=int(flame_graph.partition(' height="')[2].partition('"')[0]) + 4,
            against=" (largest differences from the baseline first)" if baseline else "",
            functions=_functions(profile, baseline),
            stages=_encoded(folder / "stages.svg"),
            stage_table=_stages(profile, baseline),
            lag=_encoded(folder / "lag.svg"),
            orders=profile["allocations"]["orders"],
            allocations=_allocations(profile),
        )
    )
    return page


def _facts(profile: Mapping[str, Any], baseline: Mapping[str, Any] | None) -> str:
    def of(one: Mapping[str, Any]) -> list[tuple[str, str]]:
        cost = one["cost"]
        return [
            (f"{cost['per_second']:,.0f}", f"orders/s over {one['connections']} connections"),
            (f"{cost['service_us']:.0f} µs", "CPU of the service per order, sampled"),
            (f"{cost['postgres_us']:.0f} µs", "CPU of Postgres per order"),
            (f"{cost['p50_ms']:.1f} / {cost['p99_ms']:.1f} ms", "p50 / p99"),
            (f"{one['orders_per_commit']:.0f}", "orders per commit"),
            (f"{max(lag for _, lag in one['event_loop_lag_ms']):.0f} ms", "worst event-loop lag"),
        ]

    before = of(baseline) if baseline else None
    return "".join(
        f"<li><b>{value}</b> {label}" + (f"<br>baseline: {before[number][0]}" if before else "") + "</li>"
        for number, (value, label) in enumerate(of(profile))
    )


def _functions(profile: Mapping[str, Any], baseline: Mapping[str, Any] | None) -> str:
    rows = []
    for name, own, whole, before in flame_graphs.by_cost(dict(profile), dict(baseline) if baseline else None)[
        :_SHOWN
    ]:
        row = [escape(name), f"{own:.1f}", f"{own / profile['cost']['service_us']:.1%}", f"{whole:.1f}"]
        rows.append(row if before is None else [*row, f"{before:.1f}", _difference(own - before, 1)])
    headings = ["function", "itself", "share", "with what it calls"]
    return _table(headings + (["itself, baseline", "difference"] if baseline else []), rows)


def _stages(profile: Mapping[str, Any], baseline: Mapping[str, Any] | None) -> str:
    rows = []
    for stage, value in profile["stages_us"].items():
        row = [stage, f"{value:,.0f}", f"{value / (sum(profile['stages_us'].values()) or 1):.1%}"]
        if baseline:
            before = baseline["stages_us"][stage]
            row += [f"{before:,.0f}", _difference(value - before, 0)]
        rows.append(row)
    return _table(["stage", "µs", "share"] + (["µs, baseline", "difference"] if baseline else []), rows)


def _allocations(profile: Mapping[str, Any]) -> str:
    orders = max(1, profile["allocations"]["orders"])
    rows = [
        [escape(where), escape(ours), f"{load / 1024:,.1f}", f"{after / 1024:,.1f}", f"{after / orders:,.1f}"]
        for where, ours, load, after in sorted(
            profile["allocations"]["lines"], key=lambda line: -max(line[2:])
        )[:_SHOWN]
    ]
    headings = ["allocated at", "on behalf of", "KiB under load", "KiB afterwards", "bytes per order"]
    return _table(headings, rows, kind="where")


def _difference(value: float, digits: int) -> str:
    return f'<span class="{"up" if value > 0 else "down"}">{value:+,.{digits}f}</span>'


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    head = "".join(f"<th>{heading}</th>" for heading in headings)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def _encoded(picture: Path) -> str:
    return base64.b64encode(picture.read_bytes()).decode()
