"""Test specs made from an image's configuration, from a bundle's, and from port rules."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from caisson.agent.client import UsageError
from caisson.agent.client.caller import user_document
from caisson.agent.client.copy import Location
from caisson.agent.client.run_specs import RunOptions, env_file, image_document, size
from caisson.agent.client.seccomp import default_profile
from caisson.agent.client.specs import CAPABILITIES, MEMORY_SHARE, PIDS_LIMIT, confine, container_document
from caisson.agent.client.wire_specs import to_kata3, to_wire
from caisson.agent.libcontainer.config.seccomp import Seccomp
from caisson.agent.libcontainer.config.spec import Spec
from caisson.agent.libcontainer.state import check_id
from caisson.commands.run import CONTAINER_NAME

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


@dataclass
class Image:
    """An image's configuration."""

    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = ("/bin/sh",)
    env: tuple[str, ...] = ()
    user: str = ""
    workdir: str = "/"


def of_bundle(document: Any, *words: str, **options: Any) -> tuple[dict[str, Any], list[str]]:
    warnings: list[str] = []
    return image_document(Image(), document, words, RunOptions(**options), warnings.append), warnings


def of_image(*words: str, config: Image | None = None, **options: Any) -> dict[str, Any]:
    return image_document(config or Image(), {}, words, RunOptions(**options))


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


def test_scratch_file_systems_are_sized_and_together_below_the_memory_limit() -> None:
    mounts = [mount for mount in container_document("/rootfs")["mounts"] if mount["type"] == "tmpfs"]
    sizes = [next(option for option in mount["options"] if option.startswith("size=")) for mount in mounts]
    percents = [int(size[5:-1]) for size in sizes if size.endswith("%")]
    assert len(percents) == 5 and sum(percents) < 100 * MEMORY_SHARE


def test_every_cpus_thermal_throttle_is_masked() -> None:
    document = of_image(guest_cpus=3)
    masked = [path for path in document["linux"]["maskedPaths"] if "thermal_throttle" in path]
    assert [path.split("/")[-2] for path in masked] == ["cpu0", "cpu1", "cpu2"]
    assert "thermal" not in str(of_image(guest_cpus=3, privileged=True)["linux"])


def test_an_images_wishes() -> None:
    config = Image(env=("A=1", "PATH=/opt"), user="web", workdir="/srv")
    document = of_image("/x", "y", config=config, env=["A=2=3"], user="web:logs")
    process = document["process"]
    assert process["args"] == ["/x", "y"] and process["cwd"] == "/srv" and process["env"] == ["PATH=/opt", "A=2=3"]
    assert process["user"] == {"username": "web:logs"} and not process["noNewPrivileges"]
    assert not document["root"]["readonly"]
    assert all(mount["destination"] not in ("/tmp", "/home") for mount in document["mounts"])
    assert of_image()["process"]["user"] == {"username": "0"}


@pytest.mark.parametrize(
    ("entrypoint", "words", "args"),
    [
        (None, [], ["/entry", "c"]),
        (None, ["x"], ["/entry", "x"]),
        ("/other", [], ["/other"]),
        ("/other", ["x"], ["/other", "x"]),
        ("", ["x"], ["x"]),
    ],
)
def test_entrypoints(entrypoint: str | None, words: list[str], args: list[str]) -> None:
    config = Image(entrypoint=("/entry",), command=("c",))
    assert of_image(*words, config=config, entrypoint=entrypoint)["process"]["args"] == args


def test_no_program_is_left_without_an_entrypoint() -> None:
    with pytest.raises(UsageError, match="no program is left"):
        of_image(entrypoint="")


def test_limits() -> None:
    resources = of_image(memory=64 << 20, cpus=1.5, pids_limit=7)["linux"]["resources"]
    assert resources["memory"] == {"limit": 64 << 20, "swap": 64 << 20} and resources["pids"] == {"limit": 7}
    assert resources["cpu"] == {"quota": 150_000, "period": 100_000}
    assert of_image(pids_limit=-1)["linux"]["resources"]["pids"] == {"limit": -1}
    assert of_image(guest_memory=512 << 20)["linux"]["resources"]["memory"]["limit"] == 384 << 20
    with pytest.raises(UsageError, match="too little"):
        of_image(memory=1000)


def test_capabilities_are_added_and_dropped_by_either_name() -> None:
    def held(**options: Any) -> list[str]:
        return list(of_image(**options)["process"]["capabilities"]["bounding"])

    assert "CAP_NET_ADMIN" in held(cap_add=["net_admin"]) and "CAP_CHOWN" not in held(cap_drop=["CAP_CHOWN"])
    assert held(cap_drop=["ALL"]) == [] and held(cap_drop=["all"], cap_add=["CHOWN"]) == ["CAP_CHOWN"]
    assert len(held(cap_add=["ALL"])) == 41
    with pytest.raises(UsageError, match="'NOSUCH': unknown"):
        held(cap_add=["NOSUCH"])


def test_privileged_is_without_filter_masks_and_limits() -> None:
    document = of_image(privileged=True, guest_memory=1 << 30)
    assert "seccomp" not in document["linux"] and document["linux"]["maskedPaths"] == []
    assert len(document["process"]["capabilities"]["effective"]) == 41 and "resources" not in document["linux"]


def test_other_options() -> None:
    document = of_image("x", hostname="h", read_only=True, tmpfs=["/a", "/b:size=1m"], init=True, busybox="/g/busybox")
    assert document["hostname"] == "h" and document["root"]["readonly"]
    mounts = {mount["destination"]: mount for mount in document["mounts"]}
    assert "size=64m" in mounts["/a"]["options"] and mounts["/b"]["options"] == ["size=1m"]
    init, *_, program = document["process"]["args"]
    assert mounts[init]["source"] == "/g/busybox" and program == "x"
    with pytest.raises(UsageError, match="--tmpfs a: "):
        of_image(tmpfs=["a"])


@pytest.mark.parametrize(
    ("text", "bytes"), [("64m", 64 << 20), ("1.5g", 3 << 29), ("512MiB", 512 << 20), ("1k", 1024), ("1000", 1000)]
)
def test_sizes(text: str, bytes: int) -> None:
    assert size(text) == bytes


@pytest.mark.parametrize("text", ["", "abc", "-1", "1x", "m", "nan"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError, match="--memory"):
        size(text)


def test_settings_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OURS", "o")
    monkeypatch.delenv("MISSING", raising=False)
    (tmp_path / "env").write_bytes(b"# a comment\nA=1\n\nB=x=y # kept\nOURS\nMISSING\nC=\xff\n")
    assert env_file(str(tmp_path / "env")) == ["A=1", "B=x=y # kept", "OURS=o", "C=\udcff"]
    (tmp_path / "bad").write_text("A=1\nno name\n")
    with pytest.raises(UsageError, match="line 2"):
        env_file(str(tmp_path / "bad"))
    with pytest.raises(UsageError, match="No such file"):
        env_file(str(tmp_path / "missing"))


@pytest.mark.parametrize(
    "text", ["", ":", "a:", ":1", "a:b:c", "-1", "a/b", "a b", "4294967295", "0:4294967296", "\u0663"]
)
def test_what_is_no_user(text: str) -> None:
    with pytest.raises(UsageError, match="--user"):
        user_document(text)


@pytest.mark.parametrize("text", ["nobody", "1000", "1000:1001", "www-data:adm", "_apt", "machine$"])
def test_users_are_looked_up_in_the_container(text: str) -> None:
    assert user_document(text) == {"username": text}


def test_root_is_not_looked_up() -> None:
    assert user_document("0") == {"uid": 0, "gid": 0}


def test_the_default_profile_is_one_that_libcontainer_reads() -> None:
    profile = Seccomp.from_json(default_profile(CAPABILITIES), "seccomp")
    permitted = {name for rule in profile.rules for name in rule.names if not rule.conditions}
    assert {"read", "chroot"} <= permitted
    forbidden = {"keyctl", "add_key", "io_uring_setup", "userfaultfd", "bpf", "mount", "setns", "unshare", "clone"}
    assert not forbidden & permitted
    assert "unshare" in default_profile(["CAP_SYS_ADMIN"])["syscalls"][0]["names"]


def test_a_container_is_confined_by_default() -> None:
    spec = Spec.from_json(confine(container_document("/rootfs"), 512 << 20))
    assert spec.linux.seccomp is not None and spec.linux.resources is not None


def test_a_spec_of_1x_is_the_same_in_3x_with_its_filter() -> None:
    document = container_document("/rootfs", ["/bin/sh"])
    document["linux"]["seccomp"] = {
        "defaultAction": "SCMP_ACT_ERRNO",
        "architectures": ["SCMP_ARCH_X86_64"],
        "syscalls": [
            {"names": ["chown"], "action": "SCMP_ACT_ALLOW"},
            {"names": ["clone"], "action": "SCMP_ACT_ALLOW", "args": [{"index": 0, "value": 1, "op": "SCMP_CMP_EQ"}]},
        ],
    }
    old, new = to_wire(document), to_kata3(to_wire(document))
    assert list(new.Process.Args) == ["/bin/sh"] and len(new.Mounts) == len(old.Mounts)
    assert new.Linux.Seccomp.DefaultAction == "SCMP_ACT_ERRNO" and not new.Linux.Seccomp.Flags
    assert [list(one.Names) for one in new.Linux.Seccomp.Syscalls] == [["chown"], ["clone"]]
    assert new.Linux.Seccomp.Syscalls[1].Args[0].Op == "SCMP_CMP_EQ"
    assert len(old.Linux.Seccomp.Syscalls) == 2  # it was not modified


@given(st.text("abcXYZ019_.-+/ é\n\0", max_size=300))
def test_every_name_of_a_container_is_an_id_for_the_agent(name: str) -> None:
    """Also for a file name, and one before cp's colon."""
    if CONTAINER_NAME.fullmatch(name):
        assert check_id(name) == name
        assert len(os.fsencode(name)) <= 253 and "/" not in name and name not in (".", "..")
        assert Location.parse(f"{name}:/x") == Location(name, "/x")
