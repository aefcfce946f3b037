"""The picture of an image's bytes: areas are bytes, labels stay inside, and the whole is one file."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from caisson.image.build.treemap import Box, File, by_directory, by_package, html, squarified, svg

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
    placed = dict(squarified(named, Box(1.0, 2.0, width, height)))
    assert placed.keys() == named.keys()
    for name, box in placed.items():
        assert box.width * box.height == pytest.approx(named[name] * width * height / sum(sizes), rel=1e-6)
        assert box.x >= 1.0 - 1e-6 and box.x + box.width <= 1.0 + width * (1 + 1e-9) + 1e-6
        assert box.y >= 2.0 - 1e-6 and box.y + box.height <= 2.0 + height * (1 + 1e-9) + 1e-6


def test_labels_stay_in_their_boxes_and_in_the_picture() -> None:
    picture = ET.fromstring(svg("an image", FILES))
    width = float(picture.get("width", ""))
    for text in picture.iter(f"{SVG}text"):
        x, said = float(text.get("x", "")), str(text.text)
        assert x >= 0 and x + 6.7 * len(said) <= width + 0.1, said
    for group in picture.iter(f"{SVG}g"):
        boxes = [
            [float(one.get(name, "")) for name in ("x", "y", "width", "height")] for one in group.iter(f"{SVG}rect")
        ]
        for text in group.iter(f"{SVG}text"):
            x, y, long = float(text.get("x", "")), float(text.get("y", "")), 6.7 * len(str(text.text))
            assert any(a <= x and x + long <= a + w and b <= y <= b + h for a, b, w, h in boxes), text.text


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
