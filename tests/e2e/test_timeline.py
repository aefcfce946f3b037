"""Test boot-vm --timeline: a real boot, from the request to the first response."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest

from tests.e2e.conftest import TIMEOUT, Caisson

pytestmark = [pytest.mark.root, pytest.mark.vm]


@pytest.mark.timeout(2 * TIMEOUT)
def test_the_time_of_a_boot_is_accounted_for(own: Caisson, tmp_path: Path) -> None:
    file = tmp_path / "boot.json"
    booted = own("boot-vm", "--detach", "--timeline", str(file))
    assert booted.returncode == 0, booted.stderr.decode()
    seconds = own.info("default")["boot_seconds"]
    assert own("stop-vm").returncode == 0
    document = json.loads(file.read_text())
    spans = document["spans"]
    assert [span["name"] for span in spans] == [
        "supervisor", "QEMU", "firmware", "kernel", "Python's start", "duties of PID 1",
        "options, a socket that listens", "imports", "its server", "the first request arrives",
        "first answer",
    ]  # fmt: skip
    assert all(span["seconds"] > 0 for span in spans)
    assert all(
        one["start"] + one["seconds"] == pytest.approx(next_["start"], abs=1e-4) for one, next_ in pairwise(spans)
    )
    assert sum(span["seconds"] for span in spans) == pytest.approx(document["seconds"], abs=1e-3)
    assert document["seconds"] == pytest.approx(seconds, abs=0.1, rel=0.01)
    assert document["error"] < max(0.1, 0.01 * seconds)
    parts = {span["name"]: [part["name"] for part in span["parts"]] for span in spans}
    assert "acpi_init" in parts["kernel"]
    assert "load modules" in parts["duties of PID 1"]
    assert any(name.startswith("caisson.agent.") for name in parts["imports"]), parts["imports"]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--timeline", "boot.png"], "must end in .svg or .json"),
        (["--timeline", "/nowhere/boot.svg"], "cannot be written"),
        (["--timeline", "/tmp/boot.svg", "--snapshot", "x"], "--snapshot: cannot be combined with --timeline"),
    ],
)
def test_timeline_rejects_impossible_requests(own: Caisson, words: list[str], complaint: str) -> None:
    refused = own("boot-vm", *words)
    assert refused.returncode == 2
    assert complaint in refused.stderr.decode()
