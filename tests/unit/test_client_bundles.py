"""Test what a guest takes of a bundle's configuration, and what it leaves out or refuses."""

from __future__ import annotations

import json
from typing import Any

import pytest

from caisson.agent.client import UsageError
from caisson.agent.client.run_specs import RunOptions, image_document
from caisson.agent.client.specs import PIDS_LIMIT
from caisson.agent.client.wire_specs import to_wire
from caisson.image.containers.documents import Config

#: The output of `runc spec`, shortened.
BUNDLE = {
    "ociVersion": "1.0.2-dev",
    "process": {
        "terminal": True,
        "consoleSize": {"height": 24, "width": 80},
        "user": {"uid": 1, "gid": 2, "additionalGids": [3, 4]},
        "args": ["sh"],
        "env": ["PATH=/bin"],
        "cwd": "/",
        "capabilities": {"bounding": ["CAP_KILL"], "ambient": None},
        "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 512}],
        "noNewPrivileges": True,
        "oomScoreAdj": 5,
    },
    "root": {"path": "rootfs", "readonly": True},
    "hostname": "runc",
    "mounts": [{"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid"]}],
    "annotations": {"a": "b"},
    "linux": {
        "resources": {
            "devices": [{"allow": False, "access": "rwm"}],
            "memory": {"limit": 1 << 30},
            "hugepageLimits": [{"pageSize": "2MB", "limit": 5}],
        },
        "cgroupsPath": "/of/the/host",
        "namespaces": [{"type": "pid"}, {"type": "network", "path": "/run/netns/x"}, {"type": "ipc"}],
        "uidMappings": [{"containerID": 0, "hostID": 1000, "size": 1}],
        "sysctl": {"net.ipv4.ip_forward": "1"},
        "maskedPaths": ["/proc/kcore"],
    },
}


def changed(path: str, value: object) -> dict[str, Any]:
    """Return the bundle with one field changed, given by a dotted path."""
    document: dict[str, Any] = json.loads(json.dumps(BUNDLE))
    *above, name = path.split(".")
    place = document
    for part in above:
        place = place[part]
    place[name] = value
    return document


def of_bundle(document: Any, *words: str, **options: Any) -> tuple[dict[str, Any], list[str]]:
    warnings: list[str] = []
    return image_document(Config(), document, words, RunOptions(**options), warnings.append), warnings


def test_a_bundle_keeps_what_is_a_containers_own() -> None:
    document, warnings = of_bundle(BUNDLE)
    spec = to_wire({key: value for key, value in document.items() if key != "linux"})
    assert spec.Version == "1.0.2-dev" and spec.Hostname == "runc" and spec.Annotations == {"a": "b"}
    assert list(spec.Process.Args) == ["sh"] and spec.Process.Terminal and spec.Process.ConsoleSize.Width == 80
    assert (spec.Process.User.UID, spec.Process.User.GID, list(spec.Process.User.AdditionalGids)) == (1, 2, [3, 4])
    assert spec.Process.Rlimits[0].Soft == 512 and spec.Process.OOMScoreAdj == 5
    linux = document["linux"]
    assert linux["resources"]["memory"]["limit"] == 1 << 30 and linux["uidMappings"][0]["hostID"] == 1000
    assert "/proc/kcore" in linux["maskedPaths"] and "cgroupsPath" not in linux
    assert {one["type"] for one in linux["namespaces"]} == {"ipc", "mount", "uts", "cgroup"}
    assert warnings == []


def test_what_a_bundle_leaves_out_is_filled_in() -> None:
    document, _ = of_bundle({"process": {"args": ["x"]}}, guest_memory=1 << 30)
    linux = document["linux"]
    assert linux["resources"]["pids"] == {"limit": PIDS_LIMIT} and linux["resources"]["memory"]["limit"] == 3 << 28
    assert linux["seccomp"]["defaultErrnoRet"] == 1 and "/proc/kcore" in linux["maskedPaths"]


HOOK = {"prestart": [{"path": "/proc/1/exe"}]}


@pytest.mark.parametrize(
    ("path", "value", "warning"),
    [
        ("hooks", HOOK, "hooks: not run"),
        ("process.apparmorProfile", "docker-default", "process.apparmorProfile: left out"),
        ("process.selinuxLabel", "system_u:system_r:x", "process.selinuxLabel: left out"),
        ("linux.mountLabel", "system_u:object_r:x", "linux.mountLabel: left out"),
        ("linux.namespaces", [{"type": "ipc", "path": "/proc/1/ns/ipc"}], "namespaces[0].path: left out"),
        ("mounts", [{"destination": "/etc/hosts", "source": "/var/x", "type": "bind"}], "/etc/hosts: left out"),
    ],
)
def test_what_engines_write_about_their_host_is_left_out_with_a_warning(path: str, value: Any, warning: str) -> None:
    _, warnings = of_bundle(changed(path, value))
    assert len(warnings) == 1 and warning in warnings[0]


def test_capabilities_that_cannot_be_raised_or_are_unknown_are_left_out_with_a_warning() -> None:
    sets = {"bounding": ["CAP_KILL", "CAP_OF_TOMORROW"], "permitted": ["CAP_KILL"], "ambient": ["CAP_KILL"]}
    document, warnings = of_bundle(changed("process.capabilities", sets))
    assert document["process"]["capabilities"] == {"bounding": ["CAP_KILL"], "permitted": ["CAP_KILL"], "ambient": []}
    assert len(warnings) == 2 and "CAP_OF_TOMORROW" in warnings[0] and "ambient" in warnings[1]
    document, warnings = of_bundle(changed("process.capabilities", sets | {"inheritable": ["CAP_KILL"]}))
    assert document["process"]["capabilities"]["ambient"] == ["CAP_KILL"] and len(warnings) == 1


@pytest.mark.parametrize("maps", [None, [], [{"containerID": 0, "hostID": 7, "size": 9}]])
def test_a_user_namespace_without_maps_has_roots_id_as_with_crun(maps: list[dict[str, int]] | None) -> None:
    bundle = changed("linux.namespaces", [{"type": "user"}, {"type": "mount"}])
    bundle["linux"] |= {"uidMappings": maps, "gidMappings": maps}
    linux = of_bundle(bundle)[0]["linux"]
    wanted = maps or [{"containerID": 0, "hostID": 0, "size": 1}]
    assert linux["uidMappings"] == linux["gidMappings"] == wanted


def test_a_user_namespace_gets_the_guests_sysfs_without_what_is_mounted_in_it() -> None:
    bundle = changed("linux.namespaces", [{"type": "user"}])
    bundle["mounts"] = [{"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["ro"]}]
    (sys,) = (mount for mount in of_bundle(bundle)[0]["mounts"] if mount["destination"] == "/sys")
    assert (sys["type"], sys["source"]) == ("bind", "/sys")
    assert "bind" in sys["options"] and "ro" in sys["options"]


@pytest.mark.parametrize("permitted", [["CAP_KILL"], []])
@pytest.mark.parametrize("inheritable", [["CAP_KILL"], ["CAP_CHOWN"], None])
def test_an_ambient_capability_is_kept_where_it_can_be_raised_and_else_warned_of(
    permitted: list[str], inheritable: list[str] | None
) -> None:
    sets = {"permitted": permitted, "inheritable": inheritable, "ambient": ["CAP_KILL"]}
    document, warnings = of_bundle(changed("process.capabilities", sets))
    kept = bool(permitted) and inheritable == ["CAP_KILL"]
    assert document["process"]["capabilities"]["ambient"] == (["CAP_KILL"] if kept else [])
    left_out = "config.json: process.capabilities.ambient: left out where not permitted and inheritable"
    assert warnings == ([] if kept else [left_out])


def test_a_bundle_of_a_tool_without_root_gets_file_systems_of_the_guest() -> None:
    mount = {"destination": "/sys", "type": "none", "source": "/sys", "options": ["rbind", "ro"]}
    document, _ = of_bundle(changed("mounts", [mount]))
    assert [(one["type"], one["source"]) for one in document["mounts"]] == [("sysfs", "sysfs")]


@pytest.mark.parametrize(
    ("path", "value", "why"),
    [
        ("process.args", [], "process.args: empty; name a program"),
        ("process.args", "sh", "process.args: must be a list"),
        ("process", 5, "process: must be an object"),
        ("linux.sysctl", [], r"linux\.sysctl: must be an object"),
        ("mounts", [{"destination": "/x", "source": "/y", "type": "bind"}], r"mounts\[0\]: /y is a path of the host"),
        ("mounts", [{"destination": "/x", "source": "/y", "options": ["rbind"]}], r"mounts\[0\]: /y is a path"),
    ],
)
def test_what_a_bundle_cannot_ask_for(path: str, value: object, why: str) -> None:
    for privileged in (False, True):
        if not (privileged and path == "linux.sysctl"):
            with pytest.raises(UsageError, match=f"config.json: {why}"):
                of_bundle(changed(path, value), privileged=privileged)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("process.capabilities.bounding", ["CAP_SYS_ADMIN"]),
        ("process.oomScoreAdj", -5),
        ("linux.sysctl", {"kernel.core_pattern": "|/x"}),
        ("linux.devices", [{"path": "/dev/vda", "type": "b", "major": 254, "minor": 0}]),
        ("linux.resources.devices", [{"allow": True, "access": "rwm"}]),
        ("linux.resources.devices", [{"allow": True, "type": "b", "major": 254, "minor": 0, "access": "r"}]),
        ("mounts", [{"destination": "/x", "source": "/dev/vda", "type": "ext4"}]),
        ("linux.sysctl", {"kernel.modprobe": "/x"}),
        ("linux.seccomp", {"defaultAction": "SCMP_ACT_ALLOW"}),
        ("linux.seccomp", {"defaultAction": "SCMP_ACT_LOG"}),
        ("linux.resources.pids", {"limit": -1}),
        ("linux.resources.memory", {"limit": -1}),
        ("linux.resources.cpu", {"realtimeRuntime": 1000}),
        ("linux.resources.unified", {"memory.min": "1"}),
        ("linux.netDevices", {"eth0": {}}),
        ("process.scheduler", {"policy": "SCHED_FIFO", "priority": 1}),
        ("process.scheduler", {"policy": "SCHED_OTHER", "nice": -5}),
        ("process.ioPriority", {"class": "IOPRIO_CLASS_RT", "priority": 1}),
        ("process.rlimits", [{"type": "RLIMIT_RTPRIO", "hard": 5, "soft": 5}]),
    ],
)
def test_what_goes_beyond_the_defaults_is_refused_by_field_unless_privileged(path: str, value: Any) -> None:
    with pytest.raises(UsageError, match=r"config\.json: .*; --privileged permits it"):
        of_bundle(changed(path, value))
    of_bundle(changed(path, value), privileged=True)


def test_a_bundles_own_filter_permits_no_more_than_engines_do() -> None:
    rules = [
        {"names": ["read", "keyctl", "io_uring_setup"], "action": "SCMP_ACT_ALLOW"},
        {"names": ["userfaultfd"], "action": "SCMP_ACT_ALLOW"},
        {"names": ["add_key"], "action": "SCMP_ACT_ERRNO"},
    ]
    profile = {"defaultAction": "SCMP_ACT_ERRNO", "syscalls": rules, "listenerPath": "/run/x"}
    document, warnings = of_bundle(changed("linux.seccomp", profile))
    assert [rule["names"] for rule in document["linux"]["seccomp"]["syscalls"]] == [["read"], ["add_key"]]
    assert len(warnings) == 2 and "listenerPath: left out" in warnings[0]
    assert "io_uring_setup, keyctl, userfaultfd: left out; --privileged" in warnings[1]
    assert "listenerPath" not in document["linux"]["seccomp"]


def test_limits_of_zero_are_none_and_limits_of_a_larger_machine_are_lowered() -> None:
    document, _ = of_bundle(
        changed("linux.resources", {"pids": {"limit": 0}, "memory": {"limit": 0}}), guest_memory=400
    )
    assert document["linux"]["resources"] == {"pids": {"limit": PIDS_LIMIT}, "memory": {"limit": 300}}
    large = {"memory": {"limit": 1 << 30, "swap": 2 << 30}}
    document, warnings = of_bundle(changed("linux.resources", large), guest_memory=1 << 29)
    assert document["linux"]["resources"]["memory"] == {"limit": 3 << 27, "swap": 3 << 27}
    assert len(warnings) == 1 and "linux.resources.memory.limit: 1073741824 is lowered" in warnings[0]
