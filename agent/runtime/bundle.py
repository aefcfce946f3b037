"""A bundle: its configuration read, checked and brought into the form that libcontainer takes."""

from __future__ import annotations

import os

from caisson.agent.base.json import JsonError, loads
from caisson.agent.libcontainer.config.process import Process
from caisson.agent.libcontainer.config.reader import SpecError
from caisson.agent.libcontainer.config.spec import Spec, ignoring_unknown
from caisson.agent.libcontainer.plan.capabilities import CAPABILITIES
from caisson.agent.runtime.errors import CommandError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from caisson.agent.runtime.main import Call

SETS = ("bounding", "effective", "inheritable", "permitted", "ambient")


class Bundle:
    """A directory with config.json; `document` is what that says, `spec` the same as records."""

    def __init__(self, call: Call, directory: str) -> None:
        """Raises CommandError or SpecError."""
        self.path = os.path.abspath(directory or ".")  # noqa: PTH100 - no pathlib at start
        self.document = read_config(self.path)
        self._call = call
        normalize(call, self.document)
        self.spec = self._read()

    def _read(self) -> Spec:
        return ignoring_unknown(lambda: Spec.from_json(self.document), lambda text: self._call.log("debug", text))

    def changed(self) -> None:
        """Read the records again, after the document was changed."""
        self.spec = self._read()

    @property
    def rootfs(self) -> str:
        """The container's root, absolute.  Raises CommandError."""
        root = self.spec.root
        if root is None or not root.path:
            raise CommandError("root must be specified in the configuration")
        path = os.path.normpath(os.path.join(self.path, root.path))  # noqa: PTH118
        if not os.path.isdir(path):  # noqa: PTH112
            raise CommandError(f"invalid rootfs: stat {path}: no such file or directory")
        return path


def read_config(bundle: str) -> dict[str, Any]:
    """Decode config.json of a bundle.  Raises CommandError."""
    path = os.path.join(bundle, "config.json")  # noqa: PTH118
    if not os.path.isdir(bundle):  # noqa: PTH112
        raise CommandError(f"chdir {bundle}: no such file or directory")
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
    """Check what runc checks first, and bring the document into the form that libcontainer takes.

    Raises CommandError.
    """
    process = document.get("process")
    if not isinstance(process, dict):
        raise CommandError("process property must not be empty")
    normalize_process(call, process)
    if not isinstance(document.get("linux"), dict):
        document["linux"] = {}
    if document["linux"].get("memoryPolicy") == {}:  # there, and without a mode
        raise CommandError("invalid memory policy mode: it is empty")
    _normalize_resources(call, document["linux"])
    for mount in document.get("mounts") or []:
        target = mount.get("destination") if isinstance(mount, dict) else None
        if isinstance(target, str) and target and not target.startswith("/"):
            call.warn(f"mount destination {target} is not absolute; it is taken to be below the root")
            mount["destination"] = f"/{target}"


def _normalize_resources(call: Call, linux: dict[str, Any]) -> None:
    """Leave out letters of device rules that mean nothing, and limits of kernel memory, as runc does."""
    resources = linux.get("resources")
    if not isinstance(resources, dict):
        return
    memory = resources.get("memory")
    if isinstance(memory, dict) and (memory.get("kernel") or memory.get("kernelTCP")):
        call.warn("Kernel memory settings are ignored and will be removed")
        resources["memory"] = {key: value for key, value in memory.items() if key not in ("kernel", "kernelTCP")}
    for rule in resources.get("devices") or []:
        access = rule.get("access") if isinstance(rule, dict) else None
        if isinstance(access, str) and not {*access} <= {*"rwm"}:
            rule["access"] = "".join(letter for letter in access if letter in "rwm") or access


def normalize_process(call: Call, process: dict[str, Any]) -> None:
    """Normalize a process likewise.  Raises CommandError."""
    if not process.get("cwd"):
        raise CommandError("Cwd property must not be empty")
    if not str(process["cwd"]).startswith("/"):
        raise CommandError("Cwd must be an absolute path")
    if not process.get("args"):
        raise CommandError("args must not be empty")
    limits = process.get("rlimits")
    if isinstance(limits, list):  # the last one of a type wins
        by_type = {str(limit.get("type")): limit for limit in limits if isinstance(limit, dict)}
        process["rlimits"] = list(by_type.values())
    sets = process.get("capabilities")
    if isinstance(sets, dict):
        _normalize_capabilities(call, sets)


def _normalize_capabilities(call: Call, sets: dict[str, Any]) -> None:
    unknown: list[str] = []
    for name in SETS:
        given = sets.get(name)
        if isinstance(given, list):
            unknown += [one for one in given if one not in CAPABILITIES and one not in unknown]
            sets[name] = [one for one in given if one in CAPABILITIES]
    if unknown:
        call.warn(f"ignoring unknown or unavailable capabilities: [{' '.join(map(str, unknown))}]")
    for name in sets.get("ambient") or []:
        if name not in (sets.get("inheritable") or []) or name not in (sets.get("permitted") or []):
            call.warn(f"can't raise ambient capability {name}: operation not permitted")
    if sets.get("ambient"):
        allowed = set(sets.get("inheritable") or []) & set(sets.get("permitted") or [])
        sets["ambient"] = [name for name in sets["ambient"] if name in allowed]


def read_process(call: Call, document: dict[str, Any]) -> Process:
    """Read a process.  Raises CommandError or SpecError."""
    normalize_process(call, document)
    return ignoring_unknown(lambda: Process.from_json(document), lambda text: call.log("debug", text))


__all__ = ["Bundle", "SpecError", "read_config", "read_process"]
