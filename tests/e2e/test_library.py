"""Test the example in docs/library.md, outside this repository."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import ROOT, TIMEOUT, Caisson

pytestmark = pytest.mark.vm


def test_the_example_passes_from_outside(own: Caisson, tmp_path: Path) -> None:
    files = re.findall(r"```python (\S+)\n(.*?)```", (ROOT / "docs/library.md").read_text(), re.DOTALL)
    assert [name for name, _ in files] == ["conftest.py", "test_guest.py"]
    for name, text in files:
        (tmp_path / name).write_text(text)
    words = [sys.executable, "-m", "pytest", "-q", "-p", "caisson.agent.client.pytest_plugin", "test_guest.py"]
    environment = {name: value for name, value in own.environment.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout
