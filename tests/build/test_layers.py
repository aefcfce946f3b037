"""Test merging layers: what hides what, what is rejected, and that the result reaches the archive."""

from __future__ import annotations

import io
import os
import stat
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from caisson.image.containers.layers import LayerMerger
from caisson.image.errors import ImageError
from caisson.image.formats.scan import from_directory
from caisson.image.formats.squashfs import write_archive
from caisson.image.formats.tree import Malformed, Node, Tree
from tests.build.container_images import FOLDER, Member, file, hard_link, layer, link


@pytest.fixture
def laid(tmp_path: Path) -> Iterator[Callable[..., Tree]]:
    """Merge layers into a tree."""
    with Tree() as tree:

        def lay(*layers: bytes, warn: Callable[[str], None] = pytest.fail) -> Tree:
            applied = LayerMerger(tree, warn, 1 << 40)
            for data in layers:
                file = tmp_path / f"layer-{len(list(tmp_path.iterdir()))}"
                file.write_bytes(data)
                applied.apply(file, "layer")
            return tree

        yield lay


Lay = Callable[..., Tree]


def names(tree: Tree) -> list[str]:
    return [path.decode() for path, _ in tree.files()]


def nodes(tree: Tree) -> dict[bytes, Node]:
    return dict(tree.files())


def written(tree: Tree) -> dict[str, tuple[tarfile.TarInfo, bytes]]:
    """Return the contents of a tree's archive, by name."""
    stream = io.BytesIO()
    write_archive(tree, stream)
    stream.seek(0)
    found = {}
    with tarfile.open(fileobj=stream, errors="surrogateescape") as archive:
        for member in archive:
            source = archive.extractfile(member) if member.isfile() else None
            found[member.name] = member, source.read() if source else b""
    return found


LOWER = layer(
    ("a", FOLDER | {"mode": 0o700, "uid": 5}),
    ("a/b", file(b"lower b")),
    ("a/c", file(b"lower c")),
    ("a/d/e", file(b"lower e")),
    ("link", link("a/d")),
    ("f", file(b"f")),
)


BELOW = ["a", "a/b", "a/c", "a/d", "a/d/e", "f"]


@pytest.mark.parametrize(
    ("upper", "expected"),
    [
        ([], ["a", "a/b", "a/c", "a/d", "a/d/e", "f", "link"]),
        ([("a/.wh.b", file())], ["a", "a/c", "a/d", "a/d/e", "f", "link"]),
        ([(".wh.a", file())], ["f", "link"]),
        ([(".wh.a", file()), ("a/new", file())], ["a", "a/new", "f", "link"]),
        # In any order: only lower layers are hidden.
        ([("a/new", file()), ("a/.wh..wh..opq", file())], ["a", "a/new", "f", "link"]),
        ([("a/.wh..wh..opq", file()), ("a/b", file())], ["a", "a/b", "f", "link"]),
        ([("a/b", file()), ("a/.wh.b", file())], ["a", "a/b", "a/c", "a/d", "a/d/e", "f", "link"]),
        ([(".wh.nothing", file()), ("no/.wh.where", file())], ["a", "a/b", "a/c", "a/d", "a/d/e", "f", "link"]),
        ([(".wh..wh.plnk", FOLDER)], ["a", "a/b", "a/c", "a/d", "a/d/e", "f", "link"]),
        # A directory is replaced with its contents by anything else, and kept by another directory.
        ([("a", file())], ["a", "f", "link"]),
        ([("a", FOLDER)], ["a", "a/b", "a/c", "a/d", "a/d/e", "f", "link"]),
        ([("f/x", file())], ["a", "a/b", "a/c", "a/d", "a/d/e", "f", "f/x", "link"]),
        # ".." stays inside, in names and in links, as in container engines.
        ([("a/../x", file())], ["a", "a/b", "a/c", "a/d", "a/d/e", "f", "link", "x"]),
        ([("up", link("..")), ("up/x", file())], ["a", "a/b", "a/c", "a/d", "a/d/e", "f", "link", "up", "x"]),
        # aufs links refer to files that it keeps separately.
        (
            [(".wh..wh.plnk/1.2", file()), ("g", hard_link(".wh..wh.plnk/1.2"))],
            ["a", "a/b", "a/c", "a/d", "a/d/e", "f", "g", "link"],
        ),
        ([("f", FOLDER), ("f/x", file())], ["a", "a/b", "a/c", "a/d", "a/d/e", "f", "f/x", "link"]),
        # Links to directories are followed as parents, and replaced as the last component.
        ([("link/x", file())], ["a", "a/b", "a/c", "a/d", "a/d/e", "a/d/x", "f", "link"]),
        ([("link", FOLDER), ("link/x", file())], ["a", "a/b", "a/c", "a/d", "a/d/e", "f", "link", "link/x"]),
        ([("link/.wh.e", file())], ["a", "a/b", "a/c", "a/d", "f", "link"]),
        ([("/abs", file()), ("./dot", file())], ["a", "a/b", "a/c", "a/d", "a/d/e", "abs", "dot", "f", "link"]),
    ],
)
def test_layers_are_merged(laid: Lay, upper: list[Member], expected: list[str]) -> None:
    assert names(laid(LOWER, layer(*upper))) == expected


@pytest.mark.parametrize(
    "kept_beside",
    [
        [(".wh..wh.plnk", FOLDER), (".wh..wh.plnk/1.2", file(b"aufs"))],
        [(".wh..wh.plnk/1.2", FOLDER), (".wh..wh.plnk/1.2/x", file())],
        [(".wh..wh.plnk/a", link("b")), (".wh..wh.plnk/a/x", file())],
        [(".wh..wh.plnk/.wh.f", file()), (".wh..wh.orph/.wh..wh..opq", file())],
        [(".wh..wh.orph", FOLDER), (".wh..wh.orph/deep/er/x", file()), (".wh..wh.aufs", file())],
        [(".wh..wh.plnk/.wh.", file()), (".wh..wh.orph/.wh...", file())],
        [("./.wh..wh.plnk/x", file()), ("/.wh..wh.orph/y", file()), ("z/../.wh..wh.orph/y", file())],
    ],
)
def test_what_aufs_keeps_for_itself_is_dropped_and_hides_nothing(laid: Lay, kept_beside: list[Member]) -> None:
    assert names(laid(LOWER, layer(*kept_beside))) == ["a", "a/b", "a/c", "a/d", "a/d/e", "f", "link"]


def test_a_link_of_aufs_is_to_its_own_layers_file(laid: Lay) -> None:
    aufs = (".wh..wh.plnk", FOLDER), (".wh..wh.plnk/1.2", file(b"aufs", uid=7))
    tree = laid(LOWER, layer(*aufs, *((name, hard_link(".wh..wh.plnk/1.2")) for name in ("g", "h"))))
    assert [nodes(tree)[name].uid for name in (b"g", b"h")] == [7, 7]
    assert {path: first for path, _, first in tree.walk()}[b"h"] == b"g"
    other = (".wh..wh.plnk/3.4", link("g")), ("i", hard_link(".wh..wh.plnk/3.4"))
    with pytest.raises(Malformed, match="not there"):
        laid(layer(*aufs, *other))
    with pytest.raises(Malformed, match="not there"):
        laid(layer(*aufs), layer(("g", hard_link(".wh..wh.plnk/1.2"))))


def test_directories_keep_or_change_what_they_are(laid: Lay) -> None:
    kept = nodes(laid(LOWER, layer(("a/x", file()))))[b"a"]
    assert (stat.S_IMODE(kept.mode), kept.uid) == (0o700, 5)
    changed = nodes(laid(layer(("a", FOLDER))))[b"a"]
    assert (stat.S_IMODE(changed.mode), changed.uid) == (0o755, 0)
    implied = nodes(laid())[b"a/d"]
    assert (stat.S_IMODE(implied.mode), implied.uid) == (0o755, 0)


OUT = "leaves the root"


@pytest.mark.parametrize(
    ("members", "why"),
    [
        ([("../x", file())], OUT),
        ([("a/../../x", file())], OUT),
        ([("..", FOLDER)], OUT),
        ([("../.wh.x", file())], OUT),
        ([("x", hard_link("../../etc/passwd"))], OUT),
        ([("x", hard_link("missing"))], "not there"),
        ([("x", hard_link("."))], "a directory"),
        ([("x", hard_link("a"))], "a directory"),
        ([("loop", link("loop")), ("loop/x", file())], "too many links"),
        ([("one", link("two")), ("two", link("one")), ("one/x", file())], "too many links"),
        ([(".", file())], "the root"),
        ([("a/.wh.", file())], "whiteout with an invalid name"),
        ([("a/.wh...", file())], "whiteout with an invalid name"),
        ([("x", {"type": tarfile.CHRTYPE})], "whiteout"),
        ([("x", {"type": b"Q"})], "unknown"),
        ([("x", link(""))], "dangling"),
        ([("n" * 256, file())], "not a valid file name"),
    ],
)
def test_layers_reject_malformed_archives(laid: Lay, members: list[Member], why: str) -> None:
    with pytest.raises(Malformed, match=why):
        laid(LOWER, layer(*members))


@pytest.mark.parametrize("cut", [1, 200, 600, 1000, 1024, 2047])
def test_an_archive_that_is_cut_short(laid: Lay, cut: int) -> None:
    data = layer(("a", file(b"x" * 1000)), ("b", file(b"y")))
    whole = 512 + 1024 + 512 + 1  # up to the last byte of data
    with pytest.raises(Malformed):
        laid(data[: whole - cut])


def test_an_archive_with_a_damaged_header(laid: Lay) -> None:
    data = bytearray(layer(("a", file(b"x")), ("b", file(b"y"))))
    data[1024 + 100] ^= 0xFF
    with pytest.raises(Malformed):
        laid(bytes(data))


def test_all_of_a_file_reaches_the_archive(laid: Lay) -> None:
    attribute = b"\xff\0\n=x"
    long_name, far = "d/" + "n" * 200, "/" + "t" * 200
    upper = layer(
        ("one", file(b"contents", mode=0o4755, uid=3_000_000, gid=7, mtime=1234)),
        ("two", hard_link("one")),
        ("attributes", file(xattrs={"user.x": attribute, "security.capability": b"\1\0\0\2"})),
        (long_name, file(b"long")),
        ("far", link(far)),
        ("up", link("../" + "u" * 120)),
        ("null", {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 3}),
        ("pipe", {"type": tarfile.FIFOTYPE}),
        ("old", file(mtime=-5)),
        (b"caf\xe9".decode("utf-8", "surrogateescape"), file()),
    )
    found = written(laid(LOWER, upper))
    one, contents = found["one"]
    assert (one.mode, one.uid, one.gid, one.mtime, contents) == (0o4755, 3_000_000, 7, 1234, b"contents")
    assert found["two"][0].islnk() and found["two"][0].linkname == "one"
    headers = found["attributes"][0].pax_headers
    assert headers["SCHILY.xattr.user.x"].encode("utf-8", "surrogateescape") == attribute
    assert found[long_name][1] == b"long"
    assert found["far"][0].linkname == far and found["up"][0].linkname == "../" + "u" * 120
    assert (found["null"][0].devmajor, found["null"][0].devminor) == (1, 3)
    assert found["pipe"][0].isfifo() and found["old"][0].mtime == 0
    assert b"caf\xe9" in map(os.fsencode, found)
    assert found["a/b"][1] == b"lower b"


def test_a_link_to_what_a_lower_layer_has(laid: Lay) -> None:
    found = written(laid(LOWER, layer(("g", hard_link("f"))), layer((".wh.f", file()))))
    assert found["g"][1] == b"f" and "f" not in found


@pytest.mark.root
def test_a_directory_of_this_machine(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True, mode=0o711)
    (root / "file").write_bytes(b"data")
    os.chown(root / "file", 12, 34)
    os.link(root / "file", root / "sub/same")
    (root / "sub/link").symlink_to("/nowhere")
    os.mkfifo(root / "pipe")
    os.mknod(root / "zero", stat.S_IFCHR | 0o600, os.makedev(1, 5))
    os.setxattr(root / "file", "trusted.x", b"\0")
    found = written(from_directory(root))
    assert (found["file"][0].uid, found["file"][0].gid, found["file"][1]) == (12, 34, b"data")
    assert found["file"][0].pax_headers["SCHILY.xattr.trusted.x"] == "\0"
    assert found["sub/same"][0].islnk() and found["sub/link"][0].linkname == "/nowhere"
    assert found["pipe"][0].isfifo() and found["zero"][0].devminor == 5 and found["sub"][0].mode == 0o711
    with pytest.raises(ImageError, match="No such file"):
        from_directory(tmp_path / "missing")


def test_a_file_that_changes_while_it_is_packed(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"x" * 100)
    tree = from_directory(tmp_path)
    (tmp_path / "log").write_bytes(b"x" * 50)
    with pytest.raises(ImageError, match="shorter than it was"):
        write_archive(tree, io.BytesIO())
    (tmp_path / "log").write_bytes(b"x" * 200)
    stream = io.BytesIO()
    write_archive(tree, stream)
    assert len(stream.getvalue()) == 512 + 512 + 1024
