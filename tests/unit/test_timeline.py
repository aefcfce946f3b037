"""Test converting a recorded boot (data/boot.json: Debian's kernel, emulated, few initcalls) to spans and a picture."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from caisson.image.vm.drawing import svg
from caisson.image.vm.timeline import GuestTimes, HostTimes, Span, Timeline, TimelineError, timeline
from tests.native.agent_support import ROOT

RECORDED: dict[str, Any] = json.loads((ROOT / "tests/unit/data/boot.json").read_text())
HOST = HostTimes(**RECORDED["host"])
GUEST = GuestTimes(**RECORDED["guest"])
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def boot() -> Timeline:
    return timeline("a boot", HOST, GUEST)


def named(spans: tuple[Span, ...], name: str) -> Span:
    return next(span for span in spans if span.name == name)


def test_spans_follow_each_other_and_sum_to_the_whole(boot: Timeline) -> None:
    assert [span.name for span in boot.spans] == [
        "supervisor", "QEMU", "firmware", "kernel", "Python's start", "duties of PID 1",
        "options, a socket that listens", "imports", "its server", "the first request arrives",
        "first answer",
    ]  # fmt: skip
    assert boot.spans[0].start == 0
    assert all(one.end == pytest.approx(next_.start) for one, next_ in pairwise(boot.spans))
    assert sum(span.seconds for span in boot.spans) == pytest.approx(HOST.answered - HOST.asked)
    assert all(span.seconds >= 0 for span in boot.spans)


def test_the_slow_parts_are_named(boot: Timeline) -> None:
    kernel = named(boot.spans, "kernel")
    acpi = named(kernel.parts, "acpi_init")
    told = re.search(r"initcall acpi_init\S+ returned 0 after (\d+) usecs", GUEST.kernel_log)
    assert told is not None
    assert acpi.seconds == pytest.approx(int(told[1]) / 1e6)
    assert {"until its clock runs", "initrd unpacked"} <= {part.name for part in kernel.parts}
    assert all(span.start <= part.start < span.end for span in boot.spans for part in span.parts)
    assert "load modules" in [part.name for part in named(boot.spans, "duties of PID 1").parts]
    asyncio = named(named(boot.spans, "imports").parts, "asyncio")
    assert named(named(asyncio.parts, "asyncio.base_events").parts, "asyncio.coroutines").seconds < asyncio.seconds


def test_the_kernels_clock_is_tied_by_the_line_that_was_written_soonest() -> None:
    """An agent that is delayed between reading the clock and writing reports less than it seems."""
    log = GUEST.kernel_log + "15,9999,90000000,-;caisson agent: clock 80000000\n"
    assert timeline("", HOST, replace(GUEST, kernel_log=log)) == timeline("", HOST, GUEST)


@pytest.mark.parametrize(("line", "complaint"), [("caisson agent: clock", "ties its clock"), ("Run /init", "init")])
def test_a_log_that_lacks_a_line_is_refused_by_name(line: str, complaint: str) -> None:
    kept = [each for each in GUEST.kernel_log.splitlines() if line not in each]
    with pytest.raises(TimelineError, match=complaint):
        timeline("", HOST, replace(GUEST, kernel_log="\n".join(kept)))


def test_a_silent_firmware_is_not_told_from_the_kernel() -> None:
    spans = timeline("", replace(HOST, firmware=None), GUEST).spans
    assert [span.name for span in spans][:3] == ["supervisor", "kernel", "Python's start"]


def test_as_json(boot: Timeline) -> None:
    document = json.loads(boot.json())
    assert document["seconds"] == pytest.approx(boot.seconds, abs=1e-5)
    assert document["spans"][3]["name"] == "kernel"
    assert document["spans"][3]["parts"][0].keys() == {"name", "kind", "start", "seconds", "parts"}


def test_the_document_opens_as_a_trace(boot: Timeline) -> None:
    """Trace Event Format: complete events need name, ph, ts, dur, pid and tid; slices of a thread nest."""
    events = [event for event in json.loads(boot.json())["traceEvents"] if event["ph"] == "X"]
    assert all(event.keys() >= {"name", "ts", "dur", "pid", "tid"} and event["dur"] >= 0 for event in events)
    assert sum(event["dur"] for event in events if event["name"] in {span.name for span in boot.spans}) == (
        pytest.approx(boot.seconds * 1e6, abs=50)
    )
    for one in events:
        for other in events:
            if one["tid"] == other["tid"] and one["ts"] < other["ts"] < one["ts"] + one["dur"]:
                assert other["ts"] + other["dur"] <= one["ts"] + one["dur"] + 1


def test_labels_stay_inside_and_are_in_seconds() -> None:
    span = Span("W" * 200, "agent", 0.0, 0.25, (Span("M" * 200, "agent", 0.0, 0.2),))
    picture = ET.fromstring(svg(Timeline("boot of " + "W" * 300, (span,), 0.001)))
    width = float(picture.get("width", ""))
    for text in picture.iter(f"{SVG}text"):
        said, x, kind = str(text.text), float(text.get("x", "")), str(text.get("class"))
        size = 9.1 if "title" in kind else 6.7 if "note" in kind or "axis" in kind else 7.3
        length = len(said) * size
        left = x - (length if "figure" in kind else length / 2 if "axis" in kind else 0)
        assert left >= 0 and left + length <= width, said
        assert "ms" not in said
    assert "0.250 s" in [text.text for text in picture.iter(f"{SVG}text")]


def test_the_picture_has_a_row_for_each_span_and_no_text_meets_another(boot: Timeline) -> None:
    picture = ET.fromstring(svg(boot))
    texts = [
        (float(text.get("x", "")), float(text.get("y", "")), str(text.text)) for text in picture.iter(f"{SVG}text")
    ]
    names = [text for x, _, text in texts if x < 270]
    assert all(any(name.startswith(span.name[:12]) for name in names) for span in boot.spans)
    rows = [y for x, y, _ in texts if x < 270]
    assert all(lower - upper >= 18 for upper, lower in pairwise(sorted(rows)))
    assert all(len(text) * 7 <= 270 - x for x, y, text in texts if 12 <= x < 270 and y > 60)
    bars = [bar for bar in picture.iter(f"{SVG}rect") if bar.get("class") != "ground"]
    assert all(float(bar.get("x", "")) >= 270 for bar in bars)
    assert all(float(bar.get("x", "")) + float(bar.get("width", "")) <= 872 for bar in bars)
    assert re.search(r"prefers-color-scheme:dark", svg(boot))


def test_names_are_text_and_nothing_else() -> None:
    span = Span("<script>&", "agent", 0.0, 1.0)
    assert "<script>" not in svg(Timeline("<&>", (span,), 0.0))
