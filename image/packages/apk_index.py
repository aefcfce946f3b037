"""Parse the index of an Alpine repository, and resolve names to the packages they need.

An index is a text of records, a line `LETTER:value` each (apk-v2(5), apk-package(5)):

    C:Q1…   the checksum of the control part      P: V: A:   name, version, architecture     S: bytes
    D:      what it depends on                    p:         what it provides                k: priority as a provider

A dependency is a name (of a package, or provided: so:libc.musl-x86_64.so.1, cmd:sh, pc:zlib) with a version
constraint; with a leading ! it must not be there.  `install_if` (i:) is not followed: it only adds what is useful.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from caisson.image.errors import ImageError

#: Suffixes that sort before a release, and after it, in order (apk-package(5)).
BEFORE = ("alpha", "beta", "pre", "rc")
AFTER = ("cvs", "svn", "git", "hg", "p")

VERSION = re.compile(
    r"(?P<digits>\d+(?:\.\d+)*)(?P<letter>[a-z]?)(?P<suffixes>(?:_(?:alpha|beta|pre|rc|cvs|svn|git|hg|p)\d*)*)"
    r"(?:~(?P<commit>[0-9a-f]+))?(?:-r(?P<revision>\d+))?"
)
DEPENDENCY = re.compile(
    r"(?P<no>!?)(?P<name>[^=<>~@\s]+)(?:@\S+?)?(?:(?P<how>>=|<=|=~|~=|[=<>~])(?P<version>[^<>=~\s].*))?"
)

#: How a part of a version ranks against another in its place: nothing at all is above a release candidate, and a
#: further number above a letter.
_PRE, _END, _REVISION, _COMMIT, _NUMBER, _POST, _LETTER, _DIGITS = range(8)

_Part = tuple[int, str]


class Unresolvable(ImageError):
    """Packages conflict, or one does not exist; the text says which, and what asks for it."""


@dataclass(frozen=True)
class Dependency:
    """Represent a name with a constraint; ``how`` is empty or one of = < > <= >= ~; ``conflict``: must not exist."""

    name: str
    how: str = ""
    version: str = ""
    conflict: bool = False

    @classmethod
    def parse(cls, text: str) -> Dependency:
        """Parse a dependency.  Raises ImageError if it is malformed."""
        found = DEPENDENCY.fullmatch(text)
        if not found:
            raise ImageError(f"dependency {text!r}: no Alpine package can have it")
        how = found["how"] or ""
        return cls(found["name"], "~" if "~" in how else how, found["version"] or "", bool(found["no"]))

    def accepts(self, version: str) -> bool:
        """Return whether a version satisfies it; an empty one (provided without a version) only where any does."""
        if not self.how:
            return True
        if not version:
            return False
        if self.how == "~":
            wanted = list(_parts(self.version))[:-1]
            return list(_parts(version))[: len(wanted)] == wanted
        order = compare(version, self.version)
        return (order < 0 and "<" in self.how) or (order > 0 and ">" in self.how) or (order == 0 and "=" in self.how)

    def __str__(self) -> str:
        return f"{'!' if self.conflict else ''}{self.name}{self.how}{self.version}"


@dataclass(frozen=True)
class Entry:
    """Represent a package of an index.  ``repository`` is the URL that its file is below."""

    name: str
    version: str
    checksum: str
    size: int
    architecture: str = ""
    dependencies: tuple[Dependency, ...] = ()
    provides: tuple[tuple[str, str], ...] = ()
    priority: int = 0
    repository: str = field(default="", compare=False)

    @property
    def file(self) -> str:
        """Return its file name."""
        return f"{self.name}-{self.version}.apk"

    def owns(self) -> Iterator[str]:
        """Return the names that no other installed package may have: its own, and what it provides with a version."""
        yield self.name
        yield from (name for name, version in self.provides if version)

    def satisfies(self, dependency: Dependency) -> bool:
        """Return whether it is, or provides, what is requested (or excluded)."""
        names = ((self.name, self.version), *self.provides)
        return any(name == dependency.name and dependency.accepts(version) for name, version in names)


def parse(text: str, repository: str = "") -> Iterator[Entry]:
    """Yield the packages of an index.  Raises ImageError for one that is malformed."""
    for record in re.split(r"\n{2,}", text.strip("\n")):
        fields = dict(line.split(":", 1) for line in record.splitlines() if re.match("[A-Za-z]:", line))
        if not fields:
            continue
        try:
            name, version, checksum, size = fields["P"], fields["V"], fields["C"], int(fields["S"])
            priority = int(fields.get("k", "0"))
        except (KeyError, ValueError) as error:
            raise ImageError(
                f"an entry of {repository or 'the index'} is malformed: {error}: {record[:80]!r}"
            ) from error
        # A file name on this machine is made of these.
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._+-]*", name) or not VERSION.fullmatch(version):
            raise ImageError(f"package {name!r} {version!r}: no Alpine package can be called so")
        yield Entry(
            name, version, checksum, size, fields.get("A", ""),
            tuple(Dependency.parse(word) for word in fields.get("D", "").split()),
            tuple(_provided(word) for word in fields.get("p", "").split()),
            priority, repository,
        )  # fmt: skip


def _provided(text: str) -> tuple[str, str]:
    name, _, version = text.partition("=")
    return name, version


def compare(first: str, second: str) -> int:
    """Return a number below, equal to or above 0: the first version is older, the same, newer.  Raises ImageError."""
    for (kind, value), (other_kind, other) in zip(_parts(first), _parts(second), strict=False):
        if kind != other_kind:
            return kind - other_kind
        if value == other:
            continue
        # After the first, a number with a leading zero is a fraction: 1.05 is older than 1.5.
        if kind in (_COMMIT, _LETTER) or (kind == _DIGITS and "." in value and ".0" in (value[:2], other[:2])):
            return 1 if value > other else -1
        if int(value.lstrip(".")) != int(other.lstrip(".")):
            return int(value.lstrip(".")) - int(other.lstrip("."))
    return 0


def _parts(version: str) -> Iterator[_Part]:
    """Split a version into parts, each with its kind; numbers after the first begin with a dot."""
    found = VERSION.fullmatch(version)
    if not found:
        raise ImageError(f"version {version!r}: no Alpine package can have it")
    for number, digits in enumerate(found["digits"].split(".")):
        yield _DIGITS, f".{digits}" if number else digits
    if found["letter"]:
        yield _LETTER, found["letter"]
    for name, number in re.findall(r"_([a-z]+)(\d*)", found["suffixes"]):
        yield (_PRE, str(BEFORE.index(name))) if name in BEFORE else (_POST, str(AFTER.index(name)))
        if number:
            yield _NUMBER, number
    if found["commit"]:
        yield _COMMIT, found["commit"]
    if found["revision"]:
        yield _REVISION, found["revision"]
    yield _END, "0"


class Index:
    """Hold the packages of several repositories."""

    def __init__(self, entries: Iterable[Entry]) -> None:
        self._by_name: dict[str, list[Entry]] = {}
        for entry in entries:
            for name in dict.fromkeys((entry.name, *(name for name, _ in entry.provides))):
                self._by_name.setdefault(name, []).append(entry)

    def candidates(self, dependency: Dependency) -> list[Entry]:
        """List what satisfies a dependency, best first: of this name, of the highest priority, the newest."""
        found = [entry for entry in self._by_name.get(dependency.name, []) if entry.satisfies(dependency)]
        found.sort(key=lambda entry: entry.name)
        found.sort(key=_Newest)
        found.sort(key=lambda entry: (entry.name != dependency.name, -entry.priority))
        return found

    def newest(self, package: str) -> Entry:
        """Return the package of exactly this name (a constraint may follow it).  Raises Unresolvable."""
        wanted = Dependency.parse(package)
        found = [entry for entry in self.candidates(wanted) if entry.name == wanted.name]
        if not found:
            raise Unresolvable(f"there is no package {package} in the repositories")
        return found[0]

    def resolve(self, packages: Iterable[str]) -> list[Entry]:
        """Resolve packages to these and all they depend on, sorted by name.

        Backtracks from a dead end.  Raises Unresolvable with what blocked the best attempt.
        """
        todo: _Todo | None = None
        for package in reversed([Dependency.parse(package) for package in packages]):
            if package.conflict:
                raise Unresolvable(f"{package}: a definition names what it wants, not what it does not")
            todo = (package, "the definition", todo)
        chosen: dict[str, Entry] = {}
        untried: list[tuple[dict[str, Entry], list[Entry], _Todo | None]] = []
        furthest, obstacle = -1, ""
        while todo is not None:
            dependency, who, rest = todo
            if dependency.conflict or any(entry.satisfies(dependency) for entry in chosen.values()):
                todo = rest  # conflicts are checked when something is chosen
                continue
            options, reason = [], f"{who} needs {dependency}, which no package is or provides"
            for entry in self.candidates(dependency):
                if clash := _clash(entry, chosen):
                    reason = f"{who} needs {dependency}, but {clash}"
                else:
                    options.append(entry)
            if len(chosen) > furthest and not options:
                furthest, obstacle = len(chosen), reason
            untried.append((chosen, options[::-1], rest))
            while untried and not untried[-1][1]:
                untried.pop()
            if not untried:
                raise Unresolvable(obstacle)
            before, options, rest = untried[-1]
            entry = options.pop()
            chosen = before | {entry.name: entry}
            todo = rest
            for need in reversed(entry.dependencies):
                todo = (need, entry.name, todo)
        return sorted(chosen.values(), key=lambda entry: entry.name)


#: What is still to be satisfied, and what asked for it, as a list shared by many attempts.
_Todo = tuple[Dependency, str, "_Todo | None"]


@dataclass(frozen=True)
class _Newest:
    """Compare for sorting: newest version first."""

    entry: Entry

    def __lt__(self, other: _Newest) -> bool:
        return compare(self.entry.version, other.entry.version) > 0


def _clash(entry: Entry, chosen: Mapping[str, Entry]) -> str:
    """Say why a package conflicts with the chosen ones; empty if it does not."""
    owned = set(entry.owns())
    for other in chosen.values():
        if both := owned.intersection(other.owns()):
            return f"{entry.name}-{entry.version} and {other.name}-{other.version} cannot both be {min(both)}"
        for one, two in ((entry, other), (other, entry)):
            for dependency in one.dependencies:
                if dependency.conflict and two.satisfies(dependency):
                    return f"{one.name} excludes {dependency.name}, which is {two.name}-{two.version}"
    return ""
