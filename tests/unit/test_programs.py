"""Test finding and reporting missing programs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from caisson.commands.image import programs_to_build
from caisson.image import programs
from caisson.image.build.definition import load
from caisson.image.errors import ImageError
from caisson.image.run import run


def program(directory: Path, name: str) -> None:
    directory.mkdir(exist_ok=True)
    (directory / name).write_text("#!/bin/sh\necho found\n")
    (directory / name).chmod(0o755)


def test_programs_in_sbin_are_found_and_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path / "sbin", "mkfs.nothing")
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setattr(programs, "SYSTEM", (str(tmp_path / "sbin"),))
    programs.require(["mkfs.nothing"], report=pytest.fail)
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
        programs.require(["mksquashfs", "sqfstar", "flex"], report=pytest.fail)
    assert str(caught.value) == (
        "missing: flex, libelf-dev, squashfs-tools; "
        "install with: sudo apt-get install --yes --no-install-recommends flex libelf-dev squashfs-tools"
    )


def apt(directory: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> Path:
    """Set up a machine where the user is root and apt-get is this script; return its calls, one per line."""
    directory.mkdir()
    (directory / "apt-get").write_text(f'#!/bin/sh\necho "$@" >> {directory}/calls\n{script}\n')
    (directory / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:/usr/bin:/bin")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(programs, "LOCK_INTERVAL", 0.0)
    return directory / "calls"


def test_another_apt_is_waited_for_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    locked = "E: Could not get lock /var/lib/dpkg/lock-frontend. It is held by process 77 (apt)"
    count = f"$(wc -l < {tmp_path}/bin/calls)"
    calls = apt(tmp_path / "bin", monkeypatch, f'if [ {count} -lt 4 ]; then echo "{locked}" >&2; exit 100; fi')
    said: list[str] = []
    programs.require_packages(["bc", "xz-utils"], said.append)
    assert said[0] == "installing bc, xz-utils"
    assert [line for line in said if "held by process 77" in line and "waiting" in line] == said[1:]
    assert calls.read_text().splitlines()[-2:] == ["update", "install --yes --no-install-recommends bc xz-utils"]


def test_what_apt_cannot_do_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    apt(tmp_path / "bin", monkeypatch, 'echo "Reading…"; echo "E: Unable to locate package bc" >&2; exit 100')
    with pytest.raises(programs.MissingPrograms) as caught:
        programs.require_packages(["bc"], lambda line: None)
    assert str(caught.value) == (
        "`apt-get update`: failed (Unable to locate package bc); run it by hand to see all of its output"
    )


def test_a_missing_file_is_a_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keyring = str(tmp_path / "keyring.gpg")
    monkeypatch.setitem(programs.PACKAGES, keyring, "some-archive-keyring")
    assert programs.packages_of_missing(["sh", keyring]) == ["some-archive-keyring"]
    Path(keyring).touch()
    assert programs.packages_of_missing(["sh", keyring]) == []


@pytest.mark.parametrize(
    ("suite", "settings", "program"),
    [("bookworm", [], "lz4"), ("trixie", ["compression=lz4"], "lz4"), ("trixie", ["compression=gzip"], "gzip")],
)
def test_what_unpacks_the_kernel_and_packs_the_initrd_is_needed(suite: str, settings: list[str], program: str) -> None:
    assert program in programs_to_build(load(suite=suite, settings=settings))
    assert program not in programs_to_build(load(suite="trixie"))
