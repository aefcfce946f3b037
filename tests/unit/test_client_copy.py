"""Test that an archive sent by a container is unpacked in one place, or rejected."""

from __future__ import annotations

import io
import os
import stat
import tarfile
import threading
import tracemalloc
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from caisson.agent.client import AgentGone
from caisson.agent.client.copy import Location, get, put
from caisson.agent.client.diagnostics import MAX_LINE, AgentLines
from caisson.agent.client.errors import CopyError, UsageError
from caisson.agent.client.unpack import MAX_HEADER, MAX_LEFT_OUT, ReceivedArchive, unpack


def archive(*members: tuple[str, dict[str, Any]]) -> ReceivedArchive:
    """Return a stream of members: a name, its fields, and `data` for a file's contents."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as made:
        for name, fields in members:
            member = tarfile.TarInfo(name)
            data = fields.pop("data", b"")
            member.size = len(data)
            member.mode = 0o644
            for field, value in fields.items():
                setattr(member, field, value)
            made.addfile(member, io.BytesIO(data))
    return opened(stream.getvalue())


def opened(whole: bytes) -> ReceivedArchive:
    return ReceivedArchive(partial(io.BytesIO(whole).read, 1000))


FOLDER = {"type": tarfile.DIRTYPE, "mode": 0o755}


def link(target: str) -> dict[str, Any]:
    return {"type": tarfile.SYMTYPE, "linkname": target}


def hard_link(target: str) -> dict[str, Any]:
    return {"type": tarfile.LNKTYPE, "linkname": target}


def test_a_tree(tmp_path: Path) -> None:
    made = archive(
        ("./etc", {"type": tarfile.DIRTYPE, "mode": 0o500, "mtime": 1000}),
        ("./etc/passwd", {"data": b"root\n", "mode": 0o4755, "mtime": 2000, "uid": 12345}),
        ("./etc/same", hard_link("./etc/passwd")),
        ("./etc/link", link("/nowhere")),
        ("./etc/pipe", {"type": tarfile.FIFOTYPE}),
        ("./etc/null", {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 3}),
    )
    assert unpack(made, tmp_path, "etc", "copy") == ["./etc/null"]
    copied = tmp_path / "copy"
    assert stat.S_IMODE(copied.stat().st_mode) == 0o500 and copied.stat().st_mtime == 1000
    passwd = (copied / "passwd").stat()
    assert (copied / "passwd").read_bytes() == b"root\n"
    # Not set-uid, and not owned by another user.
    assert (stat.S_IMODE(passwd.st_mode), passwd.st_uid, passwd.st_mtime) == (0o755, os.geteuid(), 2000)
    assert passwd.st_ino == (copied / "same").stat().st_ino
    assert (copied / "link").readlink() == Path("/nowhere")
    assert (copied / "pipe").is_fifo()
    assert not (copied / "null").exists()


def test_all_of_a_root(tmp_path: Path) -> None:
    made = archive(("./", FOLDER), ("./bin", FOLDER), ("./bin/sh", {"data": b"x"}))
    unpack(made, tmp_path, ".", "root")
    assert (tmp_path / "root/bin/sh").read_bytes() == b"x"


@pytest.mark.parametrize(
    "members",
    [
        [("/a", {"data": b"x"})],
        [("../a", {"data": b"x"})],
        [("a/../../b", {"data": b"x"})],
        [("b", {"data": b"x"})],
        [("a", FOLDER), ("a/x", hard_link("/etc/passwd"))],
        [("a", FOLDER), ("a/x", hard_link("../outside"))],
        [("a", FOLDER), ("a/d", FOLDER), ("a/x", hard_link("a/d"))],
    ],
)
def test_get_rejects_members_outside_the_target(tmp_path: Path, members: list[tuple[str, dict[str, Any]]]) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    (tmp_path / "outside").write_text("mine")
    with pytest.raises(CopyError):
        unpack(archive(*members), inside, "a", "a")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["inside", "outside"]
    assert (tmp_path / "outside").read_text() == "mine"


@pytest.mark.parametrize("target", ["..", "/", "../outside"])
def test_a_link_is_not_followed(tmp_path: Path, target: str) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    made = archive(("a", FOLDER), ("a/way", link(target)), ("a/way/out", {"data": b"x"}))
    with pytest.raises(OSError):
        unpack(made, inside, "a", "a")
    assert list(outside.iterdir()) == [] and not (tmp_path / "out").exists()


def test_a_link_that_was_there_is_replaced_and_not_written_through(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "a").symlink_to(victim)
    unpack(archive(("a", {"data": b"theirs"})), tmp_path, "a", "a")
    assert victim.read_text() == "mine" and (tmp_path / "a").read_text() == "theirs"
    assert not (tmp_path / "a").is_symlink()


@pytest.mark.parametrize(
    ("text", "location"),
    [
        ("web:/etc/passwd", Location("web", "/etc/passwd")),
        ("web:etc/", Location("web", "/etc/")),
        ("/a:b", Location("", "/a:b")),
        ("./web:x", Location("", "./web:x")),
        ("file", Location("", "file")),
    ],
)
def test_locations(text: str, location: Location) -> None:
    assert Location.parse(text) == location


@pytest.mark.parametrize("text", ["", "web:"])
def test_copy_rejects_malformed_locations(text: str) -> None:
    with pytest.raises(UsageError):
        Location.parse(text)


class DyingProcess:
    """A process in a guest that dies after a few blocks."""

    exec_id = "1"

    def __init__(self) -> None:
        self._blocks = 0
        self._gone = threading.Event()
        self.said: list[str] = []

    def start(self, document: Mapping[str, Any], timeout: float | None = None) -> None:
        self.said.append("start")

    def send(self, data: memoryview) -> None:
        self._blocks += 1
        if self._blocks > 3:
            self._gone.set()
            raise AgentGone("the agent does not answer")

    def receive(self) -> memoryview:
        self.send(memoryview(b""))
        return memoryview(header_of(tarfile.REGTYPE, 1 << 30) if self._blocks == 1 else bytes(65536))

    def read(self, method: str) -> memoryview:
        assert self._gone.wait(60)
        raise AgentGone("the agent does not answer")

    def stop(self) -> None:
        self.said.append("stop")

    def close(self) -> None:
        self.said.append("close")


def descriptors() -> set[str]:
    return {path.name for path in Path("/proc/self/fd").iterdir()}


@pytest.mark.parametrize("way", ["there", "back"])
def test_a_guest_that_dies_meanwhile(tmp_path: Path, way: str) -> None:
    (tmp_path / "big").write_bytes(bytes(8 << 20))
    (tmp_path / "target").mkdir()
    before = descriptors()
    dying = DyingProcess()
    process: Any = dying
    with pytest.raises(AgentGone):
        if way == "there":
            put(process, str(tmp_path / "big"), "/tmp")
        else:
            get(process, "/x", str(tmp_path / "target"))
    assert dying.said == ["start", "stop", "close"]
    assert list((tmp_path / "target").iterdir()) == []
    assert descriptors() <= before


def test_the_agents_lines_on_a_console() -> None:
    seen: list[bytes] = []
    lines = AgentLines(seen.append)
    for piece in (b'[    0.1] Linux\r\n{"level": "in', b'fo", "msg": "one"}\r\n[1]\n{"a": 1}\n{\n', b"rest"):
        lines(piece)
    assert seen == [b'{"level": "info", "msg": "one"}\n']


def test_a_line_that_no_parser_survives_is_not_the_agents() -> None:
    """A container can write to the console through the kernel's log."""
    seen: list[bytes] = []
    lines = AgentLines(seen.append)
    for piece in (
        b"[" * 200_000,
        b"\n",
        b"[" * 60_000 + b"\n",
        b"x" * (1 << 20),
        b'\n{"level": "info", "msg": "one"}\n',
    ):
        lines(piece)
        assert len(lines._rest) <= MAX_LINE
    assert seen == [b'{"level": "info", "msg": "one"}\n']
    assert len(lines._rest) == 0


def test_new_files_get_the_archives_mode_less_the_umask(tmp_path: Path) -> None:
    made = archive(("a", FOLDER | {"mode": 0o777}), ("a/f", {"data": b"x", "mode": 0o666}))
    before = os.umask(0o027)
    try:
        unpack(made, tmp_path, "a", "a")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o750
    assert stat.S_IMODE((tmp_path / "a/f").stat().st_mode) == 0o640


def test_modes_of_what_is_there_are_kept(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir(mode=0o700)
    (tmp_path / "a/f").touch(mode=0o600)
    unpack(archive(("a", FOLDER | {"mode": 0o777}), ("a/f", {"data": b"x", "mode": 0o777})), tmp_path, "a", "a")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "a/f").stat().st_mode) == 0o600 and (tmp_path / "a/f").read_bytes() == b"x"


def test_contents_go_into_a_directory(tmp_path: Path) -> None:
    (tmp_path / "old").touch()
    unpack(archive(("./", FOLDER), ("./new", {"data": b"x"})), tmp_path, ".", ".")
    assert {path.name for path in tmp_path.iterdir()} == {"old", "new"}


@pytest.mark.parametrize("mtime", ["nan", "inf", "-inf", "-1", "1e30"])
def test_odd_times_are_refused(tmp_path: Path, mtime: str) -> None:
    with pytest.raises(CopyError, match="with the time"):
        unpack(archive(("a", {"pax_headers": {"mtime": mtime}})), tmp_path, "a", "a")


@pytest.mark.parametrize("fields", [
    {"pax_headers": {"GNU.sparse.map": "x", "GNU.sparse.size": "1"}},
    {"pax_headers": {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}},
    {"pax_headers": {"GNU.sparse.size": "1", "GNU.sparse.offset": "x"}},
    {"type": tarfile.SYMTYPE, "linkname": "x", "pax_headers": {"linkpath": "x\0y"}},
])  # fmt: skip
def test_nonsense_is_an_error_in_words(tmp_path: Path, fields: dict[str, Any]) -> None:
    with pytest.raises((CopyError, tarfile.TarError)):
        unpack(archive(("a", fields)), tmp_path, "a", "a")
    assert list(tmp_path.iterdir()) == []


SIZE = 64 << 20  # only so large that a test without the rule finishes, and fails
SPARSE = {"GNU.sparse.size": str(SIZE), "GNU.sparse.map": f"{SIZE - 1},1", "GNU.sparse.name": "a"}


def test_no_more_is_written_than_was_received(tmp_path: Path) -> None:
    with pytest.raises(CopyError, match="sparse"):
        unpack(archive(("a", {"data": b"x", "pax_headers": SPARSE})), tmp_path, "a", "a")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", [lambda whole: whole[:1024] + b"x" + whole[1025:], lambda whole: whole[:1324]])
def test_a_damaged_header_is_not_the_end(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as made:
        for name in ("a/1", "a/2"):
            member = tarfile.TarInfo(name)
            member.size = 1
            made.addfile(member, io.BytesIO(b"x"))
    with pytest.raises(CopyError, match="damaged header"):
        unpack(opened(damage(whole.getvalue())), tmp_path, "a", ".")


class Endless(io.RawIOBase):
    """A stream with some initial bytes, then one block repeated as long as it is read: 4 MiB at most."""

    def __init__(self, begin: bytes, block: bytes) -> None:
        self._begin = begin
        self._block = block
        self._left = 4 << 20

    def read(self, size: int = -1) -> bytes:
        self._left -= size
        assert 0 <= size < MAX_HEADER and self._left > 0, "read more than it should"
        while len(self._begin) < size:
            self._begin += self._block
        data, self._begin = self._begin[:size], self._begin[size:]
        return data


def header_of(kind: bytes, size: int = 0) -> bytes:
    header = tarfile.TarInfo("x")
    header.type, header.size = kind, size
    return header.tobuf(tarfile.GNU_FORMAT)


def sparse_header() -> bytes:
    """Return GNU's old header of a sparse file, whose map continues in the next block."""
    block = bytearray(header_of(tarfile.GNUTYPE_SPARSE))
    block[482] = 1
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def records(**pax: str) -> bytes:
    """Return a pax header and what it describes, a regular file of 4 GiB."""
    member = tarfile.TarInfo("a")
    member.size, member.pax_headers = 1 << 32, {f"GNU.sparse.{name}": value for name, value in pax.items()}
    return member.tobuf(tarfile.PAX_FORMAT)


RUN = b"00000000001\0" * 2


@pytest.mark.parametrize(
    ("begin", "block", "why"),
    [
        (header_of(tarfile.XHDTYPE, MAX_HEADER + 1), bytes(512), "header of 1048577 bytes"),
        (header_of(tarfile.GNUTYPE_LONGNAME, -1), bytes(512), "header of -1 bytes"),
        (b"", header_of(tarfile.XHDTYPE, 6) + b"6 a=b\n".ljust(512, b"\0"), "more headers than files"),
        (b"", header_of(tarfile.GNUTYPE_LONGNAME, 1) + b"x".ljust(512, b"\0"), "more headers than files"),
        (header_of(tarfile.REGTYPE, -512), bytes(512), "size -512|invalid offset"),
        (sparse_header(), (RUN * 21).ljust(504, b"\0") + b"\1".ljust(8, b"\0"), "as a sparse file"),
        (records(major="1", minor="0") + b"99999999\n", b"1\n" * 256, "as a sparse file"),
        (b"", header_of(tarfile.XGLTYPE, 6) + b"6 a=b\n".ljust(512, b"\0") + header_of(tarfile.DIRTYPE), "global"),
    ],
    ids=["large", "negative", "pax", "long names", "negative file", "a map without an end", "in pax", "global"],
)
def test_a_header_without_end_is_refused_unread(tmp_path: Path, begin: bytes, block: bytes, why: str) -> None:
    with pytest.raises(CopyError, match=why):
        unpack(ReceivedArchive(partial(Endless(begin, block).read, 512)), tmp_path, "a", "a")


def test_members_are_not_hoarded(tmp_path: Path) -> None:
    made = archive(("a", FOLDER), *((f"a/{number}", dict(FOLDER)) for number in range(100)))
    unpack(made, tmp_path, "a", "a")
    assert len(vars(made)["members"]) <= 1


def test_headers_are_not_hoarded(tmp_path: Path) -> None:
    """The times of directories are set at the end, and devices are named then."""
    large = {"comment": "x" * 500_000}
    kinds = (tarfile.DIRTYPE, tarfile.CHRTYPE)
    members = [(f"{number}/", {"type": kinds[number % 2], "pax_headers": large}) for number in range(40)]
    made = archive(*((name, dict(fields)) for name, fields in members))
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        assert len(unpack(made, tmp_path, ".", ".")) == 20
        assert tracemalloc.get_traced_memory()[1] - before < 8_000_000
    finally:
        tracemalloc.stop()


def test_the_list_of_devices_is_bounded(tmp_path: Path) -> None:
    device = header_of(tarfile.CHRTYPE)
    with pytest.raises(CopyError, match=f"more than {MAX_LEFT_OUT} devices"):
        unpack(opened(device * (MAX_LEFT_OUT + 1)), tmp_path, "x", "x")
    assert unpack(opened(device * MAX_LEFT_OUT), tmp_path, "x", "x") == ["x"] * MAX_LEFT_OUT


def test_a_file_that_is_cut_short_does_not_appear(tmp_path: Path) -> None:
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as made:
        member = tarfile.TarInfo("a")
        member.size = 100_000
        made.addfile(member, io.BytesIO(bytes(100_000)))
    (tmp_path / "a").write_text("before")
    with pytest.raises(tarfile.TarError):
        unpack(opened(whole.getvalue()[:50_000]), tmp_path, "a", "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_text() == "before"
