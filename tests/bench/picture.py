"""Draw the benchmark's rows on one page: ours relative to the peer's, with limit, budget and the last runs.

The page is a single file without scripts or external resources.
"""

from __future__ import annotations

import html
import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from tests.bench.rows import Row, figure

#: Number of runs that are remembered, and drawn beside a row.
MAX_RUNS = 30

#: The scale, as multiples of the peer; values outside are drawn at its ends.
LOWEST, HIGHEST = 1 / 32, 16
TICKS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8, 16)

#: Pixels.
SCALE_WIDTH, HISTORY_WIDTH, HEIGHT, MARGIN = 460, 110, 22, 14

STYLE = """
:root { color-scheme: light dark; --ink: #1c2733; --faint: #8a97a5; --line: #d9dfe6; --good: #14804a; --bad: #c2302b;
        --neutral: #2563a8; --page: #fff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e9ef; --faint: #8795a4; --line: #35404c; --good: #4cc38a; --bad: #ff7a70; --neutral: #6aa9f0;
          --page: #14181d; } }
body { font: 14px/1.4 system-ui, sans-serif; color: var(--ink); background: var(--page); margin: 2rem auto;
       max-width: 1180px; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; }
th { text-align: left; font-weight: 600; color: var(--faint); font-size: 12px; }
td, th { padding: 1px 8px 1px 0; vertical-align: middle; border-bottom: 1px solid var(--line); }
td.figure, th.figure { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
svg { display: block; }
.grid { stroke: var(--line); } .peer { stroke: var(--ink); } .limit { stroke: var(--faint); stroke-width: 2; }
.budget { stroke: var(--bad); stroke-dasharray: 2 2; }
.pass { fill: var(--good); color: var(--good); } .fail { fill: var(--bad); color: var(--bad); }
.none { fill: var(--neutral); color: var(--neutral); }
.past { fill: none; stroke: var(--faint); } text { fill: var(--faint); font-size: 10px; }
p, .skipped { color: var(--faint); }
"""


def remember(rows: Iterable[Row], file: Path, now: float | None = None) -> list[Mapping[str, float]]:
    """Append a run's ratios (or figures without a peer) to a file; return all runs in it, the latest last.

    A line that does not parse comes from an interrupted run, and is skipped.
    """
    runs: list[Mapping[str, float]] = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            runs.append(dict(json.loads(line)["rows"]))
        except (ValueError, KeyError, TypeError):
            continue
    found = {row.what: value for row in rows if (value := row.relative) is not None}
    runs = [*runs, found][-MAX_RUNS:]
    file.parent.mkdir(parents=True, exist_ok=True)
    stamp = time.time() if now is None else now
    file.write_text("".join(json.dumps({"time": stamp, "rows": run}) + "\n" for run in runs))
    return runs


def page(rows: Iterable[Row], runs: Sequence[Mapping[str, float]], title: str) -> str:
    """Return the page of these rows, with the results of earlier ``runs`` for each."""
    body = "\n".join(_line(row, [run[row.what] for run in runs if row.what in run]) for row in rows)
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>
<h1>{html.escape(title)}</h1>
<p>Each dot is ours as a multiple of the peer's figure in the same run, which is the upright line at 1: left of it is
better. Grey tick: the least that machine and kernel ask for. Dashed: the budget. A row without a peer is drawn as a
multiple of its budget. At the right: the last runs, the latest at their end.</p>
<table><tr><th>what<th>{_axis()}<th class=figure>ours<th class=figure>peer<th class=figure>ratio<th>last runs</tr>
{body}
</table></html>
"""


def _line(row: Row, past: Sequence[float]) -> str:
    what = html.escape(row.what)
    if row.skipped:
        return f"<tr><td>{what}<td colspan=5 class=skipped>not measured: {html.escape(row.skipped)}</tr>"
    verdict = {True: "pass", False: "fail", None: "none"}[row.passed]
    figures = f"<td class=figure>{figure(row.ours)}<td class=figure>{figure(row.peer)}"
    ratio = f'<td class="figure {verdict}">{figure(row.relative)}'
    return f"<tr><td>{what}<td>{_scale(row, verdict)}{figures}{ratio}<td>{_history(past)}</tr>"


def _axis() -> str:
    named = {tick: f"1/{1 / tick:.0f}" if tick < 1 else f"{tick:.0f}" for tick in TICKS}
    labels = "".join(f'<text x="{_at(at):.0f}" y="14" text-anchor="middle">{name}</text>' for at, name in named.items())
    return f'<svg width="{SCALE_WIDTH}" height="18" role="img" aria-label="multiples of the peer">{labels}</svg>'


def _scale(row: Row, verdict: str) -> str:
    """Draw one row's figures on the common scale."""
    unit = row.peer or row.budget
    marks = [f'<line class="grid" x1="{_at(tick):.1f}" x2="{_at(tick):.1f}" y1="0" y2="{HEIGHT}"/>' for tick in TICKS]
    marks.append(f'<line class="peer" x1="{_at(1):.1f}" x2="{_at(1):.1f}" y1="0" y2="{HEIGHT}"/>')
    if row.limit is not None and unit:
        marks.append(_tick("limit", row.limit / unit))
    if row.budget is not None and row.peer:
        marks.append(_tick("budget", row.budget))
    if row.ours is not None and unit:
        marks.append(f'<circle class="{verdict}" cx="{_at(row.ours / unit):.1f}" cy="{HEIGHT / 2}" r="5"/>')
    return f'<svg width="{SCALE_WIDTH}" height="{HEIGHT}">{"".join(marks)}</svg>'


def _tick(kind: str, value: float) -> str:
    return f'<line class="{kind}" x1="{_at(value):.1f}" x2="{_at(value):.1f}" y1="4" y2="{HEIGHT - 4}"/>'


def _at(value: float) -> float:
    """Return the position of a multiple of the peer on the scale, in pixels."""
    within = min(max(value, LOWEST), HIGHEST)
    share = math.log(within / LOWEST) / math.log(HIGHEST / LOWEST)
    return MARGIN + share * (SCALE_WIDTH - 2 * MARGIN)


def _history(past: Sequence[float]) -> str:
    """Draw the last runs' ratios as a line, whose height is a factor of two, or more if they differ by more."""
    past = [value for value in past if value > 0]
    if len(past) < 2:
        return ""
    low, high = min(past), max(past)
    middle, span = math.sqrt(low * high), max(math.log(high / low), math.log(2))
    shares = [0.5 + math.log(value / middle) / span for value in past]
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in _points(shares))
    title = f"<title>{figure(low)} to {figure(high)} in {len(past)} runs</title>"
    return f'<svg width="{HISTORY_WIDTH}" height="{HEIGHT}"><polyline class="past" points="{points}"/>{title}</svg>'


def _points(shares: Sequence[float]) -> Iterator[tuple[float, float]]:
    step = (HISTORY_WIDTH - 4) / (len(shares) - 1)
    for number, share in enumerate(shares):
        yield 2 + number * step, HEIGHT - 3 - share * (HEIGHT - 6)
