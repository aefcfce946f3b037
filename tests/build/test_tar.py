"""Test reading archives in every dialect, as written by tar(1) and Python; those out of bounds are rejected by name."""

from __future__ import annotations

import base64
import io
import os
import stat
import struct
import subprocess
import sys
import tarfile
import urllib.parse
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from caisson.image.containers.tar import HARD_LINK, MAX_EXTENTS, MAX_HEADER, MAX_RECORDS, Member, members
from caisson.image.formats.squashfs import write_archive
from caisson.image.formats.tree import Malformed, Node, Tree

TIB = 1 << 40


def read(data: bytes) -> list[Member]:
    return list(members(io.BytesIO(data), "it", TIB))


def one(data: bytes) -> Member:
    (member,) = read(data)
    return member


def archive(*infos: tarfile.TarInfo, format: int = tarfile.PAX_FORMAT) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=format, errors="surrogateescape") as written:
        for info in infos:
            written.addfile(info, io.BytesIO(bytes(info.size)))
    return stream.getvalue()


def info(name: str = "a", **fields: object) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    for key, value in fields.items():
        setattr(made, key, value)
    return made


NAMES = st.binary(min_size=1, max_size=300).filter(lambda name: not set(name) & {0, 47}).map(os.fsdecode)
PATHS = st.lists(NAMES, min_size=1, max_size=4).map("/".join)
TYPES = st.sampled_from(
    [tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE]
)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(
            PATHS, TYPES, st.integers(0, (1 << 32) - 2), st.integers(0, (1 << 32) - 2), st.integers(0, 0o7777),
            st.integers(-(1 << 33), 1 << 40), st.binary(max_size=1500), PATHS,
        ),
        max_size=5,
    ),
    st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)  # fmt: skip
def test_reader_finds_what_python_writes(wanted: list[tuple[object, ...]], format: int) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=format, errors="surrogateescape") as written:
        for name, kind, uid, gid, mode, mtime, data, target in wanted:
            assert isinstance(data, bytes)
            size = len(data) if kind == tarfile.REGTYPE else 0
            linkname = target if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
            entry = info(
                str(name), type=kind, uid=uid, gid=gid, mode=mode, mtime=mtime, size=size, linkname=linkname,
                devmajor=7, devminor=9,
            )  # fmt: skip
            written.addfile(entry, io.BytesIO(data))
    raw = stream.getvalue()
    found = read(raw)
    assert len(found) == len(wanted)
    for member, (name, kind, uid, gid, mode, mtime, data, target) in zip(found, wanted, strict=True):
        assert isinstance(data, bytes)
        assert os.fsdecode(member.name).rstrip("/") == str(name).rstrip("/")
        assert (member.uid, member.gid, member.mode, member.mtime) == (uid, gid, mode, mtime)
        if kind == tarfile.REGTYPE:
            assert raw[member.data : member.data + member.size] == data
        if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            assert os.fsdecode(member.link) == target
        assert member.device == ((7, 9) if kind == tarfile.CHRTYPE else (0, 0))
        assert (member.kind == HARD_LINK) == (kind == tarfile.LNKTYPE)


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=1200), st.integers(0, 2047), st.binary(min_size=1, max_size=4))
def test_reader_of_noise_ends_in_members_or_one_error(noise: bytes, at: int, change: bytes) -> None:
    damaged = bytearray(archive(info("a", size=700), info("b" * 120, type=tarfile.SYMTYPE, linkname="x")))
    damaged[at : at + len(change)] = change
    for data in (noise, bytes(damaged)):
        try:
            read(data)
        except Malformed as error:
            assert "\n" not in str(error)


FORMATS = ["--format=v7", "--format=oldgnu", "--format=gnu", "--format=ustar", "--format=posix"]
SPARSE = [
    ["--format=gnu"], ["--format=oldgnu"], ["--format=posix", "--sparse-version=0.0"],
    ["--format=posix", "--sparse-version=0.1"], ["--format=posix", "--sparse-version=1.0"],
]  # fmt: skip


@pytest.mark.parametrize("format", FORMATS)
def test_reader_finds_what_tar_writes(tmp_path: Path, format: str) -> None:
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (root / "sub/file").write_bytes(b"contents")
    (root / "sub/link").symlink_to("../x")
    os.link(root / "sub/file", root / "sub/same")
    data = subprocess.run(["tar", format, "-C", root, "-c", "."], capture_output=True, check=True).stdout
    found = {member.name.strip(b"./"): member for member in read(data)}
    assert found[b"sub"].kind == stat.S_IFDIR and found[b"sub/link"].link == b"../x"
    files = [found[b"sub/file"], found[b"sub/same"]]
    (whole,) = [member for member in files if member.kind == stat.S_IFREG]
    assert data[whole.data : whole.data + whole.size] == b"contents"


@pytest.mark.parametrize("options", SPARSE, ids=" ".join)
@pytest.mark.parametrize("runs", [1, 3, 40, 700])
def test_sparse_files_are_read_by_their_holes(tmp_path: Path, options: list[str], runs: int) -> None:
    file = tmp_path / ("n" * 120)
    with file.open("wb") as sparse:
        for number in range(runs):
            sparse.seek(number * 65536)
            sparse.write(b"%04096d" % number)
        sparse.truncate(20 << 30)
    words: list[str | Path] = ["tar", *options, "-S", "-C", tmp_path, "-c", file.name, "/etc/passwd"]
    data = subprocess.run(words, capture_output=True, check=True).stdout
    member, passwd = read(data)
    assert member.size == 20 << 30 and os.fsdecode(member.name) == file.name and member.extents is not None
    for number in range(runs):
        start = number * 65536
        extent = next(one for one in member.extents if one.start <= start < one.start + one.length)
        at = extent.stored + start - extent.start
        assert data[at : at + 4096] == b"%04096d" % number
    assert data[passwd.data : passwd.data + 4] == b"root"


def with_checksum(header: bytes) -> bytes:
    blank = header[:148] + b" " * 8 + header[156:]
    return header[:148] + b"%06o\0 " % sum(blank) + header[156:]


def with_field(at: int, value: bytes) -> bytes:
    """Return an archive of one file with these bytes in its header."""
    header = archive(info())[:512]
    return with_checksum(header[:at] + value + header[at + len(value) :]) + bytes(1024)


def extra_header(header: bytes, data: bytes) -> bytes:
    """Return a header of a type that has data, and its data."""
    return with_checksum(header[:124] + b"%011o\0" % len(data) + header[136:]) + data + bytes(-len(data) % 512)


def pax(**records: str) -> bytes:
    return archive(info("f", pax_headers=dict(records)))


def test_extended_attributes_of_every_dialect() -> None:
    value = b"\0\xff=\n"
    encoded = base64.b64encode(value).decode().rstrip("=")
    headers = {
        "SCHILY.xattr.user.a": value.decode(errors="surrogateescape"),
        "SCHILY.xattr.user.c%3D%2525": value.decode(errors="surrogateescape"),  # GNU tar's and libarchive's
        "LIBARCHIVE.xattr.user.b%3D": encoded,
        "RHT.security.selinux": "system_u",
        "SCHILY.acl.access": "user::rwx",
        "SCHILY.acl.default": "user::rwx",
        "SCHILY.fflags": "nodump",
    }
    member = one(pax(**headers))
    assert member.xattrs == {"user.a": value, "user.b=": value, "user.c=%25": value, "security.selinux": b"system_u"}
    assert sorted(member.dropped) == ["access ACL", "default ACL", "file flags"]


ATTRIBUTES = st.dictionaries(
    st.tuples(
        st.sampled_from(["user", "trusted", "security", "system", "odd"]),
        st.text(st.characters(blacklist_characters="\0", blacklist_categories=["Cs"]), min_size=1, max_size=20),
    ).map(".".join)
    | st.sampled_from(["security.capability", "system.posix_acl_access", "user.=%=%3D%25"]),
    st.binary(max_size=60),
    max_size=4,
)
ACL_WORDS = st.sets(st.sampled_from(["SCHILY.acl.access", "SCHILY.acl.default", "SCHILY.acl.ace", "SCHILY.fflags"]))


def by_gnu_tar(name: str) -> str:
    return "SCHILY.xattr." + name.replace("%", "%25").replace("=", "%3D")


def by_libarchive(name: str) -> str:
    return "LIBARCHIVE.xattr." + urllib.parse.quote_from_bytes(os.fsencode(name), safe=".")


@settings(max_examples=150, deadline=None)
@given(ATTRIBUTES, ACL_WORDS, st.sampled_from(["GNU tar", "libarchive", "both"]))
def test_attributes_of_any_name_and_value_are_kept_or_warned_of_by_name(
    attributes: dict[str, bytes], acls: set[str], dialect: str
) -> None:
    """From each dialect to the disk's own archive, whose reader decodes no names."""
    records = dict.fromkeys(sorted(acls), "user::rwx")
    for name, value in attributes.items():
        if dialect != "libarchive":
            records[by_gnu_tar(name)] = value.decode(errors="surrogateescape")
        if dialect != "GNU tar":
            records[by_libarchive(name)] = base64.b64encode(value).decode().rstrip("=")
    member = one(pax(**records))
    assert member.xattrs == attributes
    assert len(member.dropped) == len(acls)

    kept: dict[str, bytes] = {}
    warned: list[str] = []
    made = io.BytesIO()
    with Tree() as tree:
        tree.put(b"f", Node(stat.S_IFREG | 0o644, data=b"", xattrs=member.xattrs))
        write_archive(tree, made, warned.append)
    made.seek(0)
    with tarfile.open(fileobj=made, errors="surrogateescape") as written:
        for key, shown in written.getmembers()[-1].pax_headers.items():
            kept[key.removeprefix("SCHILY.xattr.")] = shown.encode(errors="surrogateescape")
    assert kept.items() <= attributes.items()
    for name in attributes.keys() - kept.keys():
        assert name.startswith(("system.", "odd.", "user.overlay.", "trusted.overlay.")) or "=" in name
        assert any(name in line or repr(name) in line for line in warned), warned
    assert len(warned) == len(attributes.keys() - kept.keys())


def test_access_control_lists_that_tar_writes_are_warned_of_by_name(tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.touch()
    entries = [
        (1, 6, -1),
        (2, 4, 1234),
        (4, 4, -1),
        (0x10, 4, -1),
        (0x20, 4, -1),
    ]  # user, one by id, group, mask, others
    try:
        os.setxattr(file, "user.x", b"\0\xff=\n")
        acl = struct.pack("<I", 2) + b"".join(struct.pack("<HHi", *entry) for entry in entries)
        os.setxattr(file, "system.posix_acl_access", acl)
    except OSError as error:
        pytest.skip(f"this file system has no attributes of this kind: {error}")
    for options in ([], ["--xattrs-include=*"]):
        made = tmp_path / "made.tar"
        words = ["tar", "--format=pax", "--xattrs", "--acls", *options, "-C", str(tmp_path), "-cf", str(made), "f"]
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode or done.stderr:
            pytest.skip(f"tar: {done.stderr}")
        member = one(made.read_bytes())
        assert member.xattrs["user.x"] == b"\0\xff=\n"
        assert "access ACL" in member.dropped


@pytest.mark.parametrize("end", [b"", bytes(512), bytes(1024), bytes(10240)])
def test_an_archive_may_end_in_any_way(end: bytes) -> None:
    body = archive(info("a", size=5))[:1024]
    assert [member.name for member in read(body + end)] == [b"a"]
    assert read(end) == []
    assert [member.name for member in read(body[: 512 + 5])] == [b"a"], "padding may be missing"


def test_a_lone_block_of_zeros_is_no_end() -> None:
    body = archive(info("a"))[:512]
    with pytest.raises(Malformed, match="lone block"):
        read(body + bytes(512) + body + bytes(1024))


@pytest.mark.parametrize("number", [-1, -2, (1 << 32) - 1, 1 << 32, (1 << 40) + 5])
@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("field", ["uid", "gid"])
def test_ids_out_of_range_are_refused_by_name_and_number(field: str, format: int, number: int) -> None:
    with pytest.raises(Malformed, match=f"^/dir/su: {field} {number}: out of range"):
        read(archive(info("dir/su", mode=0o4755, **{field: number}), format=format))


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (pax(mtime="nan"), "not a time"),
        (pax(mtime="inf"), "not a time"),
        (pax(mtime="1e400"), "not a time"),
        (pax(mtime="9" * 30), "not a time"),
        (with_field(136, b"\x80" + b"\x7f" * 11), "mtime 154135671558081661678616447: out of range"),
        (pax(**{"GNU.sparse.size": "-5", "GNU.sparse.map": ""}), "size -5: out of range"),
        (archive(info(type=tarfile.SYMTYPE, linkname="x" * 4096)), "a link to .*: longer than 4095 bytes"),
        (archive(info(type=tarfile.SYMTYPE, pax_headers={"linkpath": "a\0b"})), "or with a NUL"),
        (pax(uid="1_0"), "not a number"),
        (pax(size="-1"), "out of range"),
        (pax(**{"GNU.sparse.size": "10", "GNU.sparse.map": "5,10"}), "leads out"),
        (pax(**{"GNU.sparse.size": "10", "GNU.sparse.map": "5"}), "1 numbers"),
        (pax(**{"GNU.sparse.size": str(TIB + 1), "GNU.sparse.map": f"{TIB},0"}), "a file may have"),
        (archive(info("d", type=tarfile.CHRTYPE, devmajor=1 << 20), format=tarfile.GNU_FORMAT), "devmajor"),
        (b"x" * 512, "not a tar archive"),
        (archive(info("a", size=5000))[:2000], "ends in the middle"),
    ],
)
def test_odd_numbers_are_refused(data: bytes, why: str) -> None:
    with pytest.raises(Malformed, match=why):
        read(data)


def test_names_of_global_records_are_bounded() -> None:
    """They apply to all following members, including those with a name and no value."""
    header, end = archive(info("x", type=b"g"))[:512], archive(info())[:512]
    longest = MAX_HEADER // 4
    names = (extra_header(header, b"%d %05d%s=\n" % (longest, number, b"k" * (longest - 14))) for number in range(5))
    with pytest.raises(Malformed, match="global headers of more than"):
        read(b"".join(one + end for one in names))


def test_records_are_counted() -> None:
    data = b"".join(b"10 %05x=\n" % number for number in range(MAX_RECORDS + 1))
    with pytest.raises(Malformed, match=f"more than {MAX_RECORDS} records"):
        read(extra_header(archive(info("x", type=b"x"))[:512], data))


def test_many_headers_for_one_member_are_refused() -> None:
    header = pax(comment="x")[:1024]
    with pytest.raises(Malformed, match="headers for one member"):
        read(header * 5000)


@pytest.mark.parametrize("kind", [b"x", b"g", b"L", b"K"])
def test_a_large_header_is_refused_unread(tmp_path: Path, kind: bytes) -> None:
    """The reader's memory stays below 64 MiB."""
    file = tmp_path / "bomb"
    with file.open("wb") as target:
        target.write(info("././@LongLink", type=kind, size=600 << 20).tobuf(tarfile.GNU_FORMAT))
        target.truncate(601 << 20)
    program = (
        "import sys\n"
        "from caisson.image.containers.tar import members\n"
        "try: list(members(open(sys.argv[1], 'rb'), 'it', 1 << 40))\n"
        "except Exception as error: print(error)\n"
        "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    )
    done = subprocess.run([sys.executable, "-c", program, file], capture_output=True, text=True, check=True)
    error, peak = done.stdout.splitlines()
    assert f"at most {MAX_HEADER}" in error and int(peak) < 64 << 10


def test_the_largest_map_in_the_data_is_read() -> None:
    runs = MAX_EXTENTS
    lines = b"%d\n" % runs + b"".join(b"%d\n0\n" % number for number in range(runs))
    lines += bytes(-len(lines) % 512)
    entry = info("GNUSparseFile.0/a", size=len(lines))
    entry.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "a",
                         "GNU.sparse.realsize": str(runs)}  # fmt: skip
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as written:
        written.addfile(entry, io.BytesIO(lines))
    (member,) = read(stream.getvalue())
    assert member.size == runs and member.extents == ()


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        (b"99999999\n", "99999999 runs; at most"),
        (b"-1\n", "-1 runs; at most"),
        (b"x\n", "not a number"),
        (b"1" * 2000, "unterminated number"),
    ],
)
def test_reader_rejects_maps_that_lie(lines: bytes, why: str) -> None:
    data = lines + bytes(-len(lines) % 512)
    entry = info("GNUSparseFile.0/a", size=len(data))
    entry.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "a",
                         "GNU.sparse.realsize": "1"}  # fmt: skip
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as written:
        written.addfile(entry, io.BytesIO(data))
    with pytest.raises(Malformed, match=why):
        read(stream.getvalue())
