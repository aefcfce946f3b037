"""Run the commands in README.md and docs/: every `sh` block as written, page by page.

A page's blocks are one script, run by bash in its own directory, whose path has a space.  ```sh needs=PROGRAM runs if
the program exists, and ```sh slow if CAISSON_SLOW_DOCS is set (nightly).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.e2e.conftest import ROOT, Caisson

pytestmark = pytest.mark.vm

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])

#: Seconds for all commands of a page, with emulated guests.
TIMEOUT = 900

BLOCK = re.compile(r"^```sh([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def script(page: Path) -> str:
    """Return the page's blocks that can run here."""
    parts = []
    for words, text in BLOCK.findall(page.read_text()):
        needed = re.findall(r"needs=(\S+)", words)
        slow = "slow" in words.split() and not os.environ.get("CAISSON_SLOW_DOCS")
        if not slow and all(shutil.which(program) for program in needed):
            parts.append(text)
    return "\n".join(parts)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_stand_in_blocks_that_are_run_or_are_transcripts(page: Path) -> None:
    """An indented line, or a block of another language, would be a command that nobody runs."""
    text = page.read_text()
    # YAML is checked against the code by tests/component/test_ci.py.
    outside = re.sub(r"^```(?:sh|console|yaml).*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    assert re.findall(r"^ {4}(?:caisson|python3 tasks\.py|pip|invoke) [a-z-]+ .*", outside, re.MULTILINE) == []


@pytest.mark.timeout(TIMEOUT)
@pytest.mark.parametrize("page", [page for page in PAGES if script(page)], ids=lambda page: page.name)
def test_a_pages_commands_run_as_written(page: Path, own: Caisson, tmp_path: Path) -> None:
    place = tmp_path / "a directory"
    (place / ".bin").mkdir(parents=True)
    shutil.copy(ROOT / "README.md", place)
    command = place / ".bin/caisson"
    command.write_text('#!/bin/sh\nexec {} "$@"\n'.format(" ".join(f"'{word}'" for word in own.argv())))
    command.chmod(0o755)
    environment = own.environment | {"PATH": f"{place / '.bin'}:{os.environ['PATH']}", "HOME": str(place)}
    environment.setdefault("CAISSON_CACHE", str(Path.home() / ".cache/caisson"))
    done = subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-x", "-c", script(page)], cwd=place, env=environment,
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TIMEOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
