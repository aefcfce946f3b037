"""Test packing OCI bundles: their configuration and root, even if files are swapped meanwhile."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from caisson.image.errors import ImageError
from caisson.image.formats import scan
from caisson.image.formats.tree import Malformed, Node
from tests.build.oci_example import listed, read

pytestmark = pytest.mark.skipif(shutil.which("sqfstar") is None, reason="needs squashfs-tools")


def test_a_bundle(tmp_path: Path) -> None:
    (tmp_path / "b/files/etc").mkdir(parents=True)
    (tmp_path / "b/config.json").write_text('{"root": {"path": "files"}, "process": {"args": ["x"]}}')
    assert read(tmp_path / "b").bundle["process"] == {"args": ["x"]}
    assert "etc" in listed(tmp_path / "b") and "config.json" not in listed(tmp_path / "b")
    (tmp_path / "b/config.json").write_text("[]")
    with pytest.raises(Malformed, match="not a JSON object"):
        read(tmp_path / "b")


@pytest.mark.parametrize("kind", ["fifo", "link", "device"])
def test_the_configuration_of_a_bundle_is_a_file_of_its_own(tmp_path: Path, kind: str) -> None:
    """A FIFO would block, a link leads to another document, and some devices are endless."""
    (tmp_path / "secret.json").write_text('{"root": {"path": "rootfs"}}')
    (tmp_path / "b/rootfs/etc").mkdir(parents=True)
    if kind == "fifo":
        os.mkfifo(tmp_path / "b/config.json")
    else:
        (tmp_path / "b/config.json").symlink_to(tmp_path / "secret.json" if kind == "link" else "/dev/zero")
    with pytest.raises(ImageError, match=r"config\.json: not a regular file"):
        read(tmp_path / "b")


@pytest.mark.parametrize("path", ["..", "../outside", "files/../../outside", "link", "link/etc", "/etc"])
def test_a_bundle_is_read_beneath_its_own_directory(tmp_path: Path, path: str) -> None:
    (tmp_path / "outside/etc").mkdir(parents=True)
    bundle = tmp_path / "bundle"
    (bundle / "files/etc").mkdir(parents=True)
    (bundle / "link").symlink_to(tmp_path / "outside")
    (bundle / "config.json").write_text(json.dumps({"root": {"path": path}}))
    with pytest.raises(ImageError, match=r"root\.path"):
        read(bundle)
    (bundle / "config.json").write_text(json.dumps({"root": {"path": str(bundle.resolve() / "files")}}))
    assert "etc" in listed(bundle)


@pytest.mark.parametrize("moment", ["found", "scanned"])
def test_a_bundle_that_is_exchanged_under_the_build_shows_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """The owner of the bundle replaces a directory with a link: after it was found, or before its files are read."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/passwd").write_text("secret")
    etc = tmp_path / "bundle/rootfs/etc"
    etc.mkdir(parents=True)
    (etc / "passwd").write_text("public")

    def exchange() -> None:
        etc.rename(tmp_path / "old")
        etc.symlink_to(tmp_path / "outside")

    scanned = scan._scanned

    def scanned_and_exchanged(directory: int, name: bytes, path: bytes, state: os.stat_result) -> Node:
        node = scanned(directory, name, path, state)
        if name == b"etc":
            exchange()
        return node

    if moment == "found":
        monkeypatch.setattr(scan, "_scanned", scanned_and_exchanged)
        with pytest.raises(ImageError, match="etc"):
            scan.from_directory(tmp_path / "bundle/rootfs")
        return
    with scan.from_directory(tmp_path / "bundle/rootfs") as tree:
        exchange()
        with pytest.raises(OSError, match="etc"):
            _ = [node.read() for _, node in tree.files()]
