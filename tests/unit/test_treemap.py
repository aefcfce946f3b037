"""Test the picture of an image's bytes: areas are proportional to bytes, labels fit, and it is one file."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from caisson.image.build.treemap import Box, File, by_directory, by_package, html, squarify, svg

SVG = "{http://www.w3.org/2000/svg}"

FILES = [
    File("vmlinux", 20_000_000, "kernel", "kernel"),
    File("usr/lib/python3.13/asyncio/events.pyc", 300_000, "libpython3.13-stdlib", "Debian packages"),
    File("usr/lib/python3.13/os.pyc", 200_000, "libpython3.13-stdlib", "Debian packages"),
    File("usr/bin/python3.13", 6_000_000, "python3.13-minimal", "Debian packages"),
    File("usr/lib/caisson/google/protobuf/x.so", 2_000_000, "protobuf", "Python wheels"),
    File("etc/<motd>&", 10, "files", "template"),
    *(File(f"etc/{number}", 1, f"small-{number}", "Debian packages") for number in range(50)),
]


def test_bytes_are_counted_by_package_and_by_directory() -> None:
    packages = by_package(FILES)
    assert packages["Debian packages"]["libpython3.13-stdlib"] == 500_000
    assert sum(sum(inner.values()) for inner in packages.values()) == sum(file.size for file in FILES)
    directories = by_directory(FILES)
    assert directories["usr/lib/python3.13"] == {"asyncio/": 300_000, "os.pyc": 200_000}
    assert directories["/"] == {"vmlinux": 20_000_000}
    assert sum(sum(inner.values()) for inner in directories.values()) == sum(file.size for file in FILES)


@given(st.lists(st.integers(1, 1 << 30), min_size=1, max_size=40), st.floats(10, 2000), st.floats(10, 2000))
def test_rectangles_fill_the_box_by_their_sizes(sizes: list[int], width: float, height: float) -> None:
    named = {str(number): size for number, size in enumerate(sorted(sizes, reverse=True))}
    placed = dict(squarify(named, Box(1.0, 2.0, width, height)))
    assert placed.keys() == named.keys()
    for name, box in placed.items():
        assert box.width * box.height == pytest.approx(named[name] * width * height / sum(sizes), rel=1e-6)
        assert box.x >= 1.0 - 1e-6 and box.x + box.width <= 1.0 + width * (1 + 1e-9) + 1e-6
        assert box.y >= 2.0 - 1e-6 and box.y + box.height <= 2.0 + height * (1 + 1e-9) + 1e-6


LETTER, LINE = 6.7, 14


def assert_labels_fit(picture: ET.Element) -> None:
    """Check that each text is within the rectangle drawn last, letter by letter, and overlaps no other text."""
    width = float(picture.get("width", ""))
    for text in picture.findall(f"{SVG}text"):
        letter = 9.7 if text.get("class") == "title" else LETTER
        assert float(text.get("x", "")) + letter * len(str(text.text)) <= width, text.text
    for group in picture.iter(f"{SVG}g"):
        box = [0.0] * 4
        lines: list[float] = []
        for one in group:
            if one.tag == f"{SVG}rect":
                box = [float(one.get(name, "")) for name in ("x", "y", "width", "height")]
                lines = []
                continue
            x, y, long = float(one.get("x", "")), float(one.get("y", "")), LETTER * len(str(one.text))
            assert box[0] < x and x + long < box[0] + box[2], one.text
            assert box[1] + LINE - 0.2 <= y <= box[1] + box[3] + 0.2, one.text  # rounded to tenths
            assert all(abs(y - line) > LINE - 0.2 for line in lines), one.text
            lines.append(y)


def test_labels_stay_in_their_boxes_and_in_the_picture() -> None:
    assert_labels_fit(ET.fromstring(svg("an image", FILES)))
    assert_labels_fit(ET.fromstring(svg("/a/very/long/path" * 20, FILES)))


names = st.text(st.characters(min_codepoint=32, max_codepoint=0x2FF, exclude_characters="/"), min_size=1, max_size=60)


@settings(max_examples=60)
@given(st.lists(st.tuples(names, names, names, st.integers(1, 1 << 40)), min_size=1, max_size=30))
def test_labels_of_any_names_and_sizes_stay_in_their_boxes(made: list[tuple[str, str, str, int]]) -> None:
    files = [File(f"{path}/{package}", size, package, kind) for path, package, kind, size in made]
    assert_labels_fit(ET.fromstring(svg("an image", files)))


def test_a_name_that_is_cut_ends_in_a_mark_and_keeps_what_fits() -> None:
    picture = ET.fromstring(svg("x", [File("f", 1000, "n" * 400, "k")]))
    (cut,) = [str(text.text) for text in picture.iter(f"{SVG}text") if str(text.text).startswith("nnn")]
    assert cut.endswith("…") and len(cut) == int((1200 - 8) / LETTER)


def test_the_largest_are_named_and_the_small_ones_are_one() -> None:
    picture = ET.fromstring(svg("an image", FILES))
    shown = [str(text.text) for text in picture.iter(f"{SVG}text")]
    assert any(one.startswith("kernel 20.0 MB") for one in shown) and "python3.13-minimal" in shown
    titles = [str(title.text) for title in picture.iter(f"{SVG}title")]
    assert "Debian packages, 50 others: 0.1 kB" in titles
    assert not any("small-" in one for one in titles)


def test_a_page_is_one_file_and_names_are_text() -> None:
    page = html("<an image>", [*FILES, File("a/b/c/<script>", 9_000_000, "<b>", "template")])
    assert page.startswith("<!doctype html>") and "<script>" not in page and "<b>" not in page
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")
    assert "src=" not in page and "href=" not in page


def test_an_image_without_bytes_is_drawn() -> None:
    assert ET.fromstring(svg("nothing", [])).tag == f"{SVG}svg"


def test_groups_come_by_their_sizes() -> None:
    picture = ET.fromstring(svg("an image", FILES))
    heads = [str(group[0][0].text) for group in picture.iter(f"{SVG}g")]
    first = [float(head.rpartition(" ")[0].rpartition(" ")[2]) for head in heads if head.endswith("MB")][:3]
    assert all(one >= other for one, other in pairwise(first))
