"""The commands that test and measure.  tasks.py lends them `say`, and `words` (what follows `--`)."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

from invoke import Context, task

from caisson.agent.client import UsageError
from caisson.image.programs import TO_BOOT, TO_BUILD, TO_COMPILE, TO_PACK, need

ROOT = Path(__file__).resolve().parents[1]

#: What the tests need besides: to make and read images, to sign repositories with, to compare with.
TO_TEST = (
    *TO_BUILD, *TO_COMPILE, *TO_BOOT, *TO_PACK, "/usr/bin/python3", "busybox", "clang", "clang-format", "cpio", "crun",
    "curl", "faketime", "gpg", "ip", "mke2fs", "openssl", "runc", "sfdisk", "veritysetup",
)  # fmt: skip


def _need_all(context: Context) -> None:
    need(TO_TEST, context.say)
    need(("virtiofsd",), context.say)  # looked for after QEMU has come, since up to 7.2 QEMU's packages bring it


@task(help={"quick": "fewer samples: less than five minutes", "json": "as a list of rows"})
def bench(context: Context, quick: bool = False, json: bool = False) -> None:
    """Measure everything beside its peer and its limit; fails when a budget is exceeded. docs/performance.md explains.

    Example: invoke bench --quick
    """
    _need_all(context)
    words = [f"--{name}" for name, wanted in (("quick", quick), ("json", json)) if wanted]
    os.chdir(ROOT)
    os.execv(sys.executable, [sys.executable, "-m", "tests.bench", *words])


@task
def test(context: Context) -> None:
    """Set up what the tests need and run them: invoke test [-- PYTEST ARGUMENTS]

    Example: invoke test -- tests/unit -k definition
    """
    _need_all(context)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["test"]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *extras]
    if subprocess.run(pip).returncode != 0:
        raise UsageError("pip could not install what the tests need; its message is above")
    os.chdir(ROOT)
    os.execv(sys.executable, [sys.executable, "-m", "pytest", *context.words()])
