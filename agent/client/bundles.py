"""Adapt the config.json of an OCI bundle, from any tool, to a guest.

Missing fields are filled in from the defaults.  What is meaningful only on its original host is left out with a
warning: namespaces and cgroups by path, hooks, labels, the engine's own /etc/hosts.  Anything beyond the defaults
(capabilities, devices, mounts, sysctls of the whole guest) is rejected, naming the field, unless privileged.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from caisson.agent.base.syscalls import CAPABILITIES
from caisson.agent.client.errors import UsageError

#: Docker's default set (moby, oci/caps).
PERMITTED_CAPABILITIES = {
    "CAP_AUDIT_WRITE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_MKNOD",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_RAW",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
}

#: Devices that every container has (config-linux.md, Default Devices), by major and minor number; ptys.
PERMITTED_DEVICES = {(1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 1), (5, 2)}
PTY_MAJORS = {3, 136}

#: File systems that expose nothing of the guest.
PERMITTED_MOUNTS = {"proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup", "cgroup2"}

#: Sysctls that are private to a container.
PERMITTED_SYSCTLS = (
    "kernel.shm",
    "kernel.msg",
    "kernel.sem",
    "kernel.domainname",
    "kernel.hostname",
    "fs.mqueue.",
    "net.",
)

#: Seccomp actions that prevent a system call.
REFUSING_ACTIONS = {"SCMP_ACT_ERRNO", "SCMP_ACT_KILL", "SCMP_ACT_KILL_THREAD", "SCMP_ACT_KILL_PROCESS", "SCMP_ACT_TRAP"}

#: System calls that reach the least tested parts of the guest's kernel.  Some engines' profiles permit some of them.
NEVER_PERMITTED = {
    "add_key", "io_uring_enter", "io_uring_register", "io_uring_setup", "kexec_file_load", "kexec_load", "keyctl",
    "request_key", "userfaultfd",
}  # fmt: skip

#: Files that engines bind into each container, and for which a guest has its own.
ENGINE_FILES = {
    "/etc/hosts", "/etc/hostname", "/etc/resolv.conf", "/run/.containerenv", "/run/secrets", "/.dockerenv",
    "/etc/mtab",
}  # fmt: skip

Warn = Callable[[str], None]


def adapt(
    bundle: Mapping[str, Any],
    masked: Sequence[str],
    readonly: Sequence[str],
    mounts: Sequence[tuple[str, str, str, str]],
    privileged: bool,
    warn: Warn,
) -> dict[str, Any]:
    """Return a bundle's document for a guest.  ``mounts`` are the defaults: (destination, type, source, options).

    Raises UsageError.
    """
    document = copy.deepcopy(dict(bundle))
    for key in ("process", "root", "linux"):
        document[key] = _object(document.get(key), key)
    process, linux = document["process"], document["linux"]
    if not _list(process.get("args"), "process.args"):
        raise UsageError("config.json: process.args: empty; name a program")
    if document.pop("hooks", None):
        warn("config.json: hooks: not run: they are programs of the host")
    for key in ("apparmorProfile", "selinuxLabel"):
        if process.pop(key, None):
            warn(f"config.json: process.{key}: left out: it is a label of the host")
    for key in ("mountLabel", "intelRdt"):
        if linux.pop(key, None):
            warn(f"config.json: linux.{key}: left out: it concerns the host")
    linux.pop("cgroupsPath", None)
    document["mounts"] = _mounts(_list(document.get("mounts"), "mounts"), mounts, privileged, warn)
    if any(isinstance(one, dict) and one.get("type") == "user" for one in _list(linux.get("namespaces"), "namespaces")):
        for mount in document["mounts"]:
            if mount.get("type") == "sysfs":  # it shares the guest's network, so it cannot mount its own sysfs
                mount |= {"type": "bind", "source": "/sys", "options": ["bind", "nosuid", "noexec", "nodev", "ro"]}
    _namespaces(linux, warn)
    _process(process, privileged, warn)
    if seccomp := _object(linux.get("seccomp"), "linux.seccomp"):
        _seccomp(seccomp, privileged, warn)
    if not privileged:
        _check_devices(linux)
        _check_shares(process, linux)
        for name in _object(linux.get("sysctl"), "linux.sysctl"):
            if not name.startswith(PERMITTED_SYSCTLS):
                raise _refused(f"linux.sysctl.{name}", "affects the whole guest")
        linux["maskedPaths"] = sorted({*_list(linux.get("maskedPaths"), "linux.maskedPaths"), *masked})
        linux["readonlyPaths"] = sorted({*_list(linux.get("readonlyPaths"), "linux.readonlyPaths"), *readonly})
    return document


def _refused(field: str, why: str) -> UsageError:
    return UsageError(f"config.json: {field}: {why}; --privileged permits it")


def _object(value: Any, field: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UsageError(f"config.json: {field}: must be an object")
    return value


def _list(value: Any, field: str) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise UsageError(f"config.json: {field}: must be a list")
    return value


def _mounts(
    found: list[Any], defaults: Sequence[tuple[str, str, str, str]], privileged: bool, warn: Warn
) -> list[dict[str, Any]]:
    by_place = {where: (kind, source, options) for where, kind, source, options in defaults}
    kept = []
    for number, one in enumerate(found):
        mount = _object(one, f"mounts[{number}]")
        place, kind = str(mount.get("destination")), str(mount.get("type") or "")
        options = [str(option) for option in _list(mount.get("options"), f"mounts[{number}].options")]
        bound = kind == "bind" or bool({"bind", "rbind"} & set(options))
        if bound and place in by_place:  # from a rootless tool, which cannot mount its own
            kind, source, words = by_place[place]
            mount = {"destination": place, "type": kind, "source": source, "options": words.split(",")}
        elif bound and place.rstrip("/") in ENGINE_FILES:
            warn(f"config.json: mounts[{number}]: {place}: left out: the guest has its own")
            continue
        elif bound:
            of_host = mount.get("source")
            raise UsageError(f"config.json: mounts[{number}]: {of_host} is a path of the host; share it by --volume")
        elif kind not in PERMITTED_MOUNTS and not privileged:
            raise _refused(f"mounts[{number}].type", f"{kind!r} is none of {', '.join(sorted(PERMITTED_MOUNTS))}")
        kept.append(mount)
    return kept


def _namespaces(linux: dict[str, Any], warn: Warn) -> None:
    """Keep namespaces that are a container's own; the guest decides on processes and network."""
    kept = []
    for number, one in enumerate(_list(linux.get("namespaces"), "linux.namespaces")):
        namespace = _object(one, f"linux.namespaces[{number}]")
        if namespace.get("type") in ("pid", "network"):
            continue
        if namespace.pop("path", None):
            warn(f"config.json: linux.namespaces[{number}].path: left out: it is a path of the host")
        kept.append(namespace)
    types = {namespace.get("type") for namespace in kept}
    kept += [{"type": kind} for kind in ("mount", "ipc", "uts", "cgroup") if kind not in types]
    linux["namespaces"] = kept
    if any(namespace.get("type") == "user" for namespace in kept):
        for maps in ("uidMappings", "gidMappings"):  # `crun spec --rootless` leaves them to crun: only root
            linux[maps] = _list(linux.get(maps), f"linux.{maps}") or [{"containerID": 0, "hostID": 0, "size": 1}]


def _process(process: dict[str, Any], privileged: bool, warn: Warn) -> None:
    sets = _object(process.get("capabilities"), "process.capabilities")
    for kind, names in sets.items():
        field = f"process.capabilities.{kind}"
        sets[kind] = [str(name).upper() for name in _list(names, field)]
        for name in [name for name in sets[kind] if name not in CAPABILITIES]:
            warn(f"config.json: {field}: {name[:40]}: left out: it is unknown")
            sets[kind].remove(name)
        for name in sets[kind]:
            if name not in PERMITTED_CAPABILITIES and not privileged:
                raise _refused(field, f"{name} is beyond the default set")
    if ambient := sets.get("ambient"):  # capabilities(7): ambient requires permitted and inheritable
        raised = [name for name in ambient if name in sets.get("permitted", ()) and name in sets.get("inheritable", ())]
        if raised != ambient:
            warn("config.json: process.capabilities.ambient: left out where not permitted and inheritable")
        sets["ambient"] = raised
    if isinstance(process.get("oomScoreAdj"), int) and process["oomScoreAdj"] < 0 and not privileged:
        raise _refused("process.oomScoreAdj", "would protect it from the guest")


def _seccomp(profile: dict[str, Any], privileged: bool, warn: Warn) -> None:
    """Check a bundle's own seccomp filter: system calls without a rule must be denied by it, too."""
    for key in ("listenerPath", "listenerMetadata"):
        if profile.pop(key, None):
            warn(f"config.json: linux.seccomp.{key}: left out: it is a socket of the host")
    action = str(profile.get("defaultAction"))
    if action not in REFUSING_ACTIONS and not privileged:
        raise _refused("linux.seccomp.defaultAction", f"{action} permits what the default filter does not")
    left_out: set[str] = set()
    for number, one in enumerate(_list(profile.get("syscalls"), "linux.seccomp.syscalls")):
        rule = _object(one, f"linux.seccomp.syscalls[{number}]")
        names = _list(rule.get("names"), f"linux.seccomp.syscalls[{number}].names")
        if not privileged and str(rule.get("action")) not in REFUSING_ACTIONS:
            left_out |= NEVER_PERMITTED.intersection(map(str, names))
            rule["names"] = [name for name in names if name not in NEVER_PERMITTED]
    if left_out:
        profile["syscalls"] = [rule for rule in profile["syscalls"] if rule.get("names")]
        found = ", ".join(sorted(left_out))
        warn(f"config.json: linux.seccomp.syscalls: {found}: left out; --privileged permits them")


def _check_shares(process: dict[str, Any], linux: dict[str, Any]) -> None:
    """Reject what takes CPU time or memory from others: no limits, or priorities above theirs."""
    resources = _object(linux.get("resources"), "linux.resources")
    for name in ("pids", "memory"):
        limit = _object(resources.get(name), f"linux.resources.{name}").get("limit")
        if isinstance(limit, int) and limit < 0:
            raise _refused(f"linux.resources.{name}.limit", f"{limit} means no limit")
        if limit == 0:
            del resources[name]["limit"]
    if resources.get("pids") == {}:
        del resources["pids"]
    for key in ("realtimeRuntime", "realtimePeriod"):
        if _object(resources.get("cpu"), "linux.resources.cpu").get(key):
            raise _refused(f"linux.resources.cpu.{key}", "would give it precedence over the guest")
    if resources.get("unified"):
        raise _refused("linux.resources.unified", "sets files of cgroups by name")
    if linux.get("netDevices"):
        raise _refused("linux.netDevices", "would take devices from the guest")
    policy = str(_object(process.get("scheduler"), "process.scheduler").get("policy") or "SCHED_OTHER")
    if policy not in ("SCHED_OTHER", "SCHED_BATCH", "SCHED_IDLE"):
        raise _refused("process.scheduler.policy", f"{policy} would give it precedence over the guest")
    if int(_object(process.get("scheduler"), "process.scheduler").get("nice") or 0) < 0:
        raise _refused("process.scheduler.nice", "would give it precedence over the guest")
    if _object(process.get("ioPriority"), "process.ioPriority").get("class") == "IOPRIO_CLASS_RT":
        raise _refused("process.ioPriority.class", "IOPRIO_CLASS_RT would give it precedence over the guest")
    for number, one in enumerate(_list(process.get("rlimits"), "process.rlimits")):
        limit = _object(one, f"process.rlimits[{number}]")
        if limit.get("type") in ("RLIMIT_RTPRIO", "RLIMIT_NICE") and limit.get("hard"):
            raise _refused(f"process.rlimits[{number}]", f"{limit['type']} would give it precedence over the guest")


def _check_devices(linux: dict[str, Any]) -> None:
    for number, one in enumerate(_list(linux.get("devices"), "linux.devices")):
        device = _object(one, f"linux.devices[{number}]")
        if (device.get("major"), device.get("minor")) not in PERMITTED_DEVICES:
            raise _refused(f"linux.devices[{number}]", f"{device.get('path')} is beyond the default devices")
    resources = _object(linux.get("resources"), "linux.resources")
    for number, one in enumerate(_list(resources.get("devices"), "linux.resources.devices")):
        rule = _object(one, f"linux.resources.devices[{number}]")
        numbers = rule.get("major"), rule.get("minor")
        only_nodes = str(rule.get("access")) == "m"  # creating a node does not permit opening it
        if rule.get("allow") and not only_nodes and numbers not in PERMITTED_DEVICES and numbers[0] not in PTY_MAJORS:
            raise _refused(f"linux.resources.devices[{number}]", "allows more than the default devices")
