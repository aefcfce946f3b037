"""Test the page of the benchmark's rows: it is complete, loads nothing, and remembers runs."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

from tests.bench import picture
from tests.bench.rows import Row

ROWS = [
    Row.beside("exec, beside <crun> (ms)", 2.0, 8.0, 0.5, 1.0),
    Row.beside("stdout, beside raw vsock (ms/MiB)", 16.0, 2.0, 2.0),
    Row("idle (%)", 0.5, budget=1.0),
    Row.missing("build, beside mkosi", "minutes of mkosi are not quick"),
]


def test_runs_are_remembered_up_to_a_number(tmp_path: Path) -> None:
    file = tmp_path / "cache/bench.jsonl"
    for number in range(picture.MAX_RUNS + 3):
        runs = picture.remember([Row.beside("exec", number + 1, 1, None)], file, now=0.0)
    assert len(runs) == picture.MAX_RUNS
    assert runs[-1] == {"exec": picture.MAX_RUNS + 3}
    file.write_text(file.read_text() + '{"rows": [1')  # an interrupted run
    assert len(picture.remember([], file)) == picture.MAX_RUNS


def test_a_page_shows_every_row_and_loads_nothing() -> None:
    runs = [{"exec, beside <crun> (ms)": 0.3}, {"exec, beside <crun> (ms)": 0.25}]
    page = picture.page(ROWS, runs, "a & b")
    assert "exec, beside &lt;crun&gt; (ms)" in page and "a &amp; b" in page
    assert "not measured: minutes of mkosi are not quick" in page
    assert "0.25 to 0.3 in 2 runs" in page
    assert page.count('<circle class="pass"') == 2 and page.count('<circle class="fail"') == 1
    for outside in ("http", "<script", "<link", "@import", "url("):
        assert outside not in page


def test_drawings_are_well_formed_and_inside() -> None:
    page = picture.page(ROWS, [], "rows")
    drawings = [part.partition("</svg>")[0] + "</svg>" for part in page.split("<svg")[1:]]
    for drawing in drawings:
        root = ElementTree.fromstring(f"<svg{drawing}")
        width = float(root.attrib["width"])
        for mark in root.iter():
            for name in ("x", "x1", "x2", "cx"):
                assert 0 <= float(mark.attrib.get(name, 0)) <= width
