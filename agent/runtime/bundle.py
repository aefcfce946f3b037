"""A bundle: read its configuration, check it, and normalize it for libcontainer."""

from __future__ import annotations

import os

from caisson.agent.base.json import JsonError, loads
from caisson.agent.base.syscalls import CAPABILITIES
from caisson.agent.libcontainer.config.process import Process
from caisson.agent.libcontainer.config.reader import SpecError
from caisson.agent.libcontainer.config.spec import Spec, ignoring_unknown
from caisson.agent.runtime.errors import CommandError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from caisson.agent.runtime.main import Call

SHARES_MIN, SHARES_MAX = 2, 1 << 18  # of cpu.shares in cgroup v1
SETS = ("bounding", "effective", "inheritable", "permitted", "ambient")


class Bundle:
    """A directory with config.json; `document` is its contents, `spec` the same as records."""

    def __init__(self, call: Call, directory: str) -> None:
        """Raises CommandError or SpecError."""
        self.path = os.path.realpath(directory or ".")  # as in runc, which changes to it; pathlib starts slowly
        self.document = read_config(self.path, directory)
        self._call = call
        normalize(call, self.document)
        self.spec = self._read()

    def _read(self) -> Spec:
        return ignoring_unknown(lambda: Spec.from_json(self.document), lambda text: self._call.log("debug", text))

    def add_environment(self, *variables: str) -> None:
        """Add environment variables to the process."""
        process = self.document["process"]
        process["env"] = [*(process.get("env") or []), *variables]
        self.spec = self._read()

    def add_mount(self, mount: dict[str, object]) -> None:
        """Add a mount to the container."""
        self.document["mounts"] = [*(self.document.get("mounts") or []), mount]
        self.spec = self._read()

    @property
    def rootfs(self) -> str:
        """The container's root, absolute.  Raises CommandError."""
        root = self.spec.root
        if root is None or not root.path:
            raise CommandError("root must be specified in the configuration")
        path = os.path.normpath(os.path.join(self.path, root.path))  # noqa: PTH118
        if not os.path.isdir(path):  # noqa: PTH112
            problem = "not a directory" if os.path.exists(path) else "no such file or directory"  # noqa: PTH110
            raise CommandError(f"invalid rootfs: stat {path}: {problem}")
        return path


def read_config(bundle: str, given: str = "") -> dict[str, Any]:
    """Decode config.json of a bundle; `given` is its path as the caller gave it.  Raises CommandError."""
    path = os.path.join(bundle, "config.json")  # noqa: PTH118
    if not os.path.isdir(bundle):  # noqa: PTH112
        why = "not a directory" if os.path.exists(bundle) else "no such file or directory"  # noqa: PTH110
        raise CommandError(f"chdir {given or bundle}: {why}")
    try:
        with open(path, encoding="utf-8") as file:  # noqa: PTH123
            document = loads(file.read())
    except FileNotFoundError:
        raise CommandError("JSON specification file config.json not found") from None
    except (JsonError, UnicodeDecodeError) as error:
        raise CommandError(f"config.json: {error}") from None
    if not isinstance(document, dict):
        raise CommandError("config.json: must be a JSON object")
    return document


def normalize(call: Call, document: dict[str, Any]) -> None:
    """Make the checks that runc makes first, and normalize the document for libcontainer.

    Raises CommandError.
    """
    process = document.get("process")
    if not isinstance(process, dict):
        raise CommandError("process property must not be empty")
    normalize_process(call, process)
    if document.get("linux") is None:
        document["linux"] = {}
    linux = document["linux"]
    if isinstance(linux, dict):
        if linux.get("memoryPolicy") == {}:  # present, but without a mode
            raise CommandError("invalid memory policy mode: it is empty")
        normalize_resources(call, linux.get("resources"))
        _normalize_maps(call, linux)
    for mount in _list(document.get("mounts")):
        target = mount.get("destination") if isinstance(mount, dict) else None
        if isinstance(target, str) and target and not target.startswith("/"):
            call.warn(f"mount destination {target} is not absolute; it is taken to be below the root")
            mount["destination"] = f"/{target}"


def _list(value: object) -> list[Any]:
    """Return a list unchanged, and an empty one for anything else, which the parser rejects."""
    return value if isinstance(value, list) else []


def _normalize_maps(call: Call, linux: dict[str, Any]) -> None:
    """Drop id maps of a container without a user namespace, as runc does."""
    if any(isinstance(one, dict) and one.get("type") == "user" for one in _list(linux.get("namespaces"))):
        return
    for name in ("uidMappings", "gidMappings"):
        if linux.pop(name, None):
            call.log("debug", f"linux.{name}: ignored without a user namespace")


def normalize_resources(call: Call, resources: object) -> None:
    """Drop meaningless letters of device rules, and kernel memory limits, as runc does.

    Raises CommandError for a rule without access letters, and for shares that the kernel would change.
    """
    if not isinstance(resources, dict):
        return
    cpu = resources.get("cpu")
    if isinstance(cpu, dict) and isinstance(cpu.get("shares"), int):
        _check_shares(call, cpu["shares"])
    memory = resources.get("memory")
    if isinstance(memory, dict) and (memory.get("kernel") or memory.get("kernelTCP")):
        call.warn("Kernel memory settings are ignored and will be removed")
        resources["memory"] = {key: value for key, value in memory.items() if key not in ("kernel", "kernelTCP")}
    for number, rule in enumerate(_list(resources.get("devices"))):
        access = rule.get("access") if isinstance(rule, dict) else None
        if isinstance(rule, dict) and not access:
            raise CommandError(f"device access at {number} field cannot be empty")
        if isinstance(access, str) and not {*access} <= {*"rwm"}:
            rule["access"] = "".join(letter for letter in access if letter in "rwm") or access


def _check_shares(call: Call, shares: int) -> None:
    """Reject shares that cgroup v1 would clamp; in v2 all are weights from 1 to 10,000."""
    if shares == 0 or SHARES_MIN <= shares <= SHARES_MAX:
        return
    hierarchy = call.hierarchy()
    if hierarchy is not None and set(hierarchy.place("x")) != {""}:
        which, bound = ("minimum", SHARES_MIN) if shares < SHARES_MIN else ("maximum", SHARES_MAX)
        raise CommandError(f"the {which} allowed cpu-shares is {bound}")


def normalize_process(call: Call, process: dict[str, Any]) -> None:
    """Normalize a process likewise.  Raises CommandError."""
    if not process.get("cwd"):
        raise CommandError("Cwd property must not be empty")
    if not str(process["cwd"]).startswith("/"):
        raise CommandError("Cwd must be an absolute path")
    if not process.get("args"):
        raise CommandError("args must not be empty")
    limits = process.get("rlimits")
    if isinstance(limits, list) and all(isinstance(limit, dict) for limit in limits):  # the last of each type wins
        process["rlimits"] = list({str(limit.get("type")): limit for limit in limits}.values())
    sets = process.get("capabilities")
    if isinstance(sets, dict):
        _normalize_capabilities(call, sets)


def _normalize_capabilities(call: Call, sets: dict[str, Any]) -> None:
    given = {name: _list(sets.get(name)) for name in SETS}
    if not all(isinstance(one, str) for names in given.values() for one in names):
        return  # the parser names it
    unknown = dict.fromkeys(one for names in given.values() for one in names if one not in CAPABILITIES)
    if unknown:
        call.warn(f"ignoring unknown or unavailable capabilities: [{' '.join(unknown)}]")
    given = {name: [one for one in names if one in CAPABILITIES] for name, names in given.items()}
    for name in given["ambient"]:
        if name not in given["inheritable"] or name not in given["permitted"]:
            call.warn(f"can't raise ambient capability {name}: operation not permitted")
    allowed = {*given["inheritable"]} & {*given["permitted"]}
    given["ambient"] = [name for name in given["ambient"] if name in allowed]
    sets.update((name, names) for name, names in given.items() if isinstance(sets.get(name), list))


def read_process(call: Call, document: dict[str, Any]) -> Process:
    """Read a process.  Raises CommandError or SpecError."""
    normalize_process(call, document)
    return ignoring_unknown(lambda: Process.from_json(document), lambda text: call.log("debug", text))


__all__ = ["Bundle", "SpecError", "read_config", "read_process"]
