"""Test docs/oci.md against the parser: all fields are listed, supported ones are tested, others rejected as stated."""

from __future__ import annotations

import ast
import contextlib
import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from caisson.agent.api.conversions import json_name
from caisson.agent.libcontainer import intel_rdt
from caisson.agent.libcontainer.cgroups.base import Setting
from caisson.agent.libcontainer.cgroups.v1 import settings as v1_settings
from caisson.agent.libcontainer.cgroups.v2 import settings as v2_settings
from caisson.agent.libcontainer.config import reader as fields
from caisson.agent.libcontainer.config import spec
from caisson.agent.libcontainer.config.reader import SpecError
from caisson.agent.libcontainer.config.resources import Resources
from caisson.agent.libcontainer.config.spec import Spec
from caisson.agent.libcontainer.plan import lsm as labels
from caisson.agent.libcontainer.plan import mounts, plan
from caisson.proto.kata1 import oci_pb2

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = (ROOT / "docs/oci.md").read_text()

HOOKS = ("prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop")
THROTTLES = ("ReadBps", "WriteBps", "ReadIOPS", "WriteIOPS")
MAPS = "containerID hostID size"

#: Every field of config.json 1.2 for Linux (specs-go/config.go, config.md, config-linux.md), by path.
SPECIFICATION = {
    "": "ociVersion hostname domainname annotations solaris windows vm zos",
    "root": "path readonly",
    "process": "terminal cwd env args commandLine apparmorProfile selinuxLabel noNewPrivileges oomScoreAdj",
    "process.consoleSize": "height width",
    "process.user": "uid gid umask additionalGids username",
    "process.capabilities": "bounding effective inheritable permitted ambient",
    "process.rlimits[]": "type soft hard",
    "process.scheduler": "policy nice priority flags runtime deadline period",
    "process.ioPriority": "class priority",
    "mounts[]": "destination source type options",
    "mounts[].uidMappings[]": MAPS,
    "mounts[].gidMappings[]": MAPS,
    "linux": "cgroupsPath rootfsPropagation sysctl maskedPaths readonlyPaths mountLabel",
    "linux.namespaces[]": "type path",
    "linux.uidMappings[]": MAPS,
    "linux.gidMappings[]": MAPS,
    "linux.timeOffsets.monotonic": "secs nanosecs",
    "linux.timeOffsets.boottime": "secs nanosecs",
    "linux.devices[]": "path type major minor fileMode uid gid",
    "linux.personality": "domain flags",
    "linux.intelRdt": "closID l3CacheSchema memBwSchema enableCMT enableMBM",
    "linux.resources": "unified",
    "linux.resources.devices[]": "allow type major minor access",
    "linux.resources.memory":
        "limit reservation swap kernel kernelTCP swappiness disableOOMKiller useHierarchy checkBeforeUpdate",
    "linux.resources.cpu": "shares quota burst period realtimeRuntime realtimePeriod cpus mems idle",
    "linux.resources.pids": "limit",
    "linux.resources.blockIO": "weight leafWeight",
    "linux.resources.blockIO.weightDevice[]": "major minor weight leafWeight",
    **{f"linux.resources.blockIO.throttle{kind}Device[]": "major minor rate" for kind in THROTTLES},
    "linux.resources.hugepageLimits[]": "pageSize limit",
    "linux.resources.network": "classID",
    "linux.resources.network.priorities[]": "name priority",
    "linux.resources.rdma.<name>": "hcaHandles hcaObjects",
    "linux.seccomp": "defaultAction defaultErrnoRet architectures flags listenerPath listenerMetadata",
    "linux.seccomp.syscalls[]": "names action errnoRet",
    "linux.seccomp.syscalls[].args[]": "index value valueTwo op",
    **{f"hooks.{point}[]": "path args env timeout" for point in HOOKS},
}  # fmt: skip
FIELDS = {f"{where}.{name}".lstrip(".") for where, names in SPECIFICATION.items() for name in names.split()}

#: Mount options listed in config.md, and fields whose values are words.
OPTIONS = """
    async atime bind defaults dev diratime dirsync exec iversion lazytime loud mand noatime nodev nodiratime
    noexec noiversion nolazytime nomand norelatime nostrictatime nosuid nosymfollow private ratime rbind rdev rdiratime
    relatime remount rexec rnoatime rnodiratime rnodev rnoexec rnorelatime rnostrictatime rnosuid rnosymfollow ro
    rprivate rrelatime rro rrw rshared rslave rstrictatime rsuid rsymfollow runbindable rw shared silent slave
    strictatime suid symfollow sync tmpcopyup unbindable idmap ridmap"""

#: One configuration with everything that is supported.
WHOLE: dict[str, Any] = {
    "ociVersion": "1.2.0",
    "root": {"path": "rootfs", "readonly": True},
    "process": {
        "terminal": True,
        "consoleSize": {"height": 24, "width": 80},
        "user": {"uid": 1, "gid": 2, "umask": 0o27, "additionalGids": [3], "username": "u"},
        "args": ["sh"],
        "env": ["A=b"],
        "cwd": "/w",
        "capabilities": {name: ["CAP_KILL"] for name in SPECIFICATION["process.capabilities"].split()},
        "rlimits": [{"type": "RLIMIT_CORE", "soft": 1, "hard": 2}],
        "noNewPrivileges": True,
        "oomScoreAdj": 5,
        "apparmorProfile": "p",
        "selinuxLabel": "l",
        "scheduler": {
            "policy": "SCHED_OTHER", "nice": 1, "priority": 2, "flags": ["SCHED_FLAG_RECLAIM"],
            "runtime": 3, "deadline": 4, "period": 5,
        },
        "ioPriority": {"class": "IOPRIO_CLASS_BE", "priority": 1},
        "execCPUAffinity": {"initial": "0", "final": "1"},
    },
    "hostname": "h",
    "domainname": "d",
    "annotations": {"k": "v"},
    "hooks": {point: [{"path": "/h", "args": ["h"], "env": ["A=b"], "timeout": 1}] for point in HOOKS},
    "mounts": [
        {
            "destination": "/mnt", "source": "/src", "type": "bind", "options": ["ro"],
            "uidMappings": [{"containerID": 0, "hostID": 1, "size": 2}],
            "gidMappings": [{"containerID": 0, "hostID": 1, "size": 2}],
        }
    ],
    "linux": {
        "namespaces": [
            *({"type": kind} for kind in spec.NAMESPACE_TYPES if kind != "network"),
            {"type": "network", "path": "/proc/1/ns/net"},
        ],
        "uidMappings": [{"containerID": 0, "hostID": 1, "size": 2}],
        "gidMappings": [{"containerID": 0, "hostID": 1, "size": 2}],
        "timeOffsets": {clock: {"secs": 1, "nanosecs": 2} for clock in ("monotonic", "boottime")},
        "devices": [
            {"path": "/dev/x", "type": "c", "major": 1, "minor": 3, "fileMode": 0o600, "uid": 1, "gid": 2}
        ],
        "cgroupsPath": "/c",
        "rootfsPropagation": "slave",
        "sysctl": {"net.ipv4.ip_forward": "1"},
        "maskedPaths": ["/m"],
        "readonlyPaths": ["/r"],
        "personality": {"domain": "LINUX32", "flags": ["ADDR_NO_RANDOMIZE"]},
        "mountLabel": "l",
        "intelRdt": {
            "closID": "c", "l3CacheSchema": "L3:0=f", "memBwSchema": "MB:0=1", "enableCMT": True, "enableMBM": True,
            "schemata": ["L2:0=1"], "enableMonitoring": True,
        },
        "netDevices": {"<name>": {"name": "eth0"}},
        "memoryPolicy": {"mode": "MPOL_BIND", "nodes": "0", "flags": ["MPOL_F_STATIC_NODES"]},
        "seccomp": {
            "defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 1, "architectures": ["SCMP_ARCH_X86"],
            "flags": ["SECCOMP_FILTER_FLAG_LOG"], "listenerPath": "/l", "listenerMetadata": "m",
            "syscalls": [
                {
                    "names": ["read"], "action": "SCMP_ACT_ERRNO", "errnoRet": 2,
                    "args": [{"index": 1, "value": 2, "valueTwo": 3, "op": "SCMP_CMP_EQ"}],
                }
            ],
        },
        "resources": {
            "devices": [{"allow": True, "type": "c", "major": 1, "minor": 3, "access": "r"}],
            "memory": {
                "limit": 1, "reservation": 1, "swap": 2, "useHierarchy": True, "checkBeforeUpdate": True,
                "kernel": 3, "kernelTCP": 4, "swappiness": 5, "disableOOMKiller": True,
            },
            "cpu": {
                "shares": 2, "quota": 3, "burst": 4, "period": 5, "cpus": "0", "mems": "0", "idle": 1,
                "realtimeRuntime": 6, "realtimePeriod": 7,
            },
            "network": {"classID": 1, "priorities": [{"name": "lo", "priority": 1}]},
            "pids": {"limit": 6},
            "blockIO": {
                "weight": 10,
                "weightDevice": [{"major": 1, "minor": 2, "weight": 10}],
                **{f"throttle{kind}Device": [{"major": 1, "minor": 2, "rate": 3}] for kind in THROTTLES},
            },
            "hugepageLimits": [{"pageSize": "2MB", "limit": 0}],
            "rdma": {"<name>": {"hcaHandles": 1, "hcaObjects": 2}},
            "unified": {"memory.high": "7"},
        },
    },
}  # fmt: skip
TABLES = {"annotations", "linux.sysctl", "linux.resources.unified"}  # objects whose keys are not fields


@pytest.fixture(autouse=True)
def security_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that the kernel has them."""
    for name in ("has_apparmor", "has_selinux"):
        monkeypatch.setattr(labels, name, lambda: True)
    monkeypatch.setattr(intel_rdt, "mounted", lambda: "/sys/fs/resctrl")


VERDICTS = ("done", "done in v1", "done in v2", "refused", "ignored", "not applicable")


class Row(NamedTuple):
    field: str
    guest: str
    host: str
    tests: tuple[str, ...]
    text: str
    later: bool


def rows(document: str) -> list[Row]:
    """Return the tables: one Row per field."""
    found, prefix = [], ""
    for line in document.partition("## On the wire")[0].splitlines():
        if line.startswith("### "):
            prefix = line.removeprefix("### ").strip("`")
        elif line.startswith("| `"):
            names, guest, host, shown = (cell.strip() for cell in line.strip("|").split(" | "))
            quoted = re.findall(r"`([^`]+)`", shown)
            tests = tuple(text for text in quoted if text.startswith("tests/"))
            texts = [text for text in quoted if ": " in text]
            for name in re.findall(r"`([^`]+)`", names):
                found.append(Row(prefix + name, guest, host, tests, texts[0] if texts else "", "(later)" in names))
    return found


def document_with(field: str) -> dict[str, Any]:
    """Return the minimal configuration in which `field` is set, beside what every configuration needs."""
    document: dict[str, Any] = {"process": {"args": ["x"]}, "linux": {"namespaces": [{"type": "mount"}]}}
    path, equals, word = field.partition("=")
    *parents, last = path.split(".")
    at: Any = document
    for part in parents:
        key = part.removesuffix("[]")
        at = at.setdefault(key, [{}])[0] if part.endswith("[]") else at.setdefault(key, {})
    flags = ("linux.resources.memory.disableOOMKiller", "linux.resources.memory.checkBeforeUpdate")
    at[last] = [word] if equals else True if field in flags else 1
    if path.startswith("linux.resources.network.priorities"):
        at.update(name="eth0", priority=1)
    if path == "process.user.username":
        at[last] = "root"
    if path == "mounts[].options":
        at.update(destination="/mnt", source="x", type="tmpfs")
    if word in ("idmap", "ridmap"):
        maps = [{"containerID": 0, "hostID": 1, "size": 2}]
        at.update(type="bind", uidMappings=maps, gidMappings=maps)
    return document


def carry_out(document: dict[str, Any]) -> None:
    """Take all steps in which a field can be rejected before anything is created."""
    parsed = Spec.from_json(document)
    plan.init_messages(parsed, rootfs="/r", bundle="/b", join={}, cgroups={})


def limits(version: str, document: dict[str, Any]) -> list[Setting]:
    """Find out what is detected only when limits are set."""
    resources = Spec.from_json(document).linux.resources or Resources()
    return list((v1_settings if version == "v1" else v2_settings).settings(resources))


def leaves(value: Any, name: str = "") -> set[str]:
    """Yield the fields that a document sets."""
    if isinstance(value, dict) and name not in TABLES:
        return {leaf for key, item in value.items() for leaf in leaves(item, f"{name}.{key}".lstrip("."))}
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return {leaf for item in value for leaf in leaves(item, f"{name}[]")}
    return {name}


def reads(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Return every key that the parser reads."""
    seen = set()
    raw = fields.Reader.raw

    def noted(self: fields.Reader, key: str) -> Any:
        seen.add(re.sub(r"\[\d+\]", "[]", self.name(key)))
        return raw(self, key)

    monkeypatch.setattr(fields.Reader, "raw", noted)
    carry_out(WHOLE)
    return seen


def problems(document: str, read: set[str]) -> list[str]:
    """Return what a document lacks or repeats, given the keys that the parser reads."""
    table = rows(document)
    names = [row.field for row in table]
    words = {f"mounts[].options={word}" for word in (*OPTIONS.split(), *mounts.ATTRIBUTES, *mounts.PROPAGATION)}
    words |= {f"mounts[].options=r{word}" for word in mounts.ATTRIBUTES}
    words |= {f"mounts[].options={word}" for word in mounts.REFUSED}
    words |= {f"linux.namespaces[].type={kind}" for kind in spec.NAMESPACE_TYPES}
    required = FIELDS | words
    beginnings = {part for name in names for part in _parents(name)}
    return [
        *(f"twice: {name}" for name in set(names) if names.count(name) > 1),
        *(f"missing: {name}" for name in sorted(required - set(names))),
        *(f"read, and missing: {name}" for name in sorted(read - set(names) - beginnings)),
        *(
            f"not of version 1.2: {row.field}"
    for row in table if row.field not in required and not row.later
        ),
    ]  # fmt: skip


def _parents(name: str) -> set[str]:
    """Yield `a`, `a.b[]` and `a.b` for `a.b[].c`: the parents of a field."""
    parts = name.split(".")
    whole = {".".join(parts[:count]) for count in range(1, len(parts))}
    return whole | {part.removesuffix("[]") for part in whole}


def test_no_field_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert problems(DOCUMENT, reads(monkeypatch)) == []


@pytest.mark.parametrize(
    "name", ["hostname", "user.umask", "cpu.shares", "memory.useHierarchy", "rro", "syscalls[].errnoRet"]
)
def test_a_field_that_is_taken_out_is_missed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert f"`{name}`" in DOCUMENT
    lacking = re.sub(rf"`{re.escape(name)}`(, )?", "", DOCUMENT)
    assert any(problem.endswith(name) for problem in problems(lacking, reads(monkeypatch)))


def test_a_field_that_the_parser_learns_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert problems(DOCUMENT, reads(monkeypatch) | {"linux.newField"}) == ["read, and missing: linux.newField"]


def test_fields_listed_as_done_are_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    accepted = {row.field for row in rows(DOCUMENT) if row.host not in ("refused", "ignored") and "=" not in row.field}
    assert leaves(WHOLE) == accepted
    assert accepted <= reads(monkeypatch)


@pytest.mark.parametrize("row", [row for row in rows(DOCUMENT) if row.guest == "done" and "options=" in row.field])
def test_options_that_are_done_are_accepted(row: Row) -> None:
    carry_out(document_with(row.field))


@pytest.mark.parametrize(
    "row", [row for row in rows(DOCUMENT) if row.guest == "refused" and not row.tests], ids=lambda row: row.field
)
def test_fields_listed_as_refused_are_rejected_with_the_listed_text(row: Row) -> None:
    with pytest.raises(SpecError) as caught:
        carry_out(document_with(row.field))
        limits("v2", document_with(row.field))
    assert str(caught.value) == row.text


def of_one_version() -> list[Row]:
    return [row for row in rows(DOCUMENT) if row.guest.startswith("done in")]


@pytest.mark.parametrize("row", of_one_version(), ids=lambda row: row.field)
def test_fields_of_one_cgroup_version_are_rejected_by_the_other(row: Row) -> None:
    version = row.guest.removeprefix("done in ")
    document = document_with(row.field)
    if row.field == "linux.resources.unified":
        document["linux"]["resources"]["unified"] = {"memory.high": "1"}
    assert limits(version, document)
    with pytest.raises(SpecError) as caught:
        limits("v1" if version == "v2" else "v2", document)
    assert str(caught.value) == row.text


@pytest.mark.parametrize("row", [row for row in rows(DOCUMENT) if row.host == "ignored"], ids=lambda row: row.field)
def test_fields_listed_as_ignored_are_taken_out_and_reported(row: Row) -> None:
    said: list[str] = []
    document = document_with(row.field)
    spec.ignoring_unknown(lambda: Spec.from_json(document), said.append)
    assert said == [f"ignored: {row.text}"]


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_fields_of_both_cgroup_versions_are_accepted_by_both(version: str) -> None:
    document = copy.deepcopy(WHOLE)
    for row in of_one_version():
        if row.guest == f"done in {version}":
            continue
        *parents, last = row.field.partition("[]")[0].split(".")
        at = document
        for parent in parents:
            at = at[parent]
        at.pop(last, None)
    fields = {setting.field for setting in limits(version, document)}
    assert len(fields) >= 17, fields


def test_verdicts_are_complete_and_their_tests_exist() -> None:
    known: dict[str, set[str]] = {}
    for row in rows(DOCUMENT):
        for verdict in (row.guest, row.host):
            assert verdict in VERDICTS, row
            assert not verdict.startswith("done") or row.tests, row
            assert verdict in ("done", "not applicable") or row.text, row
        for test in row.tests:
            file, _, name = test.partition("::")
            if file not in known:
                tree = ast.parse((ROOT / file).read_text())
                functions = (ast.FunctionDef, ast.AsyncFunctionDef)
                known[file] = {node.name for node in tree.body if isinstance(node, functions)}
            assert name in known[file], row


def wire_fields(message: Any, where: str = "") -> dict[str, str]:
    """Yield fields of oci.proto: their path in config.json, and message and field as spelled in the proto."""
    found = {}
    for field in message.fields:
        name = f"{where}.{json_name(field.name)}".lstrip(".")
        inner = field.message_type
        if inner is None or inner.GetOptions().map_entry or inner.name in ("Windows", "Solaris"):
            found[name] = f"{message.name}.{field.name}"
        else:
            found |= wire_fields(inner, name + ("[]" if field.is_repeated else ""))
    return found


def test_the_wire_has_what_the_document_says() -> None:
    section = DOCUMENT.partition("## On the wire")[2]
    on_wire = wire_fields(oci_pb2.Spec.DESCRIPTOR)
    described = set(re.findall(r"^\| `(\w+\.\w+)`", section, re.MULTILINE))
    assert described <= set(on_wire.values())
    renamed = {proto for name, proto in on_wire.items() if name not in FIELDS}
    assert renamed <= described
    only_config = set(re.findall(r"`([^`]+)`", section.partition("cannot express:")[2]))
    missing = FIELDS - set(on_wire)
    missing -= {"ociVersion", "linux.resources.hugepageLimits[].pageSize"}  # with other names
    assert {name for name in missing if not any(name.startswith(only) for only in only_config)} == set()
    assert all(any(name.startswith(only) for name in missing) for only in only_config)
    assert not any(name.startswith(only) for name in on_wire for only in only_config)


ODD: list[Any] = [None, "x", "", 7, -1, True, 1.5, [], {}, ["x"], [7], [None], [{}], {"a": 1}, [[]], 1 << 70, "\0"]


def places(value: Any, at: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Yield every place in a document; of lists, the first two elements."""
    yield at
    if isinstance(value, dict):
        for key, item in value.items():
            yield from places(item, (*at, key))
    elif isinstance(value, list):
        for number, item in enumerate(value[:2]):
            yield from places(item, (*at, number))


def test_odd_values_at_any_place_are_read_or_refused_in_words() -> None:
    good = copy.deepcopy(WHOLE)
    for place in list(places(WHOLE))[1:]:
        *around, last = place
        at: Any = good
        for key in around:
            at = at[key]
        kept = at[last]
        for odd in ODD:
            at[last] = copy.deepcopy(odd)
            with contextlib.suppress(SpecError):
                Spec.from_json(good)
        at[last] = kept
