"""Test files that arrive in pieces."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from caisson.agent.base.errors import InvalidArgument, PathOutside, SystemCallFailed
from caisson.agent.guest.files import UNFINISHED, Files, Piece


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


@pytest.fixture
def files(root: Path) -> Iterator[Files]:
    files = Files(str(root))
    before = len(list(Path("/proc/self/fd").iterdir()))
    yield files
    files.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert not [path for path in root.rglob("*") if path.name.startswith(".caisson")]


def piece(root: Path, name: str, data: bytes, *, size: int | None = None, offset: int = 0, mode: int = 0o640) -> Piece:
    return Piece(
        path=f"{root}/{name}",
        size=len(data) if size is None else size,
        offset=offset,
        data=data,
        mode=mode,
        directory_mode=0o750,
        uid=os.getuid(),
        gid=os.getgid(),
    )


def test_a_file_in_one_piece(root: Path, files: Files) -> None:
    umask = os.umask(0o022)
    try:
        files.write(piece(root, "a/b/file", b"hello", mode=0o104755))
    finally:
        os.umask(umask)
    made = root / "a/b/file"
    assert made.read_bytes() == b"hello"
    assert made.stat().st_mode == 0o100755  # a host's setuid bit is dropped
    assert (root / "a").stat().st_mode & 0o777 == 0o750
    files.write(piece(root, "a/b/file", b""))
    assert made.read_bytes() == b""


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_pieces_in_any_order(root: Path, files: Files, order: tuple[int, ...]) -> None:
    parts = [(0, b"abc"), (3, b"def"), (6, b"gh")]
    for number in order:
        assert not (root / "file").exists()
        offset, data = parts[number]
        for _ in range(2):  # a repeated piece changes nothing
            if not (root / "file").exists():
                files.write(piece(root, "file", data, size=8, offset=offset))
    assert (root / "file").read_bytes() == b"abcdefgh"


def test_a_last_piece_with_a_hole_before_it_does_not_complete_the_file(root: Path, files: Files) -> None:
    files.write(piece(root, "file", b"z", size=100, offset=99))
    assert list(root.iterdir()) == []


def test_other_contents_begin_anew(root: Path, files: Files) -> None:
    files.write(piece(root, "file", b"old!", size=8))
    files.write(piece(root, "file", b"new!", size=8))
    files.write(piece(root, "file", b"tail", size=8, offset=4))
    assert (root / "file").read_bytes() == b"new!tail"
    files.write(piece(root, "file", b"long", size=8))
    files.write(piece(root, "file", b"short", size=5))
    assert (root / "file").read_bytes() == b"short"


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "file", "", "{root}", "{root}/../x", "{root}ning/x", "/", "{root}/a/../../x", "../x"]
)
def test_paths_elsewhere(root: Path, files: Files, path: str) -> None:
    with pytest.raises(PathOutside, match=f"is not below {root}"):
        files.write(Piece(path=path.format(root=root), size=1, offset=0, data=b"x"))
    assert sorted(path.name for path in root.parent.iterdir()) == ["root"]


@pytest.mark.parametrize("where", ["link/file", "link/sub/file", "a/link/file"])
def test_links_are_not_followed(root: Path, files: Files, where: str) -> None:  # CVE-2026-41326, GHSA-q49m-57vm-c8cc
    outside = root.parent / "outside"
    outside.mkdir()
    (root / "a").mkdir()
    (root / where.rpartition("link")[0] / "link").symlink_to(outside)
    with pytest.raises(SystemCallFailed):
        files.write(piece(root, where, b"x"))
    assert list(outside.iterdir()) == []
    outside.rmdir()


def test_a_link_is_replaced(root: Path, files: Files) -> None:
    (root / "victim").write_bytes(b"untouched")
    (root / "file").symlink_to(root / "victim")
    files.write(piece(root, "file", b"x"))
    assert (root / "victim").read_bytes() == b"untouched"
    assert not (root / "file").is_symlink() and (root / "file").read_bytes() == b"x"


def test_copy_reports_obstacles(root: Path, files: Files) -> None:
    (root / "directory").mkdir()
    with pytest.raises(SystemCallFailed, match="directory"):
        files.write(piece(root, "directory", b"x"))
    (root / "plain").write_bytes(b"")
    with pytest.raises(SystemCallFailed, match="plain/file: Not a directory"):
        files.write(piece(root, "plain/file", b"x"))
    with pytest.raises(SystemCallFailed, match="File name too long"):
        files.write(piece(root, "n" * 256, b"x"))


@pytest.mark.parametrize(
    "change",
    [
        {"size": -1},
        {"offset": -1},
        {"size": 2},
        {"offset": 1},
        {"mode": 0o120777},
        {"mode": 0o040755},
        {"path": "{root}/a\0b"},
    ],
)
def test_copy_rejects_malformed_requests(root: Path, files: Files, change: dict[str, int | str]) -> None:
    values = {name: value.format(root=root) if isinstance(value, str) else value for name, value in change.items()}
    with pytest.raises(InvalidArgument):
        files.write(piece(root, "file", b"xyz").but(**values))
    assert list(root.iterdir()) == []


def test_unfinished_copies_are_dropped(root: Path, files: Files) -> None:
    for number in range(UNFINISHED + 1):
        files.write(piece(root, f"file{number}", b"a", size=2))
    files.write(piece(root, "file0", b"b", size=2, offset=1))  # its first half was dropped
    assert not (root / "file0").exists()
    files.write(piece(root, f"file{UNFINISHED}", b"b", size=2, offset=1))
    assert (root / f"file{UNFINISHED}").read_bytes() == b"ab"
