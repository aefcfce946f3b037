"""Test `caisson bench` in a checkout used only to run guests: it installs its requirements, and shows failures."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.bench import __main__ as bench

ROOT = Path(__file__).resolve().parents[2]

#: Stands for .venv's interpreter: records its arguments, and exits as told.
RECORDER = """\
#!/bin/sh
echo "$@" >>"${0%/*}/asked"
exit "$(cat "${0%/*}/$2" 2>/dev/null || echo 0)"
"""

BENCH = "import sys; sys.executable = sys.argv[1]; from tests import commands; commands._need_all = lambda: None; "


def asked(place: Path, call: str) -> tuple[list[str], subprocess.CompletedProcess[str]]:
    """Return what a developers' command runs its interpreter with, line by line."""
    interpreter = place / "python"
    interpreter.write_text(RECORDER)
    interpreter.chmod(0o755)
    words = [sys.executable, "-c", f"{BENCH}commands.{call}", str(interpreter)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    return (place / "asked").read_text().splitlines(), done


@pytest.mark.parametrize(
    ("call", "becomes"),
    [
        ("bench(quick=True, as_json=True, html=None)", "-m tests.bench --quick --json"),
        ("test(quick=False, nested=False, words=['-q'])", "-m pytest -q"),
    ],
)
def test_what_is_missing_is_installed_first(tmp_path: Path, call: str, becomes: str) -> None:
    lines, done = asked(tmp_path, call)
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["test"]
    assert len(lines) == 2 and lines[0].startswith("-m pip install ") and lines[1] == becomes, done.stderr
    assert all(one in lines[0].split() for one in wanted)


def test_what_cannot_be_installed_ends_it_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "pip").write_text("1")
    lines, done = asked(tmp_path, "bench(quick=True, as_json=False, html=None)")
    assert len(lines) == 1 and done.returncode == 1 and "pip: could not install what the tests need" in done.stderr


def test_what_a_part_says_when_it_fails_is_shown(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(bench.PARTS, "no_such_part", ([], []))
    (row,) = bench.measured("no_such_part", quick=True)
    assert row.passed is not True and "tests.bench.no_such_part failed with status 1" in str(row.plain())
    assert "No module named tests.bench.no_such_part" in capfd.readouterr().err
