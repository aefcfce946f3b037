"""Test converting an OCI configuration to the steps that nsexec executes."""

from __future__ import annotations

from collections.abc import Iterator
from struct import unpack_from
from typing import Any

import pytest

from caisson.agent.base import syscalls
from caisson.agent.libcontainer.config.process import Process
from caisson.agent.libcontainer.config.reader import SpecError
from caisson.agent.libcontainer.config.spec import Spec
from caisson.agent.libcontainer.plan import capabilities as names
from caisson.agent.libcontainer.plan import lsm, mounts, plan, sysctl, wire
from caisson.agent.libcontainer.plan import wire as steps


def _spec(**changes: Any) -> Spec:
    value: dict[str, Any] = {
        "process": {"args": ["sh", "-c", "x"], "env": ["A=1", "A=2"]},
        "linux": {"namespaces": [{"type": "mount"}, {"type": "pid"}]},
    }
    for path, item in changes.items():
        at = value
        *parents, last = path.split("__")
        for key in parents:
            at = at.setdefault(key, {})
        at[last] = item
    return Spec.from_json(value)


def _init(spec: Spec, **keywords: Any) -> bytes:
    arguments: dict[str, Any] = {"rootfs": "/r", "bundle": "/b", "join": {}, "cgroups": {}, **keywords}
    return plan.init_messages(spec, **arguments)


def _messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at < len(data):
        length, kind = unpack_from("=IH", data, at)
        yield kind, data[at + 16 : at + length]
        at += length


def _steps(body: bytes) -> list[tuple[int, bytes]]:
    found, at = [], 0
    while at < len(body):
        length, kind = unpack_from("=HH", body, at)
        found.append((kind, body[at + 4 : at + length]))
        at += (length + 3) & ~3
    return found


def test_three_messages_in_order() -> None:
    messages = list(_messages(_init(_spec())))
    assert [kind for kind, _ in messages] == [wire.MESSAGE_BOOTSTRAP, wire.MESSAGE_PLAN, wire.MESSAGE_STRINGS]
    assert messages[2][1] == b"sh\0-c\0x\0A=2\0HOME=/root\0"
    found = _steps(messages[1][1])
    kinds = [kind for kind, _ in found]
    assert kinds == sorted(kinds)
    assert dict(found)[steps.STRINGS] == (3).to_bytes(4, "little") + (2).to_bytes(4, "little")
    assert dict(found)[steps.ROOTFS] == b"/r\0"


def test_plan_rejects_settings_without_their_namespace() -> None:
    with pytest.raises(SpecError, match="new mount namespace"):
        _init(_spec(linux__namespaces=[{"type": "pid"}]))
    with pytest.raises(SpecError, match="new mount namespace"):
        _init(_spec(), join={"mount": "/proc/1/ns/mnt"})
    with pytest.raises(SpecError, match=r"hostname: needs a uts"):
        _init(_spec(hostname="x"))
    with pytest.raises(SpecError, match=r"uidMappings: needs a new user"):
        _init(_spec(linux__uidMappings=[{"size": 1}]))
    with pytest.raises(SpecError, match=r"process.env"):
        _init(_spec(process__env=["novalue"]))
    with pytest.raises(SpecError, match=r"rootfsPropagation"):
        _init(_spec(linux__rootfsPropagation="wild"))
    with pytest.raises(SpecError, match=r"timeOffsets"):
        _init(_spec(linux__timeOffsets={"boottime": {"secs": 1}}))
    with pytest.raises(SpecError, match="without a comma"):
        _init(_spec(), join={"network": "/a,pid:/b"})


def test_joined_namespaces_are_not_made() -> None:
    boot = next(body for kind, body in _messages(_init(_spec(), join={"pid": "/p", "uts": "/u"})))
    found = dict(_steps(boot))
    assert int.from_bytes(found[wire.CLONE_FLAGS], "little") == wire.NAMESPACES["mount"][0]
    assert found[wire.NS_PATHS] == b"pid:/p,uts:/u\0"


def _plan_of(data: bytes) -> list[tuple[int, bytes]]:
    return _steps(next(body for kind, body in _messages(data) if kind == wire.MESSAGE_PLAN))


def test_procfs_of_a_pid_namespace_that_is_joined() -> None:
    spec = _spec(mounts=[{"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid"]}])
    own = dict(_plan_of(_init(spec)))[steps.MOUNT]
    flags, texts = unpack_from("=I", own)[0], own[40:].split(b"\0")
    assert (flags, texts[:3]) == (steps.MOUNT_ORDINARY_DIR, [b"/proc", b"proc", b"proc"])
    copied = dict(_plan_of(_init(spec, join={"pid": "/p"}, procfs="/shared/proc")))[steps.MOUNT]
    flags, texts = unpack_from("=I", copied)[0], copied[40:].split(b"\0")
    assert (flags, texts[:2]) == (steps.MOUNT_ORDINARY_DIR | steps.MOUNT_BIND, [b"/proc", b"/shared/proc"])
    made = dict(_plan_of(_init(spec, join={"pid": "/p"})))[steps.MOUNT]
    assert unpack_from("=I", made)[0] == steps.MOUNT_ORDINARY_DIR | steps.MOUNT_IN_CHILD


def test_a_mount_label_is_the_context_of_new_file_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lsm, "has_selinux", lambda: True)
    label = "system_u:object_r:container_file_t:s0:c1,c2"
    targets = {"tmpfs": "/t", "devpts": "/dev/pts", "sysfs": "/sys", "bind": "/b"}
    listed = [{"destination": target, "type": kind, "source": "/x"} for kind, target in targets.items()]
    found = [
        body for kind, body in _plan_of(_init(_spec(mounts=listed, linux__mountLabel=label))) if kind == steps.MOUNT
    ]
    context = f"context={label}".encode()
    assert [context in body.split(b"\0") for body in found] == [True, True, False, False]


def test_hooks_of_nsexec_and_of_the_agent() -> None:
    hook = {"path": "/h", "args": ["h", "a"], "env": ["A=b"], "timeout": 5}
    found = _plan_of(_init(_spec(hooks={"poststart": [hook], "poststop": [hook]})))
    assert not {steps.HOOK_STATE, steps.RUNTIME_HOOKS, steps.CREATE_HOOK, steps.START_HOOK} & dict(found).keys()
    spec = _spec(hooks={"prestart": [hook], "createContainer": [{"path": "/1"}, hook], "startContainer": [hook]})
    found = _plan_of(_init(spec, hook_state='{"id":"x"'))
    kinds = [kind for kind, _ in found]
    assert kinds == sorted(kinds)
    assert dict(found)[steps.HOOK_STATE] == b'{"id":"x"\0'
    assert dict(found)[steps.RUNTIME_HOOKS] == b"\1\0\0\0"
    first, second = (body for kind, body in found if kind == steps.CREATE_HOOK)
    assert (unpack_from("=3I", first), first[12:]) == ((0, 1, 0), b"/1\0/1\0")
    assert (unpack_from("=3I", second), second[12:]) == ((5, 2, 1), b"/h\0h\0a\0A=b\0")
    assert dict(found)[steps.START_HOOK] == second
    with pytest.raises(SpecError, match=r"hooks.createContainer: cannot run in a pid namespace with others in it"):
        _init(spec, join={"pid": "/p"}, procfs="/shared/proc")


ID_MAPS: dict[str, Any] = {
    name: [{"containerID": 0, "hostID": 1000, "size": 1}] for name in ("uidMappings", "gidMappings")
}


@pytest.mark.parametrize(
    ("changes", "join", "expected"),
    [
        ({}, {}, {"mount", "pid"}),
        ({"namespaces": [{"type": "mount"}, {"type": "pid"}, {"type": "cgroup"}]}, {}, {"mount", "pid"}),
        ({}, {"uts": "/u"}, {"mount", "pid"}),
        ({"namespaces": [{"type": "mount"}, {"type": "pid"}, {"type": "uts", "path": "/u"}]}, {}, {"mount", "pid"}),
        ({}, {"pid": "/p"}, set()),
        ({"namespaces": [{"type": "mount"}, {"type": "user"}]} | ID_MAPS, {}, set()),
        ({}, {"user": "/p"}, set()),
        ({"namespaces": [{"type": "mount"}, {"type": "time"}]}, {}, set()),
        ({"resources": {"memory": {"limit": 1 << 20}}}, {}, set()),
        ({"resources": {"memory": {"limit": 6 << 20}}}, {}, {"mount", "pid"}),
        ({"resources": {"memory": {"limit": -1}}}, {}, {"mount", "pid"}),
    ],
)
def test_namespaces_in_which_an_init_is_cloned(
    changes: dict[str, Any], join: dict[str, str], expected: set[str]
) -> None:
    spec = _spec(**{f"linux__{name}": value for name, value in changes.items()})
    flags = sum(wire.NAMESPACES[name][0] for name in expected)
    assert plan.init_namespaces(spec, join) == flags


@pytest.mark.parametrize("options", [["bind", "idmap"], ["bind", "ridmap"], ["bind"]])
def test_an_init_with_id_mapped_mounts_is_not(options: list[str]) -> None:
    mount: dict[str, Any] = {"destination": "/m", "type": "bind", "source": "/s", "options": options}
    assert plan.init_namespaces(_spec(mounts=[mount | (ID_MAPS if options == ["bind"] else {})]), {}) == 0


def test_an_exec_takes_what_it_does_not_name_from_the_container() -> None:
    spec = _spec(
        process__capabilities={"bounding": ["CAP_KILL"]},
        process__noNewPrivileges=True,
        process__oomScoreAdj=7,
        process__rlimits=[{"type": "RLIMIT_CORE", "soft": 0, "hard": 0}],
    )
    messages = list(_messages(plan.exec_messages(Process(args=("x",)), spec, {"uts": "/u"})))
    boot, found = dict(_steps(messages[0][1])), dict(_steps(messages[1][1]))
    mask = wire.NAMESPACES["mount"][0] | wire.NAMESPACES["pid"][0] | wire.NAMESPACES["uts"][0]
    assert int.from_bytes(boot[wire.JOIN_MASK], "little") == mask
    assert boot[wire.OOM_SCORE_ADJ] == b"7\0"
    assert {steps.RLIMIT, steps.NO_NEW_PRIVS} <= found.keys()
    assert unpack_from("=5Q", found[steps.CAPABILITIES]) == (1 << 5, 0, 0, 0, 0)
    assert steps.ROOTFS not in found and steps.UMASK not in found


def test_devices_follow_the_mounts_unless_dev_is_bound() -> None:
    def devices(spec: Spec) -> list[bytes]:
        body = next(body for kind, body in _messages(_init(spec)) if kind == wire.MESSAGE_PLAN)
        return [payload[24:-1] for kind, payload in _steps(body) if kind == steps.DEVICE]

    assert devices(_spec()) == [b"/dev/" + n for n in (b"null", b"zero", b"full", b"random", b"urandom", b"tty")]
    bound = [{"destination": "/dev/", "type": "bind", "source": "/dev", "options": ["rbind"]}]
    assert devices(_spec(mounts=bound)) == []
    asked = [{"path": path, "type": "c", "major": 1, "minor": 3} for path in ("/dev/there", "/elsewhere/null")]
    assert devices(_spec(mounts=bound, linux__devices=asked)) == [b"/elsewhere/null"]


ID = {"containerID": 0, "hostID": 1000, "size": 1}


@pytest.mark.parametrize(
    ("mount", "why"),
    [
        ({"destination": "relative", "type": "tmpfs"}, "absolute"),
        ({"destination": "/x"}, "type: is missing"),
        ({"destination": "/x", "type": "bind"}, "source: is missing"),
        ({"destination": "/x", "type": "tmpfs", "options": ["idmap"]}, "must be bind mounts"),
        ({"destination": "/x", "type": "tmpfs", "uidMappings": [ID], "gidMappings": [ID]}, "are for bind mounts"),
        ({"destination": "/x", "type": "bind", "source": "/y", "uidMappings": [ID]}, "go together with gidMappings"),
        ({"destination": "/x", "type": "bind", "source": "/y", "options": ["ridmap"]}, "or a user namespace"),
        ({"destination": "/x", "type": "tmpfs", "options": ["slave", "rshared"]}, "second propagation type"),
        ({"destination": "/x", "type": "overlay", "options": ["lowerdir=" + "x" * 300]}, "longer than the 255"),
        ({"destination": "/x", "type": "cgroup"}, "needs a cgroup namespace"),
        ({"destination": "//proc//sys/", "type": "tmpfs"}, "inside /proc"),
    ],
)
def test_mounts_that_are_refused(mount: dict[str, Any], why: str) -> None:
    with pytest.raises(SpecError, match=why) as caught:
        _init(_spec(mounts=[mount]))
    assert caught.value.field.startswith("mounts[0]")


def test_options_become_attributes() -> None:
    options = ("nosuid", "ro", "rw", "rro", "noatime", "rslave", "mode=755", "defaults")
    parsed = mounts.parse_options(options, type_="tmpfs", where="x")
    assert parsed.set == syscalls.MOUNT_ATTR_NOSUID | syscalls.MOUNT_ATTR_NOATIME
    assert parsed.clear == syscalls.MOUNT_ATTR_RDONLY | syscalls.MOUNT_ATTR__ATIME
    assert parsed.recursive_set == syscalls.MOUNT_ATTR_RDONLY
    assert parsed.propagation == syscalls.MS_SLAVE | syscalls.MS_REC
    assert parsed.data == ("mode=755",)
    assert not parsed.bind


def test_data_of_a_bind_mount_is_ignored() -> None:
    assert mounts.parse_options(("rbind", "size=1"), type_="none", where="x").data == ()


def test_names_have_kernel_numbers() -> None:
    assert names.capability_mask(["CAP_CHOWN", "CAP_CHECKPOINT_RESTORE"], "x") == 1 | 1 << 40
    assert names.rlimit_number("RLIMIT_NOFILE", "x") == 7
    with pytest.raises(SpecError, match="not a capability"):
        names.capability_mask(["KILL"], "x")
    with pytest.raises(SpecError, match="not a resource limit"):
        names.rlimit_number("NOFILE", "x")


@pytest.mark.parametrize(
    ("key", "path"),
    [
        ("net.ipv4.ip_forward", "net/ipv4/ip_forward"),
        ("net/ipv4/conf/eth0.1/rp_filter", "net/ipv4/conf/eth0.1/rp_filter"),
        ("net.ipv4.conf.eth0/1.rp_filter", "net/ipv4/conf/eth0.1/rp_filter"),
        ("kernel.shm_rmid_forced", "kernel/shm_rmid_forced"),
    ],
)
def test_sysctl_keys(key: str, path: str) -> None:
    assert sysctl.path_of(key) == path


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("kernel.core_pattern", "x", "whole machine"),
        ("kernel.hostname", "x", "set by hostname"),
        ("net/../kernel/core_pattern", "x", "not a kernel parameter"),
        ("net.ipv4.ip_forward", "1", "needs a network namespace"),
        ("kernel.msgmax", "1", "needs a ipc namespace"),
        ("", "1", "not a kernel parameter"),
    ],
)
def test_sysctls_that_are_refused(key: str, value: str, why: str) -> None:
    with pytest.raises(SpecError, match=why):
        list(sysctl.steps(1, {key: value}, {"mount", "pid"}))


def test_sysctl_values_have_no_second_line() -> None:  # CVE-2022-0811
    with pytest.raises(SpecError, match="newline"):
        list(sysctl.steps(1, {"net.ipv4.ip_forward": "1\nx"}, {"network"}))
