"""Draw an image's size as treemaps by package and by directory, as SVG or HTML.

An area is proportional to bytes.  Source of the layout: Bruls, Huizing, van Wijk, "Squarified Treemaps"
(2000).
"""

from __future__ import annotations

import stat
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

#: Pixels of the picture: its width, the height of each map, the head of the picture and of each group, the gap.
WIDTH, HEIGHT, TITLE, HEAD, GAP = 1200, 560, 64, 20, 40

#: Pixels of a letter in a monospace font, so that fitting text can be counted; of a line; of a letter of the title.
LETTER, LINE, TITLE_LETTER = 6.7, 14, 9.7

#: Directories are grouped by this many components, and distinguished by one more.
DEPTH = 3

#: Shares of the whole below which items are merged: each would be a dot.
SMALL = 0.002

#: Titles of package kinds.
KINDS = {"deb": "Debian packages", "apk": "Alpine packages", "wheel": "Python wheels"}

#: Light background colours for black text, in the order of groups' sizes.
COLOURS = ("#8ecae6", "#ffd166", "#a7d7a0", "#f4a6a0", "#cdb4db", "#f9c784", "#b8c4d6", "#e9edc9")


@dataclass(frozen=True)
class File:
    """A file of an image: its path, its bytes, and its package and package kind."""

    path: str
    size: int
    package: str
    kind: str


@dataclass(frozen=True)
class Box:
    """A part of a rectangle, in pixels."""

    x: float
    y: float
    width: float
    height: float


#: Sizes by group and by name in it.
Groups = Mapping[str, Mapping[str, int]]


def sizes(tree: Path) -> Iterator[tuple[str, int]]:
    """Yield the files of a tree with their bytes; hard links only once."""
    seen = set()
    for file in sorted(tree.rglob("*")):
        state = file.lstat()
        if stat.S_ISREG(state.st_mode) and state.st_ino not in seen:
            seen.add(state.st_ino)
            yield str(file.relative_to(tree)), state.st_size


def by_package(files: Iterable[File]) -> Groups:
    """Return the bytes of each package, grouped by kind."""
    found: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for file in files:
        found[file.kind][file.package] += file.size
    return found


def by_directory(files: Iterable[File]) -> Groups:
    """Return the bytes of each directory or file, grouped by parent directory."""
    found: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for file in files:
        *parts, name = file.path.split("/")
        found["/".join(parts[:DEPTH]) or "/"][f"{parts[DEPTH]}/" if len(parts) > DEPTH else name] += file.size
    return found


def svg(title: str, files: Sequence[File]) -> str:
    """Return the picture as SVG."""
    whole = sum(file.size for file in files)
    bottom = TITLE + 2 * (HEIGHT + GAP)
    figure = f": {_bytes(whole)}"
    shown = _fit(title, WIDTH - 16 - TITLE_LETTER * len(figure), TITLE_LETTER)
    drawn = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{bottom}" viewBox="0 0 {WIDTH} {bottom}" '
        'role="img">',
        f"<title>{escape(title)}</title>",
        "<style>text{font:11px ui-monospace,monospace;fill:#1f2328} .title{font-size:16px;font-weight:600} "
        ".head{font-weight:600} rect{stroke:#ffffff}</style>",
        f'<rect width="{WIDTH}" height="{bottom}" fill="#ffffff"/>',
        f'<text class="title" x="8" y="24">{escape(shown)}{figure}</text>',
    ]
    for number, (what, groups) in enumerate((("by package", by_package(files)), ("by directory", by_directory(files)))):
        top = TITLE + number * (HEIGHT + GAP)
        drawn.append(f'<text class="head" x="8" y="{top - 8}">{what}</text>')
        drawn += _map(groups, Box(0, top, WIDTH, HEIGHT), whole)
    return "\n".join([*drawn, "</svg>\n"])


def html(title: str, files: Sequence[File]) -> str:
    """Return the picture as a self-contained page with tooltips."""
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        "<style>body{margin:1em;background:#fff} svg{max-width:100%;height:auto}</style>\n"
        f"{svg(title, files)}</html>\n"
    )


def _map(groups: Groups, box: Box, whole: int) -> Iterator[str]:
    sizes = {name: sum(inner.values()) for name, inner in groups.items()}
    order = _joined(sizes, whole)
    for number, (name, place) in enumerate(squarify(order, box)):
        inner = groups[name] if name in groups else {one: size for one, size in sizes.items() if one not in order}
        colour = COLOURS[number % len(COLOURS)]
        tall = place.height > 2 * HEAD
        yield f'<g fill="{colour}">'
        yield _rectangle(place, f"{name}: {_bytes(order[name])}")
        if tall:
            yield _text(place, f"{name} {_bytes(order[name])}", "head")
        below = Box(place.x, place.y + HEAD, place.width, place.height - HEAD) if tall else place
        for one, part in squarify(_joined(inner, whole), below):
            size = inner[one] if one in inner else order[name] - sum(inner.get(o, 0) for o in _joined(inner, whole))
            yield _rectangle(part, f"{name}, {one}: {_bytes(size)}")
            if tall:
                yield _text(part, one, "", _bytes(size))
        yield "</g>"


def _joined(sizes: Mapping[str, int], whole: int) -> dict[str, int]:
    """Return sizes with the small ones merged, largest first."""
    large = {name: size for name, size in sizes.items() if size >= SMALL * whole}
    small = [size for name, size in sizes.items() if name not in large]
    if len(small) == 1:
        large = {name: size for name, size in sizes.items() if size}
    elif sum(small):
        large[f"{len(small)} others"] = sum(small)
    return dict(sorted(large.items(), key=lambda item: (-item[1], item[0])))


def squarify(sizes: Mapping[str, int], box: Box) -> Iterator[tuple[str, Box]]:
    """Yield a rectangle for each size, largest first, as close to a square as possible; together they fill the box.

    Sizes are in descending order and not 0.
    """
    left = [(name, float(size)) for name, size in sizes.items()]
    total = sum(size for _, size in left)
    while left:
        side, other = min(box.width, box.height), max(box.width, box.height)
        scale = side * other / total if total else 0.0
        row: list[tuple[str, float]] = []
        for one in left:
            if row and _worst([*row, one], side, scale) > _worst(row, side, scale):
                break
            row.append(one)
        filled = sum(size for _, size in row)
        depth = other * filled / total if total else 0.0
        at = 0.0
        for name, size in row:
            length = side * size / filled if filled else 0.0
            if box.width >= box.height:
                yield name, Box(box.x, box.y + at, depth, length)
            else:
                yield name, Box(box.x + at, box.y, length, depth)
            at += length
        if box.width >= box.height:
            box = Box(box.x + depth, box.y, box.width - depth, box.height)
        else:
            box = Box(box.x, box.y + depth, box.width, box.height - depth)
        total -= filled
        left = left[len(row) :]


def _worst(row: Sequence[tuple[str, float]], side: float, scale: float) -> float:
    """Return the ratio of the sides of the longest rectangle in a row along ``side``."""
    areas = [size * scale for _, size in row]
    width = sum(areas) / side if side else 0.0
    return max(max(width * width / area, area / (width * width)) for area in areas) if width else 0.0


def _rectangle(box: Box, what: str) -> str:
    return (
        f'<rect x="{box.x:.1f}" y="{box.y:.1f}" width="{box.width:.1f}" height="{box.height:.1f}">'
        f"<title>{escape(what)}</title></rect>"
    )


def _text(box: Box, text: str, kind: str, figure: str = "") -> str:
    """Write a name, and a figure below it, if there is room."""
    shown = _fit(text, box.width - 8, LETTER)
    if box.height < LINE or (shown != text and len(shown) < 4):
        return ""
    words = f'<text class="{kind}" x="{box.x + 4:.1f}" y="{box.y + LINE:.1f}">{escape(shown)}</text>'
    if figure and box.height > 2 * LINE + 4 and len(figure) * LETTER < box.width - 8:
        words += f'<text x="{box.x + 4:.1f}" y="{box.y + 2 * LINE:.1f}">{figure}</text>'
    return words


def _fit(text: str, pixels: float, letter: float) -> str:
    most = max(0, int(pixels / letter))
    return text if len(text) <= most else text[: most - 1] + "…" if most else ""


def _bytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 100_000 else f"{size / 1e3:.1f} kB"
