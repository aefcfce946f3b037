"""Test the initramfs archive, read back with cpio and with a reader of our own."""

from __future__ import annotations

import io
import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from caisson.image.errors import ImageError
from caisson.image.formats import initrd
from caisson.image.formats.scan import merge_directories
from caisson.image.formats.tree import Node


def archive(*trees: Path, **extra: Node) -> bytes:
    target = io.BytesIO()
    with merge_directories(trees, initrd.CONSOLE | extra if extra else {}) as tree:
        initrd.write_cpio(target, tree)
    return target.getvalue()


def members(data: bytes) -> Iterator[tuple[str, list[int], bytes]]:
    """Return the name, header fields and contents of each member, as described by buffer-format.rst."""
    at = 0
    while True:
        assert data[at : at + 6] == b"070701"
        fields = [int(data[at + 6 + 8 * index : at + 14 + 8 * index], 16) for index in range(13)]
        size, name_size = fields[6], fields[11]
        name = data[at + 110 : at + 110 + name_size]
        assert name[-1] == 0
        at = -(-(at + 110 + name_size) // 4) * 4
        contents = data[at : at + size]
        at = -(-(at + size) // 4) * 4
        if name == b"TRAILER!!!\0":
            assert data[at:].strip(b"\0") == b""
            return
        yield os.fsdecode(name[:-1]), fields, contents


def test_a_directory_in_the_place_of_a_link_to_one_is_that_one(tree: Path, tmp_path: Path) -> None:
    """A template's bin/ must not take the guest's link, and with it /bin/sh, away."""
    layer = tmp_path / "layer"
    (layer / "bin").mkdir(parents=True)
    (layer / "bin/hello").write_text("hi")
    found = {name: fields[1] for name, fields, _ in members(archive(tree, layer))}
    assert stat.S_ISLNK(found["bin"]) and "usr/bin/hello" in found and "usr/bin/program" in found


def test_a_file_and_a_directory_do_not_take_each_others_place(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "layer").mkdir()
    (tmp_path / "layer/usr").write_text("x")
    with pytest.raises(ImageError, match=r"^/usr: is a directory in the guest, and not one in a layer above it"):
        archive(tree, tmp_path / "layer")
    (tmp_path / "other/a file").mkdir(parents=True)
    with pytest.raises(ImageError, match=r"^/a file: is not a directory in the guest, and one in a layer above it"):
        archive(tree, tmp_path / "other")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    tree = tmp_path / "tree"
    (tree / "usr/bin").mkdir(parents=True)
    (tree / "usr/bin/program").write_bytes(b"\x7fELF")
    (tree / "usr/bin/program").chmod(0o4711)
    (tree / "usr/bin/link").symlink_to("program")
    (tree / "bin").symlink_to("usr/bin")
    (tree / "a file").write_text("text")
    (tree / "a file").chmod(0o600)
    (tree / "usr/empty").touch()
    (tree / "tmp").mkdir()
    (tree / "tmp").chmod(0o1700)
    (tree / "dangling").symlink_to("/nowhere")
    (tree / "größe").write_text("é")
    return tree


def test_a_tree_reads_back_as_it_is(tree: Path) -> None:
    read = {name: (fields, data) for name, fields, data in members(archive(tree))}
    assert {name: oct(fields[1]) for name, (fields, _) in read.items()} == {
        "a file": oct(stat.S_IFREG | 0o644),
        "bin": oct(stat.S_IFLNK | 0o777),
        "dangling": oct(stat.S_IFLNK | 0o777),
        "größe": oct(stat.S_IFREG | 0o644),
        "tmp": oct(stat.S_IFDIR | 0o1777),
        "usr": oct(stat.S_IFDIR | 0o755),
        "usr/bin": oct(stat.S_IFDIR | 0o755),
        "usr/bin/link": oct(stat.S_IFLNK | 0o777),
        "usr/bin/program": oct(stat.S_IFREG | 0o755),
        "usr/empty": oct(stat.S_IFREG | 0o644),
    }
    assert read["bin"][1] == b"usr/bin"
    assert read["dangling"][1] == b"/nowhere"
    assert read["usr/bin/program"][1] == b"\x7fELF"
    assert read["größe"][1] == "é".encode()
    assert all(fields[2:4] == [0, 0] and fields[5] == 0 for fields, _ in read.values()), "wrong owner or time"
    assert len({fields[0] for fields, _ in read.values()}) == len(read), "duplicate inode numbers mean hard links"


def test_cpio_agrees(tree: Path) -> None:
    data = archive(tree, dev=Node.of(stat.S_IFDIR | 0o755))
    listed = subprocess.run(["cpio", "-it", "--quiet"], input=data, capture_output=True, check=True)
    assert [os.fsencode(name) for name, _, _ in members(data)] == [
        # cpio prints non-ASCII bytes unchanged if it does not write to a terminal
        line
        for line in listed.stdout.splitlines()
    ]
    verbose = subprocess.run(["cpio", "-itv", "--quiet"], input=data, capture_output=True, check=True).stdout.decode()
    console = next(line for line in verbose.splitlines() if line.endswith("dev/console"))
    assert console.startswith("crw-------")
    assert "5,   1" in console
    assert "dangling -> /nowhere" in verbose


def test_the_same_tree_gives_the_same_bytes(tree: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tree, other, symlinks=True)
    for path in other.rglob("*"):
        os.utime(path, (1, 1), follow_symlinks=False)
    (other / "usr").chmod(0o700)
    (other / "a file").chmod(0o664)
    assert archive(tree) == archive(other)


def test_parents_come_before_their_members(tree: Path) -> None:
    (tree / "usr.d").mkdir()  # "." sorts before "/"
    (tree / "usr-x").touch()
    seen: set[str] = {""}
    for name, _, _ in members(archive(tree, dev=Node.of(stat.S_IFDIR | 0o755))):
        assert name.rpartition("/")[0] in seen
        seen.add(name)
    assert {"dev/console", "usr.d", "usr/bin/program"} <= seen


def test_the_layer_on_top_wins(tree: Path, tmp_path: Path) -> None:
    layer = tmp_path / "layer"
    (layer / "usr/bin").mkdir(parents=True)
    (layer / "usr/bin/program").write_text("#!newer")
    merged = {name: data for name, _, data in members(archive(tree, layer))}
    assert merged["usr/bin/program"] == b"#!newer"
    assert merged["usr/bin/link"] == b"program"


@pytest.mark.parametrize(("compression", "unpack"), [("gzip", ["gzip", "-dc"]), ("zstd", ["zstd", "-dcq"])])
def test_packing_loses_nothing(compression: str, unpack: list[str]) -> None:
    data = archive(big=Node.of(stat.S_IFREG | 0o644, b"x" * 100_000))
    packed = initrd.pack(data, compression)
    assert len(packed) < 1000
    assert initrd.pack(data, compression) == packed
    assert subprocess.run(unpack, input=packed, capture_output=True, check=True).stdout == data


def test_not_packing() -> None:
    assert initrd.pack(b"as it is", "none") == b"as it is"
