"""Parse kernel config fragments: what a guest needs from its kernel, symbol by symbol, with the reason.

    CONFIG_VIRTIO_VSOCKETS=y module vmw_vsock_virtio_transport: how the host reaches the agent
    CONFIG_TIME_NS=y optional: clocks of a container's own
    CONFIG_VIRTIO_BLK=y later virtio_blk: disks, when one is plugged in
    CONFIG_MEMCG_V1=y since 6.11 optional: limits by cgroup v1

The syntax is that of a .config file, followed by ``since VERSION`` and ``until VERSION`` (kernels before and after do
not have the symbol, and are not asked for it), ``optional``, ``module NAME…`` (loaded at boot) or ``later NAME…`` (in
the image, and loaded when something needs it) and, after a colon, why.  The reason is mandatory: whoever drops a symbol
must know what breaks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from caisson.image.errors import ImageError

LINE = re.compile(
    r"(?P<symbol>CONFIG_[A-Za-z0-9_]+)=(?P<value>y|m|n|-?\d+|0x[0-9a-fA-F]+|\"[^\"]*\")"
    r"(?: since (?P<since>\d+\.\d+))?(?: until (?P<until>\d+\.\d+))?(?P<optional> optional)?"
    r"(?P<modules> (?:module|later)(?: [a-z0-9_-]+)+)?: *(?P<reason>\S.*)"
)

Version = tuple[int, int]


class FragmentError(ImageError):
    """A fragment is malformed, or contradicts another."""


@dataclass(frozen=True)
class Request:
    """Represent a symbol that a fragment asks for, from kernels ``since`` one version ``until`` another (inclusive).

    ``where`` is file:line.
    """

    symbol: str
    value: str
    reason: str
    where: str
    optional: bool = False
    modules: tuple[str, ...] = ()
    later: bool = False
    since: Version = (0, 0)
    until: Version = (999, 0)

    def concerns(self, version: Version) -> bool:
        """Return whether kernels of this version are asked for it."""
        return self.since <= version <= self.until


def version_of(release: str) -> Version:
    """Parse the version in a kernel's release, for example (6, 12) for 6.12.117-1.  Raises FragmentError."""
    found = re.match(r"(\d+)\.(\d+)", release)
    if not found:
        raise FragmentError(f"{release!r} does not begin with a kernel's version")
    return int(found[1]), int(found[2])


def parse(file: Path) -> list[Request]:
    """Parse one fragment into requests, in its order.  Raises FragmentError that names the line."""
    requests = []
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        known = ", ".join(sorted(path.stem for path in file.parent.glob("*.conf")))
        raise FragmentError(f"there is no kernel fragment {file.stem!r}; there are: {known}") from error
    except UnicodeDecodeError as error:
        raise FragmentError(f"{file}: is not UTF-8 at byte {error.start}") from error
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        found = LINE.fullmatch(line.rstrip())
        if not found:
            raise FragmentError(
                f"{file.name}:{number}: expected CONFIG_NAME=value [since N.N] [until N.N] [optional] "
                f"[module NAME…|later NAME…]: reason, not {line!r}"
            )
        requests.append(
            Request(
                symbol=found["symbol"],
                value=found["value"],
                reason=found["reason"],
                where=f"{file.name}:{number}",
                optional=bool(found["optional"]),
                modules=tuple((found["modules"] or "").split()[1:]),
                later=(found["modules"] or "").startswith(" later"),
                since=version_of(found["since"] or "0.0"),
                until=version_of(found["until"] or "999.0"),
            )
        )
    return requests


def merge(fragments: Iterable[list[Request]]) -> list[Request]:
    """Merge requests in order.  Raises FragmentError when two ask for different values of one symbol."""
    merged: dict[str, Request] = {}
    for request in (request for fragment in fragments for request in fragment):
        first = merged.setdefault(request.symbol, request)
        if first.value != request.value:
            raise FragmentError(
                f"{request.where} asks for {request.symbol}={request.value} ({request.reason}), but "
                f"{first.where} for {request.symbol}={first.value} ({first.reason})"
            )
    return list(merged.values())


def parse_config(text: str) -> dict[str, str]:
    """Parse the symbols of a .config that have a value; those that are off are absent."""
    return dict(re.findall(r"^(CONFIG_\w+)=(.*)$", text, re.MULTILINE))


class Unsatisfied(ImageError):
    """A kernel lacks what the fragments ask for; the text names each symbol, where it was asked for, and why."""

    def __init__(self, lacking: Sequence[tuple[Request, str]]) -> None:
        """``lacking`` has each request with what became of it, in words."""
        lines = [f"  {one.symbol}={one.value} ({one.where}: {one.reason}): it {what}" for one, what in lacking]
        super().__init__("the kernel lacks what the fragments ask for:\n" + "\n".join(lines))
        self.lacking = list(lacking)

    def with_reasons(self, why: Callable[[Request], str]) -> Unsatisfied:
        """Add the reasons of who knows the kernel's own rules."""
        return Unsatisfied([(request, f"{what}, {why(request)}") for request, what in self.lacking])


@dataclass(frozen=True)
class Verdict:
    """How a kernel satisfies the requests: which modules it takes, which of them later, and which optional symbols it
    lacks.
    """

    modules: tuple[str, ...]
    missing: tuple[Request, ...]
    later: tuple[str, ...] = ()


def check(requests: Iterable[Request], config: Mapping[str, str]) -> Verdict:
    """Compare what is asked for with a kernel's config.

    ``y`` is satisfied by ``y``, or by ``m`` where the request names the modules; ``n`` by absence.  Raises Unsatisfied.
    """
    modules: list[str] = []
    later: list[str] = []
    missing: list[Request] = []
    lacking: list[tuple[Request, str]] = []
    for request in requests:
        actual = config.get(request.symbol, "n")
        if actual == request.value or (request.value == "y" and actual == "m" and request.modules):
            (later if request.later else modules).extend(request.modules if actual == "m" else ())
        elif request.optional:
            missing.append(request)
        else:
            what = "is a module, but the fragment names none" if actual == "m" else f"is {actual}"
            lacking.append((request, what))
    if lacking:
        raise Unsatisfied(lacking)
    return Verdict(tuple(dict.fromkeys(modules)), tuple(missing), tuple(dict.fromkeys(later)))
