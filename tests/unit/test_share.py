"""Shares of a running VM: what they are called, and what serves them."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from image.vm import VMError, virtiofs
from image.vm import share as sharing


def program(directory: Path, usage: str) -> str:
    path = directory / "virtiofsd"
    path.write_text(f"#!/bin/sh\necho '{usage}'\n")
    path.chmod(0o755)
    return str(path)


def test_a_tag_is_made_of_a_directorys_name(tmp_path: Path) -> None:
    for name, tag in (("src", "src"), ("my project, 2", "my-project--2"), ("2024-x", "x"), ("___", "share")):
        (tmp_path / name).mkdir()
        assert sharing.tag_of(tmp_path / name) == tag
    assert sharing.tag_of(Path("/")) == "share"
    assert len(sharing.tag_of(tmp_path / ("x" * 99))) == 31


def test_qemus_own_and_the_one_in_rust(tmp_path: Path) -> None:
    ours = program(tmp_path, "-o source=PATH  shared directory tree")
    words = virtiofs.command(ours, Path("/a,b"), 9, writable=True)
    assert words == [ours, "--fd=9", "-o", "source=/a\\,b"]
    sealed = virtiofs.command(ours, Path("/a"), 9, writable=False)
    assert sealed[:2] == ["unshare", "--mount"] and sealed[-5:] == ["/a", ours, "--fd=9", "-o", "source=/a"]

    rust = program(tmp_path, "--shared-dir <SHARED_DIR> --readonly")
    assert virtiofs.command(rust, Path("/a,b"), 9, writable=True) == [rust, "--fd=9", "--shared-dir=/a,b"]
    assert virtiofs.command(rust, Path("/a"), 9, writable=False)[-1] == "--readonly"
    older = program(tmp_path, "--shared-dir <SHARED_DIR>")
    assert virtiofs.command(older, Path("/a"), 9, writable=False)[0] == "unshare"


def test_what_is_missing_is_told_with_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(virtiofs, "search_path", lambda: str(tmp_path))
    monkeypatch.setattr(virtiofs, "PLACES", ())
    with pytest.raises(VMError, match=r"not installed; run: sudo apt-get install virtiofsd .*invoke boot-vm --share"):
        virtiofs.program()
    program(tmp_path, "")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(VMError, match="needs root; share by 9p"):
        virtiofs.program()


def test_a_vm_without_memory_to_share(tmp_path: Path) -> None:
    info: dict[str, Any] = {"vsock": "vhost", "shares": {"data": [str(tmp_path), True]}, "virtiofs": {}}
    vm: Any = SimpleNamespace(name="v", info=info, directory=tmp_path)
    with pytest.raises(VMError, match="--vsock user, or with the share: invoke boot-vm --share src=/tmp"):
        sharing.share(vm, Path("/tmp"), "src", writable=False)
    # What it was booted with is there whatever it is asked to be called, but not read-only.
    assert sharing.share(vm, tmp_path, "other", writable=True) == sharing.Shared("9p", "data", True)
    with pytest.raises(VMError, match="9p cannot be added"):
        sharing.share(vm, tmp_path, "other", writable=False)
    with pytest.raises(VMError, match="stays until its end"):
        sharing.unshare(vm, "data")
