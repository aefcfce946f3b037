"""Draw a timeline as SVG: one row per span, so that texts do not overlap."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape

from caisson.image.vm.timeline import Span, Timeline

#: Pixels: the columns of names, bars and figures; a row, the head and the foot.
NAMES, BARS, FIGURES = 270, 600, 90
ROW, HEAD, FOOT = 19, 64, 28
INDENT = 14

#: Maximum pixels of a letter in the fonts below: monospace, so that fitting text can be counted.
LETTER, TITLE_LETTER, NOTE_LETTER = 7.3, 9.1, 6.7

#: Colours by class, for light and dark mode.  Without CSS variables, which not every SVG renderer supports.
LIGHT = {
    "ground": "#ffffff", "ink": "#1f2328", "faint": "#656d76", "line": "#d8dee4",
    "host": "#8c959f", "firmware": "#bf8700", "kernel": "#1a7f5a", "agent": "#3b6fd4",
}  # fmt: skip
DARK = {
    "ground": "#0d1117", "ink": "#e6edf3", "faint": "#8d96a0", "line": "#30363d",
    "host": "#6e7681", "firmware": "#d29922", "kernel": "#3fb68b", "agent": "#6ea0ff",
}  # fmt: skip
STYLE = (
    "text{font:12px ui-monospace,monospace} .title{font-size:15px;font-weight:600} .note,.axis{font-size:11px} "
    ".axis{text-anchor:middle} .figure{text-anchor:end} .part{opacity:.6} "
)


def _colours(palette: Mapping[str, str]) -> str:
    return " ".join(f".{name}{{{'stroke' if name == 'line' else 'fill'}:{value}}}" for name, value in palette.items())


def svg(timeline: Timeline) -> str:
    """Return the picture, readable in light and dark mode."""
    rows = list(_rows(timeline.spans))
    width, bottom = NAMES + BARS + FIGURES, HEAD + ROW * len(rows)
    scale = BARS / timeline.seconds
    note = f"{timeline.seconds:.2f} s; parts are indented; the guest's clock is known to ± {timeline.error:.3f} s"
    drawn = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{bottom + FOOT}" '
        f'viewBox="0 0 {width} {bottom + FOOT}" role="img">',
        f"<title>{escape(timeline.what)}</title>",
        f"<style>{STYLE}{_colours(LIGHT)} @media (prefers-color-scheme:dark){{{_colours(DARK)}}}</style>",
        f'<rect class="ground" width="{width}" height="{bottom + FOOT}"/>',
        f'<text class="title ink" x="12" y="24">{escape(_fit(timeline.what, width - 24, TITLE_LETTER))}</text>',
        f'<text class="note faint" x="12" y="44">{escape(_fit(note, width - 24, NOTE_LETTER))}</text>',
    ]
    step = _step(timeline.seconds)
    for number in range(int(timeline.seconds / step) + 1):
        x = NAMES + number * step * scale
        drawn.append(f'<line class="line" x1="{x:.1f}" x2="{x:.1f}" y1="{HEAD}" y2="{bottom}"/>')
        drawn.append(f'<text class="axis faint" x="{x:.1f}" y="{bottom + 16}">{number * step:g} s</text>')
    for number, (depth, span) in enumerate(rows):
        y = HEAD + ROW * number
        name = _fit(span.name, NAMES - 18 - INDENT * depth, LETTER)
        drawn.append(
            f'<text class="{"faint" if depth else "ink"}" x="{12 + INDENT * depth}" y="{y + 14}">{escape(name)}</text>'
        )
        drawn.append(
            f'<rect class="{span.kind}{" part" if depth else ""}" x="{NAMES + span.start * scale:.1f}" y="{y + 4}" '
            f'width="{max(1.0, span.seconds * scale):.1f}" height="{ROW - 7}" rx="1"/>'
        )
        drawn.append(f'<text class="figure ink" x="{width - 12}" y="{y + 14}">{span.seconds:.3f} s</text>')
    return "\n".join([*drawn, "</svg>\n"])


def _fit(text: str, pixels: float, letter: float) -> str:
    """Truncate a text to fit."""
    most = max(1, int(pixels / letter))
    return text if len(text) <= most else text[: most - 1] + "…"


def _rows(spans: tuple[Span, ...], depth: int = 0) -> Iterator[tuple[int, Span]]:
    for span in spans:
        yield depth, span
        yield from _rows(span.parts, depth + 1)


def _step(seconds: float) -> float:
    """Return the seconds between two axis lines, of which there are at most ten."""
    return next(step for step in (0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 600) if seconds / step <= 10)
