"""What is missing on a machine, and how it is said."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from caisson.image import programs
from caisson.image.errors import ImageError
from caisson.image.run import run


def program(directory: Path, name: str) -> None:
    directory.mkdir(exist_ok=True)
    (directory / name).write_text("#!/bin/sh\necho found\n")
    (directory / name).chmod(0o755)


def test_what_only_root_has_in_its_path_is_found_and_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path / "sbin", "mkfs.nothing")
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setattr(programs, "SYSTEM", (str(tmp_path / "sbin"),))
    programs.need(["mkfs.nothing"], report=pytest.fail)
    assert run(["mkfs.nothing"]) == b"found\n"


def test_path_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path / "mine", "mkfs.nothing")
    program(tmp_path / "sbin", "mkfs.nothing")
    monkeypatch.setenv("PATH", str(tmp_path / "mine"))
    monkeypatch.setattr(programs, "SYSTEM", (str(tmp_path / "sbin"),))
    assert programs.which("mkfs.nothing") == str(tmp_path / "mine/mkfs.nothing")


def test_an_ordinary_user_is_told_the_one_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(programs, "which", lambda name: None)
    with pytest.raises(ImageError) as caught:
        programs.need(["mksquashfs", "sqfstar", "flex"], report=pytest.fail)
    assert str(caught.value) == (
        "missing: flex, libelf-dev, squashfs-tools; "
        "install with: sudo apt-get install --yes --no-install-recommends flex libelf-dev squashfs-tools"
    )
