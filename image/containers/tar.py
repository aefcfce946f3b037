"""Read an untrusted tar archive, one member at a time and in bounded memory.

Supports all dialects that engines and tar(1) write: V7, ustar, GNU (long names, base-256 numbers, sparse), pax (sparse
0.0, 0.1 and 1.0), star's and libarchive's extended attributes.  Python's own tarfile treats a damaged header as the
end, wraps large owner ids, and keeps headers of any size in memory.

Sources: tar(5) of libarchive, POSIX pax, GNU tar manual, appendix "Tar Internals".
"""

from __future__ import annotations

import base64
import binascii
import math
import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import IO
from urllib.parse import unquote_to_bytes

from caisson.image.formats.tree import Extent, Malformed, text

BLOCK = 512

#: Maximum bytes of one pax header or long name, and of all global ones.
MAX_HEADER = 1 << 20

#: Maximum headers of one member, records of a pax header and of all global ones, and data runs of a sparse member.
MAX_HEADERS = 32
MAX_RECORDS = 1 << 15
MAX_EXTENTS = 65_536

#: The range of ids that stat(2) can return; the largest 32-bit number means "none".
MAX_ID = (1 << 32) - 2

#: Range of times in seconds: more than any file system supports, and within the database's integers.
MAX_TIME = (1 << 62) - 1

#: Maximum bytes of a symbolic link's target (limits.h, PATH_MAX, without its NUL).
MAX_TARGET = 4095

#: Device numbers as the kernel's 32-bit dev_t has them.
MAX_MAJOR, MAX_MINOR = (1 << 12) - 1, (1 << 20) - 1

FILE, HARD_LINK = stat.S_IFREG, 0
KINDS = {
    b"0": FILE, b"\0": FILE, b"7": FILE, b"S": FILE, b"1": HARD_LINK, b"2": stat.S_IFLNK, b"3": stat.S_IFCHR,
    b"4": stat.S_IFBLK, b"5": stat.S_IFDIR, b"D": stat.S_IFDIR, b"6": stat.S_IFIFO,
}  # fmt: skip

#: GNU's volume labels and the like: not files.
IGNORED = (b"V", b"M", b"N")

#: Textual access control lists (star, GNU tar), and other attributes that are not xattrs.
ACLS = {b"SCHILY.acl.access": "access ACL", b"SCHILY.acl.default": "default ACL", b"SCHILY.acl.ace": "NFSv4 ACL"}
FLAGS = b"SCHILY.fflags"


#: Creates the error for this kind of damage.
Damaged = Callable[[str], Malformed]


@dataclass
class Member:
    """A member; ``kind`` is the type of stat(2), or HARD_LINK.  ``data`` is the offset of its contents in the archive.

    ``dropped`` names attributes that this reader cannot pass on.
    """

    name: bytes
    kind: int
    mode: int
    uid: int
    gid: int
    mtime: int
    size: int
    link: bytes
    device: tuple[int, int]
    data: int
    extents: tuple[Extent, ...] | None
    xattrs: dict[str, bytes] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)


def members(stream: IO[bytes], shown: str, max_file: int) -> Iterator[Member]:
    """Yield the members of a seekable archive, from the start.

    An archive may be empty, and lack its two final blocks of zeros.  Raises Malformed for damage, a file of more than
    ``max_file`` bytes, and out-of-range ids.
    """
    reader = _Reader(stream, shown, max_file)
    while (member := reader.next()) is not None:
        yield member


class _Reader:
    def __init__(self, stream: IO[bytes], shown: str, max_file: int) -> None:
        self._stream = stream
        self._shown = shown
        self._max_file = max_file
        self._at = 0
        self._global: dict[bytes, bytes] = {}
        self._end = stream.seek(0, 2)
        stream.seek(0)

    def next(self) -> Member | None:
        """Read up to the next member; None at the end."""
        long: dict[bytes, bytes] = {}
        records: list[tuple[bytes, bytes]] = []
        for _ in range(MAX_HEADERS):
            header = self._header()
            if header is None:
                if long or records:
                    raise self._damaged("ends after the header of a missing member")
                return None
            kind = header[156:157]
            if kind in (b"x", b"X"):
                records = _records(self._extra(header), self._damaged)
            elif kind == b"g":
                self._global |= dict(_records(self._extra(header), self._damaged))
                size = sum(len(key) + len(value) for key, value in self._global.items())
                if size > MAX_HEADER or len(self._global) > MAX_RECORDS:
                    raise self._damaged(f"global headers of more than {MAX_HEADER} bytes or {MAX_RECORDS} records")
            elif kind in (b"L", b"K"):
                long[kind] = self._extra(header).split(b"\0", 1)[0]
            elif kind in IGNORED:
                self._skip(_number(header[124:136], self._damaged))
            else:
                return self._member(header, kind, long, records)
        raise self._damaged(f"more than {MAX_HEADERS} headers for one member")

    def _damaged(self, why: str) -> Malformed:
        return Malformed(f"{self._shown}: not a tar archive, or a damaged one: {why} at byte {self._at}")

    def _read(self, size: int) -> bytes:
        self._stream.seek(self._at)
        data = self._stream.read(size)
        if len(data) < size:
            raise self._damaged("ends in the middle")
        self._at += size
        return data

    def _skip(self, size: int) -> None:
        """Skip contents and their padding, which the last member may lack."""
        if size < 0 or self._at + size > self._end:
            raise self._damaged("ends in the middle")
        self._at = min(self._at + size + -size % BLOCK, self._end)

    def _header(self) -> bytes | None:
        if self._at == self._end:
            return None
        block = self._read(BLOCK)
        if not any(block):
            if self._at < self._end and any(self._read(BLOCK)):
                raise self._damaged("a lone block of zeros")
            return None
        told = _number(block[148:156], self._damaged)
        rest = block[:148] + b" " * 8 + block[156:]
        if told not in (sum(rest), sum(rest) - 256 * sum(byte > 127 for byte in rest)):  # signed on some old systems
            raise self._damaged("a header is missing")
        return block

    def _extra(self, header: bytes) -> bytes:
        size = _number(header[124:136], self._damaged)
        if not 0 <= size <= MAX_HEADER:
            raise Malformed(f"{self._shown}: a header of {size} bytes; at most {MAX_HEADER} are read")
        data = self._read(size)
        self._at = min(self._at + -size % BLOCK, self._end)
        return data

    def _member(
        self, header: bytes, kind: bytes, long: dict[bytes, bytes], records: list[tuple[bytes, bytes]]
    ) -> Member:
        pax = self._global | dict(records)
        name = pax.get(b"GNU.sparse.name") or pax.get(b"path") or long.get(b"L") or _name(header)
        link = pax.get(b"linkpath") or long.get(b"K") or _until_nul(header[157:257])
        if kind not in KINDS:
            raise Malformed(f"{text(name)}: tar type {kind!r}: unknown")

        def number(field: bytes, place: slice, most: int, least: int = 0) -> int:
            value = _decimal(pax[field], name) if pax.get(field) else _number(header[place], self._damaged)
            if not least <= value <= most:
                raise Malformed(f"{text(name)}: {field.decode()} {value}: out of range; {least} to {most} can be kept")
            return value

        mode = KINDS[kind]
        if mode == stat.S_IFLNK and (len(link) > MAX_TARGET or b"\0" in link):
            raise Malformed(f"{text(name)}: a link to {text(link)}: longer than {MAX_TARGET} bytes, or with a NUL")
        if kind in (b"\0", b"0") and name.endswith(b"/"):
            mode = stat.S_IFDIR  # V7 has no type for directories
        member = Member(
            name, mode, _number(header[100:108], self._damaged) & 0o7777,
            number(b"uid", slice(108, 116), MAX_ID), number(b"gid", slice(116, 124), MAX_ID),
            _time(pax[b"mtime"], name) if pax.get(b"mtime") else number(b"mtime", slice(136, 148), MAX_TIME, -MAX_TIME),
            number(b"size", slice(124, 136), 1 << 62), link, (0, 0), self._at, None,
        )  # fmt: skip
        if mode in (stat.S_IFCHR, stat.S_IFBLK):
            major, minor = slice(329, 337), slice(337, 345)
            member.device = number(b"SCHILY.devmajor", major, MAX_MAJOR), number(b"SCHILY.devminor", minor, MAX_MINOR)
        stored, begin = member.size, self._at
        if mode == FILE:
            runs = (
                self._sparse(member, header, pax, records) if kind == b"S" or b"GNU.sparse" in b"".join(pax) else None
            )
            if member.size < 0:
                raise Malformed(f"{text(name)}: size {member.size}: out of range")
            if member.size > self._max_file:
                most = f"a file may have {self._max_file} (--max-size raises it)"
                raise Malformed(f"{text(name)}: {member.size} bytes; {most}")
            if kind == b"S":
                begin = member.data  # the rest of its map comes first, and does not count
            if runs is not None:
                member.extents = _extents(member, runs, begin + stored - member.data)
            self._at = begin
            self._skip(stored)
        else:
            member.size = 0
            if kind == b"D":
                self._skip(stored)  # a list of names, from an incremental backup
        _attributes(member, pax)
        return member

    def _sparse(
        self, member: Member, header: bytes, pax: dict[bytes, bytes], records: list[tuple[bytes, bytes]]
    ) -> list[int] | None:
        """Set the size of a sparse file, and the offset of its data; returns its map: (start, length) of each run."""
        if header[156:157] == b"S":
            runs, member.size = self._old_map(header)
            member.data = self._at
        elif pax.get(b"GNU.sparse.major") == b"1":
            runs, member.data = self._map_in_data(member), self._at
            member.size = _decimal(pax.get(b"GNU.sparse.realsize", b""), member.name)
        elif b"GNU.sparse.size" in pax:
            places = (b"GNU.sparse.offset", b"GNU.sparse.numbytes")  # 0.0 repeats these, 0.1 has one map
            separate = [value for key, value in records if key in places]
            joined = pax[b"GNU.sparse.map"].split(b",") if pax.get(b"GNU.sparse.map") else separate
            runs, member.size = (
                [_decimal(one, member.name) for one in joined],
                _decimal(pax[b"GNU.sparse.size"], member.name),
            )
        else:
            return None
        return runs

    def _old_map(self, header: bytes) -> tuple[list[int], int]:
        """Read GNU's old map: four runs in the header, 21 in each following block."""
        runs: list[int] = []
        block, begin, count, more = header, 386, 4, header[482]
        while True:
            for at in range(begin, begin + 24 * count, 24):
                if block[at] or block[at + 12]:
                    runs += (_number(block[place : place + 12], self._damaged) for place in (at, at + 12))
            if not more:
                return runs, _number(header[483:495], self._damaged)
            if len(runs) > 2 * MAX_EXTENTS:
                raise self._damaged(f"a sparse map of more than {MAX_EXTENTS} runs")
            block, begin, count = self._read(BLOCK), 0, 21
            more = block[504]

    def _map_in_data(self, member: Member) -> list[int]:
        """Read the map of pax 1.0: lines with numbers, the first says how many runs, up to the end of a block."""
        lines: list[bytes] = []  # the last one is incomplete, or padding
        rest, read, wanted = b"", 0, 1
        while len(lines) < wanted:
            if read > MAX_HEADER:
                raise self._damaged(f"a sparse map of more than {MAX_HEADER} bytes")
            *found, rest = (rest + self._read(BLOCK)).split(b"\n")
            read += BLOCK
            if len(rest) > BLOCK:
                raise self._damaged("an unterminated number in a sparse map")
            if not lines and found:
                runs = _decimal(found[0], member.name)
                if not 0 <= runs <= MAX_EXTENTS:
                    raise Malformed(f"{text(member.name)}: a sparse map of {runs} runs; at most {MAX_EXTENTS} are read")
                wanted = 1 + 2 * runs
            lines += found
        return [_decimal(line, member.name) for line in lines[1:wanted]]


def _extents(member: Member, runs: list[int], stored: int) -> tuple[Extent, ...]:
    if len(runs) % 2 or len(runs) > 2 * MAX_EXTENTS:
        raise Malformed(f"{text(member.name)}: a sparse map of {len(runs)} numbers; at most {2 * MAX_EXTENTS}")
    found, at, last = [], 0, 0
    for start, length in zip(runs[::2], runs[1::2], strict=True):
        if start < last or length < 0 or start + length > member.size or at + length > stored:
            raise Malformed(f"{text(member.name)}: a sparse map that is out of order, or leads out of the file")
        if length:
            found.append(Extent(start, length, member.data + at))
        last, at = start + length, at + length
    return tuple(found)


def _name(header: bytes) -> bytes:
    name = _until_nul(header[:100])
    prefix = _until_nul(header[345:500]) if header[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _until_nul(data: bytes) -> bytes:
    return data.split(b"\0", 1)[0]


def _number(data: bytes, damaged: Damaged) -> int:
    """Return a number of a header: octal digits, or with the highest bit set two's complement (GNU, star)."""
    if data[0] & 0x80:
        value = int.from_bytes(bytes([data[0] & 0x7F]) + data[1:], "big")
        return value - (1 << 8 * len(data) - 1) if data[0] & 0x40 else value
    digits = _until_nul(data).strip(b" ")
    if not re.fullmatch(rb"[0-7]*", digits):
        raise damaged(f"{digits!r} is not an octal number")
    return int(digits or b"0", 8)


def _decimal(data: bytes, name: bytes) -> int:
    if not re.fullmatch(rb"-?[0-9]{1,20}", data):
        raise Malformed(f"{text(name)}: {data[:40]!r}: not a number")
    return int(data)


def _time(data: bytes, name: bytes) -> int:
    try:
        value = float(data)
    except ValueError:
        value = math.nan
    if not re.fullmatch(rb"-?[0-9.]{1,40}", data) or not -MAX_TIME <= value <= MAX_TIME:  # NaN is not
        raise Malformed(f"{text(name)}: {data[:40]!r}: not a time")
    return math.floor(value)


def _records(data: bytes, damaged: Damaged) -> list[tuple[bytes, bytes]]:
    """Return the records of a pax header: `length key=value` and a newline, each."""
    found: list[tuple[bytes, bytes]] = []
    at = 0
    while at < len(data):
        if not data[at]:
            break  # padding of some writers
        digits = re.compile(rb"([0-9]{1,8}) ").match(data, at)
        end = at + int(digits[1]) if digits else 0
        key, equals, value = data[digits.end() : end - 1].partition(b"=") if digits else (b"", b"", b"")
        if not equals or end > len(data) or data[end - 1 : end] != b"\n":
            raise damaged("an invalid pax record")
        if len(found) == MAX_RECORDS:
            raise damaged(f"a pax header of more than {MAX_RECORDS} records")
        found.append((key, value))
        at = end
    return found


def _attributes(member: Member, pax: dict[bytes, bytes]) -> None:
    """Set the extended attributes of a member, in every dialect's records."""
    for key, value in pax.items():
        kind, _, name = key.partition(b"xattr.")
        if kind == b"SCHILY.":
            # A record's key cannot hold "=": GNU tar and libarchive write it, and "%" for its sake, as URLs do.
            plain_name = name.replace(b"%3D", b"=").replace(b"%25", b"%")
            member.xattrs[plain_name.decode(errors="surrogateescape")] = value
        elif kind == b"LIBARCHIVE.":
            try:
                plain = base64.b64decode(value + b"=" * (-len(value) % 4), validate=True)
            except binascii.Error:
                raise Malformed(f"{text(member.name)}: {key[:80]!r}: not base64") from None
            member.xattrs.setdefault(unquote_to_bytes(name).decode(errors="surrogateescape"), plain)
        elif key == b"RHT.security.selinux":
            member.xattrs["security.selinux"] = value
        elif key in ACLS:
            member.dropped.append(ACLS[key])
        elif key == FLAGS:
            member.dropped.append("file flags")
