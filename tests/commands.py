"""Implement the commands for developers, available only in a checkout: test and bench.  catalogue.py declares them."""

from __future__ import annotations

import importlib.util
import itertools
import os
import platform
import subprocess
import sys
import tomllib
from pathlib import Path

from caisson.commands.parse import CommandLineError
from caisson.commands.streams import info
from caisson.image.programs import (
    DEBIAN_KEYRING,
    QEMU,
    TO_BUILD,
    TO_COMPILE,
    TO_PACK,
    TO_UNPACK_KERNEL,
    require,
    to_cross_build,
)

ROOT = Path(__file__).resolve().parents[1]

#: The other architecture for which guests are built on this machine.
FOREIGN = {"aarch64": "x86_64-linux-gnu"}.get(platform.machine(), "aarch64-linux-gnu")

#: Further programs that tests need: to create and read images, to sign repositories, to compare with.
TO_TEST = (
    DEBIAN_KEYRING, *TO_BUILD, *to_cross_build(FOREIGN), *TO_COMPILE, *QEMU.values(), *TO_PACK,
    *(() if FOREIGN.startswith("x86_64") else ("/usr/aarch64-linux-gnu/lib/libc.a",)),
    *itertools.chain(*TO_UNPACK_KERNEL.values()), "/usr/bin/python3", "apt-ftparchive", "busybox", "clang",
    "clang-format", "cpio", "crun", "curl", "faketime", "fish", "go", "gpg", "ip", "iptables", "mke2fs", "mmdebstrap",
    "openssl", "runc", "sfdisk", "veritysetup", "zsh",
)  # fmt: skip


def test(*, quick: bool, nested: bool, words: list[str]) -> None:
    """Install the tests' requirements, and execute pytest."""
    if not quick:
        _need_all()
    _install("test")
    os.chdir(ROOT)
    os.execv(sys.executable, [sys.executable, "-m", "pytest", *selection(quick, nested, words), *words])


def selection(quick: bool, nested: bool, words: list[str]) -> list[str]:
    """Return pytest's arguments for a choice of tests, to precede the user's: in a conflict, the last one counts."""
    selected = ["-m", "quick"] if quick else []
    if quick and all(word.startswith("-") for word in words):  # they are all in one directory
        selected.append("tests/unit")
    if nested:
        selected += ["-s", "tests/nested"]
        if not any(word.startswith("-m") for word in words):  # all tests take hours
            selected += ["-m", "nested and nightly", "-k", "test_a_guest_runs and trixie"]
    return selected


def bench(*, quick: bool, as_json: bool, html: str | None) -> None:
    """Install the benchmark's requirements, and execute the benchmark."""
    _need_all()
    _install("test")
    words = [f"--{name}" for name, wanted in (("quick", quick), ("json", as_json)) if wanted]
    if html:
        words += ["--html", os.path.abspath(html)]  # noqa: PTH100 - not resolved: a link may be meant
    os.chdir(ROOT)
    os.execv(sys.executable, [sys.executable, "-m", "tests.bench", *words])


def _need_all() -> None:
    require(TO_TEST, info)
    require(("virtiofsd",), info)  # checked after installing QEMU, whose packages include it up to 7.2


def _install(extra: str) -> None:
    """Install an extra's requirements into .venv, in the versions of constraints.txt."""
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"][extra]
    if importlib.util.find_spec("pytest") is None:
        info(f"installing what the tests need into {Path(sys.prefix).name}")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", "constraints.txt"]
    if subprocess.run([*pip, *wanted], cwd=ROOT, env=os.environ | {"PIP_USER": "0"}).returncode != 0:
        raise CommandLineError("pip: could not install what the tests need; its message is above", 1)
