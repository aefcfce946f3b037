"""Test that config.json is parsed strictly: every field is understood, or rejected by name."""

from __future__ import annotations

from typing import Any

import pytest

from caisson.agent.libcontainer.config.process import Capabilities, Process, Rlimit, User
from caisson.agent.libcontainer.config.reader import SpecError
from caisson.agent.libcontainer.config.spec import Device, Mount, Namespace, Spec, ignoring_unknown


def test_a_whole_configuration() -> None:
    spec = Spec.from_json(
        {
            "ociVersion": "1.2.0",
            "root": {"path": "rootfs", "readonly": True},
            "process": {
                "args": ["sh"],
                "cwd": "/w",
                "env": ["A=b"],
                "terminal": True,
                "consoleSize": {"height": 1, "width": 2},
                "user": {"uid": 1, "gid": 2, "additionalGids": [3, 2, 3], "umask": 0o27},
                "capabilities": {"bounding": ["CAP_KILL"]},
                "rlimits": [{"type": "RLIMIT_CORE", "soft": 1, "hard": 2}],
                "noNewPrivileges": True,
                "oomScoreAdj": -5,
            },
            "hostname": "h",
            "domainname": "d",
            "mounts": [{"destination": "/p", "type": "proc", "source": "proc", "options": ["ro"]}],
            "annotations": {"k": "v"},
            "linux": {
                "namespaces": [{"type": "pid"}, {"type": "network", "path": "/n"}],
                "devices": [
                    {"path": "/dev/x", "type": "c", "major": 1, "minor": 3, "fileMode": 0o600, "uid": 1, "gid": 2}
                ],
                "resources": {
                    "devices": [
                        {"allow": False, "access": "rwm"},
                        {"allow": True, "type": "c", "major": 1, "minor": -1},
                    ],
                    "memory": {"limit": 1, "swap": 2},
                    "cpu": {"shares": 3, "cpus": "0-1"},
                    "pids": {"limit": 4},
                    "unified": {"a.b": "c"},
                },
                "sysctl": {"a": "b"},
                "cgroupsPath": "/x/y",
                "maskedPaths": ["/m"],
                "readonlyPaths": ["/r"],
                "rootfsPropagation": "slave",
                "timeOffsets": {"monotonic": {"secs": 1, "nanosecs": 2}},
                "uidMappings": [{"containerID": 0, "hostID": 5, "size": 6}],
            },
        }
    )
    assert spec.root is not None and spec.root.readonly and spec.root.path == "rootfs"
    assert spec.process == Process(
        args=("sh",), cwd="/w", env=("A=b",), terminal=True, console_size=(1, 2), user=User(1, 2, (3, 2), 0o27),
        capabilities=Capabilities(bounding=("CAP_KILL",)), rlimits=(Rlimit("RLIMIT_CORE", 1, 2),),
        no_new_privileges=True, oom_score_adj=-5,
    )  # fmt: skip
    assert spec.mounts == (Mount("/p", "proc", "proc", ("ro",)),)
    assert spec.linux.namespaces == (Namespace("pid"), Namespace("network", "/n"))
    assert spec.linux.devices == (Device("/dev/x", "c", 1, 3, 0o600, 1, 2),)
    resources = spec.linux.resources
    assert resources is not None and resources.pids_limit == 4 and resources.unified == {"a.b": "c"}
    assert [(r.type, r.major, r.minor, r.access) for r in resources.devices] == [
        ("a", None, None, "rwm"), ("c", 1, None, "rwm"),
    ]  # fmt: skip


def test_empty_values_are_absent_ones() -> None:
    """As sent by hosts that convert from protocol buffers."""
    spec = Spec.from_json(
        {
            "ociVersion": "",
            "hooks": {"prestart": []},
            "windows": {},
            "linux": {
                "seccomp": None,
                "intelRdt": {},
                "mountLabel": "",
                "resources": {"blockIO": {"weight": 0, "weightDevice": []}, "memory": {"limit": 0, "kernel": 0}},
            },
            "process": {"args": ["x"], "apparmorProfile": "", "user": {"username": ""}},
        }
    )
    assert spec.process == Process(args=("x",))


ALLOW = {"defaultAction": "SCMP_ACT_ALLOW"}
RULE = {"names": ["read"], "action": "SCMP_ACT_KILL"}


@pytest.mark.parametrize(
    ("path", "value", "field"),
    [
        ("nonsense", 1, "nonsense"),
        ("ociVersion", "2.0.0", "ociVersion"),
        ("process.nonsense", 1, "process.nonsense"),
        ("process.args", [], "process.args"),
        ("process.args", ["a\0b"], "process.args[0]"),
        ("process.args", "sh", "process.args"),
        ("process.cwd", "relative", "process.cwd"),
        ("process.user.username", "0\0", "process.user.username"),
        ("process.user.uid", 2**32 - 1, "process.user.uid"),
        ("process.user.uid", -1, "process.user.uid"),
        ("process.user.uid", True, "process.user.uid"),
        ("process.apparmorProfile", "p", "process.apparmorProfile"),
        ("process.selinuxLabel", "l", "process.selinuxLabel"),
        ("process.scheduler", {"policy": "FIFO"}, "process.scheduler.policy"),
        ("process.scheduler", {"policy": "SCHED_FIFO", "nice": 20}, "process.scheduler.nice"),
        ("process.scheduler", {"policy": "SCHED_FIFO", "flags": ["X"]}, "process.scheduler.flags"),
        ("process.ioPriority", {"class": "BE"}, "process.ioPriority.class"),
        ("process.ioPriority", {"class": "IOPRIO_CLASS_BE", "priority": 8}, "process.ioPriority.priority"),
        ("process.execCPUAffinity", {"initial": "1-0"}, "process.execCPUAffinity.initial"),
        ("process.execCPUAffinity", {"final": "0,,1"}, "process.execCPUAffinity.final"),
        ("process.execCPUAffinity", {"final": "99999"}, "process.execCPUAffinity.final"),
        ("process.oomScoreAdj", 1001, "process.oomScoreAdj"),
        ("process.rlimits", [{"type": "A", "soft": 2, "hard": 1}], "process.rlimits[0]"),
        ("process.rlimits", [{"type": "A"}, {"type": "A"}], "process.rlimits"),
        ("process.terminal", "yes", "process.terminal"),
        ("hooks.prestart", [{"path": "x"}], "hooks.prestart[0].path"),
        ("hooks.poststop", [{"path": "/x"}, {}], "hooks.poststop[1].path"),
        ("hooks.createContainer", [{"path": "/x", "timeout": 0}], "hooks.createContainer[0].timeout"),
        ("hooks.createContainer", [{"path": "/x", "timeout": 10**7}], "hooks.createContainer[0].timeout"),
        ("hooks.startContainer", [{"path": "/x", "env": ["A"]}], "hooks.startContainer[0].env"),
        ("hooks.createRuntime", [{"path": "/x", "cwd": "/"}], "hooks.createRuntime[0].cwd"),
        ("hooks.prepare", [{"path": "/x"}], "hooks.prepare"),
        ("mounts", [{"destination": "/a", "uidMappings": [{"inside": 0}]}], "mounts[0].uidMappings[0].inside"),
        ("mounts", [{"destination": "/a", "label": "x"}], "mounts[0].label"),
        ("linux.seccomp", {"defaultAction": "ERRNO"}, "linux.seccomp.defaultAction"),
        ("linux.seccomp", {"architectures": ["X86"]}, "linux.seccomp.defaultAction"),
        ("linux.seccomp", {"defaultAction": "SCMP_ACT_NOTIFY"}, "linux.seccomp.defaultAction"),
        ("linux.seccomp", ALLOW | {"architectures": ["X86"]}, "linux.seccomp.architectures[0]"),
        ("linux.seccomp", ALLOW | {"flags": ["SECCOMP_FILTER_FLAG_NEW_LISTENER"]}, "linux.seccomp.flags[0]"),
        ("linux.seccomp", ALLOW | {"listenerMetadata": "x"}, "linux.seccomp.listenerMetadata"),
        ("linux.seccomp", ALLOW | {"defaultErrnoRet": 1}, "linux.seccomp.defaultErrnoRet"),
        ("linux.seccomp", ALLOW | {"syscalls": [{"action": "SCMP_ACT_KILL"}]}, "linux.seccomp.syscalls[0].names"),
        (
            "linux.seccomp",
            ALLOW | {"syscalls": [RULE | {"args": [{"index": 6}]}]},
            "linux.seccomp.syscalls[0].args[0].index",
        ),
        (
            "linux.seccomp",
            ALLOW | {"syscalls": [RULE | {"args": [{"op": "="}]}]},
            "linux.seccomp.syscalls[0].args[0].op",
        ),
        ("linux.intelRdt", {"closID": "x"}, "linux.intelRdt"),
        ("linux.personality", {"domain": "LINUX64"}, "linux.personality.domain"),
        ("linux.personality", {"domain": "LINUX32", "flags": ["x"]}, "linux.personality.flags"),
        ("linux.namespaces", [{"type": "nope"}], "linux.namespaces[0].type"),
        ("linux.namespaces", [{"type": "pid"}, {"type": "pid"}], "linux.namespaces"),
        ("linux.namespaces", [{"type": "pid", "path": "rel"}], "linux.namespaces[0].path"),
        ("linux.devices", [{"path": "/dev/a", "type": "z"}], "linux.devices[0].type"),
        ("linux.resources.blockIO", {"weight": 9}, "linux.resources.blockIO.weight"),
        (
            "linux.resources.hugepageLimits",
            [{"pageSize": "2M/../x", "limit": 1}],
            "linux.resources.hugepageLimits[0].pageSize",
        ),
        ("linux.resources.memory", {"kernel": "5"}, "linux.resources.memory.kernel"),
        ("linux.resources.memory", {"useHierarchy": "x"}, "linux.resources.memory.useHierarchy"),
        ("linux.resources.memory", {"disableOOMKiller": 1}, "linux.resources.memory.disableOOMKiller"),
        ("linux.resources.rdma", {"a b": {}}, "linux.resources.rdma"),
        ("linux.resources.network", {"priorities": [{"name": "lo 1"}]}, "linux.resources.network.priorities[0].name"),
        ("linux.resources.devices", [{"allow": True}] * 1025, "linux.resources.devices"),
        ("linux.resources.cpu", {"cpus": "0 1"}, "linux.resources.cpu.cpus"),
        ("linux.resources.memory", {"swappiness": 101}, "linux.resources.memory.swappiness"),
        ("linux.resources.devices", [{"allow": True, "access": "x"}], "linux.resources.devices[0].access"),
        ("linux.resources.devices", [{"allow": True, "major": 1}], "linux.resources.devices[0]"),
        ("linux.timeOffsets", {"realtime": {}}, "linux.timeOffsets.realtime"),
        ("vm", {"kernel": {}}, "vm"),
    ],
)
def test_spec_errors_name_the_field(path: str, value: Any, field: str) -> None:
    config: dict[str, Any] = {"process": {"args": ["x"]}}
    at = config
    *parents, last = path.split(".")
    for key in parents:
        at = at.setdefault(key, {})
    at[last] = value
    with pytest.raises(SpecError) as caught:
        Spec.from_json(config)
    assert caught.value.field == field


def test_a_configuration_must_be_an_object() -> None:
    with pytest.raises(SpecError):
        Spec.from_json([])


def test_fields_in_other_cases_are_those_that_are_meant() -> None:
    document = {"linux": {"resources": {"cpu": {"shares": 5}, "CPU": {"Shares": 7, "Cpus": "0"}}}, "New": 1}
    said: list[str] = []
    with pytest.raises(SpecError, match=r"linux.resources.CPU: is not a field"):
        Spec.from_json(document)
    cpu = ignoring_unknown(lambda: Spec.from_json(document), said.append).linux.resources.cpu  # type: ignore[union-attr]
    assert (cpu.shares, cpu.cpus) == (7, "0")
    assert "linux.resources.CPU: is taken as cpu" in said and "ignored: New: is not a field this runtime knows" in said
