"""The rules of the runtime hold through the command line as through the launcher: the same tests, a second driver.

Taken are the tests that run shell scripts in containers and look at what they print.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.native import test_nsexec_container, test_nsexec_escape, test_oci_fields, test_process_fields, test_seccomp
from tests.native.nsexec_support import config, make_rootfs
from tests.native.oci_support import OURS, Oci, become_subreaper, reaping

pytestmark = pytest.mark.root
MODULES = (test_nsexec_container, test_nsexec_escape, test_oci_fields, test_process_fields, test_seccomp)
#: What such a test may use of a box.
USES = {"sh", "rootfs", "path"}


class CommandBox:
    """A bundle, and scripts run in containers of it by the command line."""

    def __init__(self, path: Path, nsexec: Path) -> None:
        self.path = path
        self.rootfs = make_rootfs(path / "rootfs")
        self.oci = Oci(OURS, path / "root", nsexec)

    def sh(self, script: str, value: dict[str, Any] | None = None) -> str:
        """What a shell script prints in a new container; it must succeed."""
        value = value or config()
        value["process"]["args"] = ["sh", "-c", script]
        value["root"]["path"] = str(self.rootfs)
        (self.path / "config.json").write_text(json.dumps(value))
        return self.oci.ok("run", "-b", str(self.path), f"rules-{os.getpid()}")


def rules(module: ModuleType) -> Iterator[Callable[..., None]]:
    for name, function in vars(module).items():
        if not name.startswith("test_") or not inspect.isfunction(function):
            continue
        if list(inspect.signature(function).parameters) != ["box"] or inspect.iscoroutinefunction(function):
            continue
        body = inspect.getsource(function).partition("\n")[2]
        if set(re.findall(r"\bbox\.(\w+)", body)) <= USES and not re.search(r"\(box\b(?!\.)", body):
            yield function


RULES = [function for module in MODULES for function in rules(module)]


@pytest.fixture
def command_box(nsexec_path: Path) -> Iterator[CommandBox]:
    become_subreaper()
    with tempfile.TemporaryDirectory(prefix="caisson-box-") as directory:
        path = Path(directory)
        path.chmod(0o755)  # pytest's own directories cannot be entered by the root of a user namespace
        box = CommandBox(path, nsexec_path)
        with reaping():
            yield box
            box.oci.clear()


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule(command_box: CommandBox, rule: Callable[..., None]) -> None:
    rule(command_box)


def test_rules_are_found() -> None:
    assert len(RULES) > 20
