"""Define a row of the benchmarks' table, and print the table.

For every figure, smaller is better: times, memory, CPU shares.  So a budget is always an upper bound: of the ratio to
the peer, or, without a peer, of the figure itself.  A row that could not be measured gives the reason in `skipped`; it
neither passes nor fails.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

#: A figure and its unit.
HEAD = ("what", "ours", "peer", "limit", "ratio", "budget", "pass")


@dataclass(frozen=True)
class Row:
    """A row of the table; `limit` is the minimum set by machine and kernel, `ratio` is ours to the peer's."""

    what: str
    ours: float | None
    peer: float | None = None
    limit: float | None = None
    ratio: float | None = None
    budget: float | None = None
    skipped: str = ""

    @classmethod
    def beside(cls, what: str, ours: float, peer: float, budget: float | None, limit: float | None = None) -> Row:
        """Return a row with a peer."""
        return cls(what, ours, peer, limit, ours / peer, budget)

    @classmethod
    def missing(cls, what: str, why: str) -> Row:
        """Return a row that could not be measured."""
        return cls(what, None, skipped=why)

    @property
    def relative(self) -> float | None:
        """Return the ratio or, without a peer, the figure itself."""
        return self.ours if self.ratio is None else self.ratio

    @property
    def excess(self) -> float | None:
        """Return how much of the budget is used: up to 1 is within it.  None without a budget or a figure."""
        return None if self.relative is None or self.budget is None else self.relative / self.budget

    @property
    def passed(self) -> bool | None:
        return None if self.excess is None else self.excess <= 1

    def plain(self) -> dict[str, Any]:
        """Return a JSON representation."""
        what = f"{self.what} [not measured: {self.skipped}]" if self.skipped else self.what
        return {
            "what": what,
            "ours": self.ours,
            "peer": self.peer,
            "limit": self.limit,
            "ratio": self.ratio,
            "budget": self.budget,
            "pass": self.passed,
        }

    @classmethod
    def from_plain(cls, document: dict[str, Any]) -> Row:
        """Return the row that `plain` represents."""
        what, _, why = str(document["what"]).partition(" [not measured: ")
        figures = {name: document[name] for name in ("ours", "peer", "limit", "ratio", "budget")}
        return cls(what, **figures, skipped=why.removesuffix("]"))


def figure(value: float | None) -> str:
    """Format a figure with three digits; a dash for None."""
    return "-" if value is None else f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def table(rows: Iterable[Row]) -> Iterable[str]:
    """Return the lines of the table."""
    verdicts = {None: "", True: "pass", False: "FAIL"}
    lines = [HEAD]
    for row in rows:
        figures = [figure(value) for value in (row.ours, row.peer, row.limit, row.ratio, row.budget)]
        lines.append((row.what, *figures, f"- {row.skipped}" if row.skipped else verdicts[row.passed]))  # type: ignore[arg-type]
    width = max(len(line[0]) for line in lines)
    for what, *rest, verdict in lines:
        yield f"{what:{width}}" + "".join(f" {text:>7}" for text in rest) + f"  {verdict}".rstrip()
