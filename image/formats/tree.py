"""The file tree of an image: merged from layers, directories and generated files, read by every format's writer.

Names and attributes are kept in a temporary database that SQLite spills to disk, contents stay where they are: a tree
of a million names needs no more memory than one of ten.  Names are bytes, as on disk; names in a tree are never used as
paths on this machine, and links are resolved inside it.
"""

from __future__ import annotations

import os
import sqlite3
import stat
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Self

from caisson.image.errors import ImageError
from caisson.image.formats.beneath import FILE, Beneath

#: The inode number of the root directory.
ROOT = 1

#: Maximum symbolic links followed to a name (path_resolution(7)).
MAX_LINKS = 40

#: Maximum directories in a path.
MAX_DEPTH = 10_000

#: Maximum bytes of a name (limits.h, NAME_MAX).
MAX_NAME = 255

#: Bytes of cached directory paths.
MAX_CACHE = 1 << 20

BLOCK = 1 << 20

SCHEMA = """
CREATE TABLE inode (number INTEGER PRIMARY KEY, mode INTEGER, uid INTEGER, gid INTEGER, mtime INTEGER, target BLOB,
                    major INTEGER, minor INTEGER, size INTEGER, file BLOB, offset INTEGER, extents BLOB, data BLOB,
                    shared INTEGER DEFAULT 0, first BLOB);
CREATE TABLE entry (parent INTEGER, name BLOB, inode INTEGER, PRIMARY KEY (parent, name)) WITHOUT ROWID;
CREATE TABLE xattr (inode INTEGER, name TEXT, value BLOB, PRIMARY KEY (inode, name)) WITHOUT ROWID;
"""
COLUMNS = "mode, uid, gid, mtime, target, major, minor, size, file, offset, extents, data"


class Malformed(ImageError):
    """An image that is damaged, contradicts itself, or escapes its root."""


@dataclass(frozen=True)
class Extent:
    """A run of data in a sparse file: ``start`` in the file, ``length`` bytes, ``stored`` the offset to read them
    from.
    """

    start: int
    length: int
    stored: int


@dataclass(frozen=True)
class Node:
    """A file of a tree; ``mode`` is stat(2)'s, with the type.

    The contents of a regular file are ``size`` bytes: ``data``, or those of ``file`` on this machine from ``offset``
    on, a path beneath ``within`` where that is given.  Of a sparse one only the ``extents`` are stored, in order.
    """

    mode: int
    uid: int = 0
    gid: int = 0
    mtime: int = 0
    target: bytes = b""
    device: tuple[int, int] = (0, 0)
    size: int = 0
    file: bytes = b""
    offset: int = 0
    extents: tuple[Extent, ...] | None = None
    data: bytes | None = None
    xattrs: Mapping[str, bytes] = field(default_factory=dict)
    within: Beneath | None = field(default=None, compare=False)

    @classmethod
    def of(cls, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> Node:
        """Return a file owned by root with these contents; a link's are its target."""
        if stat.S_ISLNK(mode):
            return cls(mode, target=data)
        return cls(mode, size=len(data), data=data, device=device)

    @property
    def is_directory(self) -> bool:
        return stat.S_ISDIR(self.mode)

    @property
    def is_file(self) -> bool:
        return stat.S_ISREG(self.mode)

    def contents(self) -> Iterator[bytes]:
        """Yield the contents in pieces; for a sparse file those of its extents.  Raises OSError, ImageError."""
        if self.data is not None:
            yield self.data
            return
        runs = (Extent(0, self.size, self.offset),) if self.extents is None else self.extents
        descriptor = os.open(self.file, FILE) if self.within is None else self.within.open(self.file)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise ImageError(f"{os.fsdecode(self.file)}: not a regular file; it changed while it was read")
            for run in runs:
                at, left = run.stored, run.length
                while left:
                    piece = os.pread(descriptor, min(left, BLOCK), at)
                    if not piece:
                        raise ImageError(f"{os.fsdecode(self.file)}: shorter than it was; it changed while it was read")
                    at, left = at + len(piece), left - len(piece)
                    yield piece
        finally:
            os.close(descriptor)

    def read(self) -> bytes:
        """Return the contents of a regular file without holes, or the target of a link."""
        return self.target or (b"".join(self.contents()) if self.is_file else b"")

    @property
    def length(self) -> int:
        """The number of bytes that `read` returns."""
        return len(self.target) or self.size


def directory(mode: int = 0o755) -> Node:
    """Return a directory owned by root."""
    return Node(stat.S_IFDIR | mode)


def text(path: bytes) -> str:
    """Return an absolute path for a message: printable, on one line."""
    shown = path.decode(errors="backslashreplace")
    shown = "".join(one if one.isprintable() else f"\\x{ord(one):02x}" for one in shown[:2000])
    return "/" + (shown if len(shown) <= 120 else f"{shown[:60]}…{shown[-50:]}")


class Tree:
    """A root directory and all below it.  Use in a `with` block, or close it.

    ``within`` is the directory with its files' contents, which it closes; None for contents at absolute paths.
    """

    def __init__(self, within: Beneath | None = None) -> None:
        self._within = within
        self._db = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        self._db.executescript(
            "PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA cache_size = -8000;" + SCHEMA
        )
        self._cache: dict[bytes, int] = {}
        self._cached = 0
        self._db.execute("BEGIN")
        self.add(directory())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the database.  Idempotent."""
        self._db.close()
        if self._within is not None:
            self._within.close()

    # Inodes

    def add(self, node: Node) -> int:
        """Add a file without a name; returns its number."""
        number = self._db.execute(f"INSERT INTO inode ({COLUMNS}) VALUES ({','.join('?' * 12)})", _row(node)).lastrowid
        assert number is not None
        self._set_xattrs(number, node)
        return number

    def change(self, number: int, node: Node) -> None:
        """Change an inode's attributes."""
        values = ", ".join(f"{column.strip()} = ?" for column in COLUMNS.split(","))
        self._db.execute(f"UPDATE inode SET {values} WHERE number = ?", (*_row(node), number))
        self._db.execute("DELETE FROM xattr WHERE inode = ?", (number,))
        self._set_xattrs(number, node)

    def node(self, number: int) -> Node:
        """Return an inode."""
        row = self._db.execute(f"SELECT {COLUMNS} FROM inode WHERE number = ?", (number,)).fetchone()
        xattrs = dict(self._db.execute("SELECT name, value FROM xattr WHERE inode = ?", (number,)))
        return _node(row, xattrs, self._within)

    def _set_xattrs(self, number: int, node: Node) -> None:
        if node.xattrs:
            rows = ((number, name, value) for name, value in node.xattrs.items())
            self._db.executemany("INSERT INTO xattr VALUES (?, ?, ?)", rows)

    # Names

    def child(self, parent: int, name: bytes) -> int | None:
        """Return the number of a directory's entry."""
        row = self._db.execute("SELECT inode FROM entry WHERE parent = ? AND name = ?", (parent, name)).fetchone()
        return row and int(row[0])

    def link(self, parent: int, name: bytes, number: int) -> None:
        """Give an inode a name, replacing an existing entry."""
        self._forget(parent, name)
        self._db.execute("INSERT OR REPLACE INTO entry VALUES (?, ?, ?)", (parent, name, number))

    def share(self, number: int) -> None:
        """Record that an inode has several names."""
        self._db.execute("UPDATE inode SET shared = 1 WHERE number = ?", (number,))

    def unlink(self, parent: int, name: bytes) -> None:
        """Remove a name, and everything below a directory."""
        self._forget(parent, name)
        self._db.execute("DELETE FROM entry WHERE parent = ? AND name = ?", (parent, name))

    def clear(self, parent: int) -> None:
        """Remove all entries of a directory."""
        self._cache.clear()
        self._db.execute("DELETE FROM entry WHERE parent = ?", (parent,))

    def _forget(self, parent: int, name: bytes) -> None:
        if self._cache and (there := self.child(parent, name)) is not None and not self._mode(there)[0] & stat.S_IFREG:
            self._cache.clear()

    def _mode(self, number: int) -> tuple[int, bytes]:
        mode, target = self._db.execute("SELECT mode, target FROM inode WHERE number = ?", (number,)).fetchone()
        return int(mode), target

    # Paths

    def put(self, path: bytes, node: Node) -> int:
        """Put a file at a path, replacing what is there; a directory keeps its entries.  Returns its number.

        Missing parents are created.  Raises Malformed.
        """
        *above, name = split(path) or [b""]
        if not name:
            if not node.is_directory:
                raise Malformed(f"{text(path)}: the root must be a directory")
            self.change(ROOT, node)
            return ROOT
        parent = self.make_directory(above)
        there = self.child(parent, name)
        if there is not None and node.is_directory and stat.S_ISDIR(self._mode(there)[0]):
            self.change(there, node)
            return there
        number = self.add(node)
        self.link(parent, name, number)
        return number

    def make_directory(self, parts: list[bytes]) -> int:
        """Return the directory at a path; missing components are created, and non-directories replaced."""
        found = self._walk(parts, make=True)
        assert found is not None
        return found

    def find_directory(self, parts: list[bytes]) -> int | None:
        """Return the directory at a path, if it exists."""
        return self._walk(parts, make=False)

    def find(self, path: bytes) -> tuple[int, Node] | None:
        """Return the file at a path, without following a final link."""
        *above, name = split(path) or [b""]
        if not name:
            return ROOT, self.node(ROOT)
        parent = self.find_directory(above)
        number = None if parent is None else self.child(parent, name)
        return None if number is None else (number, self.node(number))

    def ensure_directory(self, path: bytes) -> None:
        """Create a directory, following a final link.  Raises Malformed if it is something else."""
        parts = split(path)
        for end in range(1, len(parts) + 1):
            above = b"/".join(parts[:end])
            found = self.find(above) if self._walk(parts[:end], make=False) is None else None
            if found is not None and not stat.S_ISLNK(found[1].mode):
                raise Malformed(f"{text(above)}: a file, not a directory")
        self.make_directory(parts)

    def _walk(self, parts: list[bytes], *, make: bool) -> int | None:
        key = b"/".join(parts)
        if (cached := self._cache.get(key)) is not None:
            return cached
        way = [ROOT]
        rest = parts[::-1]
        links = 0
        while rest:
            name = rest.pop()
            if name == b"..":
                del way[max(1, len(way) - 1) :]  # the root's parent is the root
                continue
            number = self.child(way[-1], name)
            mode, target = (stat.S_IFDIR, b"") if number is None else self._mode(number)
            if number is None or not (stat.S_ISDIR(mode) or stat.S_ISLNK(mode)):
                if not make:
                    return None
                number, mode = self.add(directory()), stat.S_IFDIR
                self.link(way[-1], name, number)
            if stat.S_ISLNK(mode):
                links += 1
                if links > MAX_LINKS:
                    raise Malformed(f"{text(key)}: too many links on the way")
                if target.startswith(b"/"):
                    del way[1:]
                rest += [part for part in reversed(target.split(b"/")) if part not in (b"", b".")]
            else:
                way.append(number)
            if len(way) + len(rest) > MAX_DEPTH + 1:
                raise Malformed(f"{text(key)}: deeper than {MAX_DEPTH} directories")
        if self._cached + len(key) > MAX_CACHE:
            self._cache.clear()
            self._cached = 0
        self._cache[key] = way[-1]
        self._cached += len(key)
        return way[-1]

    def walk(self) -> Iterator[tuple[bytes, Node, bytes | None]]:
        """Yield (path, file, path of its first name) in order, a directory before its entries.

        The last is None except for a file already yielded under another name.
        """
        self._db.execute("UPDATE inode SET first = NULL WHERE shared")
        following = "SELECT name, inode FROM entry WHERE parent = ? AND name > ? ORDER BY name LIMIT 1"
        way = [(ROOT, b"")]
        lengths = [0]  # of the paths of these directories
        path = bytearray()
        while way:
            parent, after = way[-1]
            row = self._db.execute(following, (parent, after)).fetchone()
            del path[lengths[-1] :]
            if row is None:
                way.pop()
                lengths.pop()
                continue
            name, number = row
            way[-1] = parent, name
            path += b"/" + name if path else name
            node = self.node(number)
            yield bytes(path), node, self._first(number, bytes(path))
            if node.is_directory:
                way.append((number, b""))
                lengths.append(len(path))

    def _first(self, number: int, path: bytes) -> bytes | None:
        shared, first = self._db.execute("SELECT shared, first FROM inode WHERE number = ?", (number,)).fetchone()
        if shared and first is None:
            self._db.execute("UPDATE inode SET first = ? WHERE number = ?", (path, number))
        return first if shared else None

    def files(self) -> Iterator[tuple[bytes, Node]]:
        """Yield (path, file) in order, a directory before its entries."""
        return ((path, node) for path, node, _ in self.walk())


def split(path: bytes) -> list[bytes]:
    """Return the components of a path, with "." and ".." resolved lexically.

    Raises Malformed for one that escapes the root, or contains an invalid name.
    """
    parts: list[bytes] = []
    for part in path.split(b"/"):
        if part == b"..":
            if not parts and not path.startswith(b"/"):
                raise Malformed(f"{text(path)}: leaves the root")
            del parts[-1:]
        elif part not in (b"", b"."):
            parts.append(part)
    if len(parts) > MAX_DEPTH:
        raise Malformed(f"{text(path)}: deeper than {MAX_DEPTH} directories")
    if any(b"\0" in part or len(part) > MAX_NAME for part in parts):
        raise Malformed(f"{text(path)}: not a valid file name: longer than {MAX_NAME} bytes, or with a NUL")
    return parts


def _row(node: Node) -> tuple[object, ...]:
    extents = None
    if node.extents is not None:
        extents = array("Q", [part for one in node.extents for part in (one.start, one.length, one.stored)]).tobytes()
    return (
        node.mode, node.uid, node.gid, node.mtime, node.target, *node.device, node.size, node.file, node.offset,
        extents, node.data,
    )  # fmt: skip


def _node(row: tuple[object, ...], xattrs: dict[str, bytes], within: Beneath | None) -> Node:
    mode, uid, gid, mtime, target, major, minor, size, file, offset, packed, data = row
    extents = None
    if isinstance(packed, bytes):
        numbers = array("Q", packed)
        extents = tuple(Extent(*numbers[at : at + 3]) for at in range(0, len(numbers), 3))
    return Node(mode, uid, gid, mtime, target, (major, minor), size, file, offset, extents, data, xattrs, within)  # type: ignore[arg-type]
