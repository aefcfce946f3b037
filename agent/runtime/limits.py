"""Commands that change a container's limits, or freeze it: update, pause, resume."""

from __future__ import annotations

import sys

from caisson.agent.base.json import JsonError, loads
from caisson.agent.libcontainer.config.spec import ignoring_unknown
from caisson.agent.libcontainer.state_directory import ContainerLock
from caisson.agent.libcontainer.waits import complete
from caisson.agent.runtime.bundle import normalize_resources
from caisson.agent.runtime.errors import CommandError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from caisson.agent.runtime.main import Call

UNITS = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40, "p": 1 << 50}
#: Options by the field of linux.resources.
NUMBERS = {
    "cpu-period": ("cpu", "period"),
    "cpu-quota": ("cpu", "quota"),
    "cpu-burst": ("cpu", "burst"),
    "cpu-share": ("cpu", "shares"),
    "cpu-rt-period": ("cpu", "realtimePeriod"),
    "cpu-rt-runtime": ("cpu", "realtimeRuntime"),
    "cpu-idle": ("cpu", "idle"),
}
SIZES = {
    "memory": ("memory", "limit"),
    "memory-reservation": ("memory", "reservation"),
    "memory-swap": ("memory", "swap"),
}
TEXTS = {"cpuset-cpus": ("cpu", "cpus"), "cpuset-mems": ("cpu", "mems")}


def pause(call: Call) -> int:
    """Suspend all processes of a container."""
    container = call.container()
    with ContainerLock(container.directory):
        complete(container.pause())
    return 0


def resume(call: Call) -> int:
    """Resume all processes of a container."""
    container = call.container()
    with ContainerLock(container.directory):
        complete(container.resume())
    return 0


def update(call: Call) -> int:
    """Change the limits of a container."""
    container = call.container()
    if call.options.text("l3-cache-schema"):
        raise CommandError("Intel RDT/CAT: l3 cache schema is not enabled")
    if call.options.text("mem-bw-schema"):
        raise CommandError("Intel RDT/MBA: memory bandwidth schema is not enabled")
    path = call.options.text("resources")
    changes = _read(path) if path else _from_options(call)
    from caisson.agent.libcontainer.config.resources import Resources

    normalize_resources(call, changes)
    memory = changes.get("memory")
    if isinstance(memory, dict) and memory.get("limit") == -1 and not memory.get("swap"):
        memory["swap"] = -1  # memory and swap together cannot have a limit when memory has none
    ignoring_unknown(lambda: Resources.from_json(changes), lambda text: call.log("debug", text))
    with ContainerLock(container.directory):
        complete(container.update(changes))
    return 0


def _read(path: str) -> dict[str, Any]:
    try:
        if path == "-":
            text = sys.stdin.read()
        else:
            with open(path, encoding="utf-8") as file:  # noqa: PTH123 - no pathlib at start
                text = file.read()
        found = loads(text)
    except OSError as error:
        raise CommandError(f"open {path}: {(error.strerror or '').lower()}") from None
    except (JsonError, UnicodeDecodeError) as error:
        raise CommandError(f"resources: {error}") from None
    if not isinstance(found, (dict, type(None))):
        raise CommandError("resources: must be a JSON object")
    return found or {}


def _from_options(call: Call) -> dict[str, Any]:
    options = call.options
    found: dict[str, Any] = {}
    for name in ("kernel-memory", "kernel-memory-tcp"):
        if options.text(name):
            size(name, options.text(name))
            call.warn("Kernel memory settings are ignored and will be removed")
    for name, field in NUMBERS.items():
        if options.text(name):
            _put(found, field, _number(name, options.text(name)))
    for name, field in SIZES.items():
        if options.text(name):
            _put(found, field, size(name, options.text(name)))
    for name, field in TEXTS.items():
        if options.text(name):
            _put(found, field, options.text(name))
    if "pids-limit" in options.given:
        _put(found, ("pids", "limit"), options.number("pids-limit"))
    if options.number("blkio-weight"):
        _put(found, ("blockIO", "weight"), options.number("blkio-weight"))
    return found


def _put(document: dict[str, Any], field: tuple[str, str], value: object) -> None:
    document.setdefault(field[0], {})[field[1]] = value


def _number(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise CommandError(f"invalid value for {name}: {text!r} is not a number") from None


def size(name: str, text: str) -> int:
    """Parse a number of bytes with a suffix; -1 is unlimited.  Raises CommandError."""
    if text == "-1":
        return -1
    word = text.strip().lower().removesuffix("ib").removesuffix("b") or text
    digits = word.rstrip("kmgtp")
    try:
        return int(float(digits) * UNITS[word[len(digits) :].strip()])
    except (ValueError, KeyError):
        raise CommandError(f"invalid value for {name}: invalid size: '{text}'") from None
