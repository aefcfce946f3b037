"""Device rules as the list of the cgroup v1 controller, which holds what is allowed, or all but what is denied.

The rules of a configuration apply in order, and a later one may revoke part of an earlier one.  The kernel's list
cannot: denying one device of a type that is allowed as a whole leaves it allowed, without an error.  So the rules are
resolved here, what the list cannot express is rejected, and the kernel's list is read back after writing.
https://docs.kernel.org/admin-guide/cgroup-v1/devices.html
"""

from __future__ import annotations

from caisson.agent.libcontainer.cgroups import files
from caisson.agent.libcontainer.cgroups.base import WHERE, CgroupError
from caisson.agent.libcontainer.cgroups.device_program import ALWAYS, DENY_ALL
from caisson.agent.libcontainer.config.reader import SpecError
from caisson.proto.record import NOTHING, Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from caisson.agent.libcontainer.config.resources import DeviceRule

    Key = tuple[str, int | None, int | None]

EVERYTHING = "a *:* rwm"


class DeviceList(Record):
    """The `default` (allowed or not), and the accesses by device that are exceptions from it."""

    default: bool
    exceptions: Mapping[Key, frozenset[str]] = NOTHING

    def lines(self) -> dict[str, str]:
        """Format the exceptions as the kernel reads and writes them: access by device."""
        return {_device(key): _access(access) for key, access in self.exceptions.items()}


def resolve(rules: Iterable[DeviceRule]) -> DeviceList:
    """Resolve rules, together with those that always apply.  Raises SpecError for what a list cannot express."""
    default = False
    found: dict[Key, frozenset[str]] = {}
    for rule in (DENY_ALL, *rules, *ALWAYS):
        if rule.type == "a":
            default, found = rule.allow, {}
            continue
        key, access = (rule.type, rule.major, rule.minor), frozenset(rule.access)
        if rule.allow != default:
            found[key] = found.get(key, frozenset()) | access
            continue
        for other in list(found):
            if not found[other] & access or not _overlap(key, other):
                continue
            if not _contains(key, other):
                words = ("deny", "allow") if default else ("allow", "deny")
                why = f"cgroup v1 cannot {words[0]} {_device(other)} and {words[1]} {_device(key)} of it"
                raise SpecError(f"{WHERE}.devices", why)
            found[other] -= access
            if not found[other]:
                del found[other]
    return DeviceList(default, found)


def _contains(outer: Key, inner: Key) -> bool:
    """Return whether all devices of `inner` are among those of `outer`."""
    return outer[0] == inner[0] and all(mine in (None, its) for mine, its in zip(outer[1:], inner[1:], strict=True))


def _overlap(one: Key, other: Key) -> bool:
    """Return whether any device matches both."""
    return one[0] == other[0] and all(
        mine is None or its is None or mine == its for mine, its in zip(one[1:], other[1:], strict=True)
    )


def _device(key: Key) -> str:
    return f"{key[0]} {':'.join('*' if number is None else str(number) for number in key[1:])}"


def _access(letters: Iterable[str]) -> str:
    return "".join(letter for letter in "rwm" if letter in letters)


def changes(before: DeviceList | None, after: DeviceList) -> list[tuple[str, str]]:
    """Return what to write to which file; from scratch if the previous list is unknown."""
    allow, deny = "devices.allow", "devices.deny"
    more, less = (deny, allow) if after.default else (allow, deny)  # files that add and remove exceptions
    steps: list[tuple[str, str]] = []
    old: dict[str, str] = {}
    if before is None or before.default != after.default:
        steps.append((allow if after.default else deny, "a"))
    else:
        old = before.lines()
    new = after.lines()
    for device, access in old.items():
        gone = _access(set(access) - set(new.get(device, "")))
        if gone:
            steps.append((less, f"{device} {gone}"))
    for device, access in new.items():
        added = _access(set(access) - set(old.get(device, "")))
        if added:
            steps.append((more, f"{device} {added}"))
    return sorted(steps, key=lambda step: (step[1] != "a", step[0] == allow))  # denials first


def apply(directory: str, before: DeviceList | None, after: DeviceList) -> None:
    """Write the list of a cgroup and verify it.  Raises CgroupError."""
    for file, line in changes(before, after):
        try:
            files.write(f"{directory}/{file}", line)
        except OSError as e:
            raise CgroupError(f"{WHERE}.devices: {file} = {line!r}: {e.strerror}") from e
    try:
        found = set(files.read(f"{directory}/devices.list").splitlines())
    except OSError as e:
        raise CgroupError(f"{WHERE}.devices: devices.list: {e.strerror}") from e
    # A list that starts with everything does not show its exceptions.
    wanted = {EVERYTHING} if after.default else {f"{device} {access}" for device, access in after.lines().items()}
    if found != wanted:
        wrong = ", ".join(sorted(found ^ wanted))
        raise CgroupError(f"{WHERE}.devices: the kernel's list is not what was written: {wrong}")
