"""Test converting a spec's spelling on the wire to that of config.json."""

from __future__ import annotations

import pytest

from caisson.agent.api.conversions import exec_to_json, json_name, spec_to_json
from caisson.agent.api.kata1.service import AgentService
from caisson.agent.client import default_spec
from caisson.agent.libcontainer.config.process import Process
from caisson.agent.libcontainer.config.reader import SpecError
from caisson.agent.libcontainer.config.seccomp import ALLOW, ERRNO, MASKED_EQ, SPEC_ALLOW, Condition, Rule, Seccomp
from caisson.agent.libcontainer.config.spec import Spec
from caisson.proto.kata1 import oci_pb2


@pytest.mark.parametrize(
    ("wire", "config"),
    [
        ("Version", "ociVersion"),
        ("OOMScoreAdj", "oomScoreAdj"),
        ("UID", "uid"),
        ("UIDMappings", "uidMappings"),
        ("HostID", "hostID"),
        ("ContainerID", "containerID"),
        ("CPU", "cpu"),
        ("BlockIO", "blockIO"),
        ("ClassID", "classID"),
        ("KernelTCP", "kernelTCP"),
        ("DisableOOMKiller", "disableOOMKiller"),
        ("ThrottleReadBpsDevice", "throttleReadBpsDevice"),
        ("L3CacheSchema", "l3CacheSchema"),
        ("AdditionalGids", "additionalGids"),
        ("destination", "destination"),
    ],
)
def test_names(wire: str, config: str) -> None:
    assert json_name(wire) == config


def test_a_spec_from_the_wire_is_understood() -> None:
    spec = Spec.from_json(spec_to_json(default_spec("/rootfs", ["sh", "-c", "true"], env=["A=b"], hostname="h")))
    assert spec.oci_version == "1.2.0"
    assert spec.root is not None
    assert (spec.root.path, spec.root.readonly, spec.hostname) == ("/rootfs", True, "h")
    assert spec.process is not None
    assert spec.process.args == ("sh", "-c", "true")
    assert "A=b" in spec.process.env
    assert spec.process.no_new_privileges
    assert spec.process.capabilities is not None
    assert "CAP_KILL" in spec.process.capabilities.bounding
    assert spec.process.capabilities.inheritable == ()
    assert {namespace.type for namespace in spec.linux.namespaces} == {"mount", "ipc", "uts", "cgroup"}
    assert any(mount.destination == "/proc" and "nosuid" in mount.options for mount in spec.mounts)


def test_device_numbers_of_zero_are_numbers_and_all_devices_have_none() -> None:
    rules = [
        oci_pb2.LinuxDeviceCgroup(Allow=False, Type="a", Access="rwm"),
        oci_pb2.LinuxDeviceCgroup(Allow=True, Type="b", Major=0, Minor=0, Access="r"),
        oci_pb2.LinuxDeviceCgroup(Allow=True, Type="c", Major=-1, Minor=-1, Access="m"),
    ]
    wire = oci_pb2.Spec(Linux=oci_pb2.Linux(Resources=oci_pb2.LinuxResources(Devices=rules)))
    resources = Spec.from_json(spec_to_json(wire)).linux.resources
    assert resources is not None
    numbers = [(rule.allow, rule.type, rule.major, rule.minor) for rule in resources.devices]
    assert numbers == [(False, "a", None, None), (True, "b", 0, 0), (True, "c", None, None)]


def test_root_may_be_mapped() -> None:
    mapping = oci_pb2.LinuxIDMapping(ContainerID=0, HostID=0, Size=10)
    wire = oci_pb2.Spec(Linux=oci_pb2.Linux(UIDMappings=[mapping]))
    (parsed,) = Spec.from_json(spec_to_json(wire)).linux.uid_mappings
    assert (parsed.container_id, parsed.host_id, parsed.size) == (0, 0, 10)


def test_unsupported_fields_are_rejected_by_name() -> None:
    wire = oci_pb2.Spec(Linux=oci_pb2.Linux(IntelRdt=oci_pb2.LinuxIntelRdt(L3CacheSchema="x")))
    with pytest.raises(SpecError, match=r"linux\.intelRdt"):
        Spec.from_json(spec_to_json(wire))


def test_a_profile_of_system_calls() -> None:
    masked = oci_pb2.LinuxSeccompArg(Index=1, Value=0xF0, ValueTwo=0x10, Op="SCMP_CMP_MASKED_EQ")
    rule = oci_pb2.LinuxSyscall(Names=["clone"], Action="SCMP_ACT_ALLOW", Args=[masked])
    wire = oci_pb2.LinuxSeccomp(DefaultAction="SCMP_ACT_ERRNO", Architectures=["SCMP_ARCH_X86"], Syscalls=[rule])
    parsed = Spec.from_json(spec_to_json(oci_pb2.Spec(Linux=oci_pb2.Linux(Seccomp=wire)))).linux.seccomp
    condition = Condition(1, MASKED_EQ, value=0x10, mask=0xF0)
    assert parsed == Seccomp(ERRNO | 1, ("SCMP_ARCH_X86",), SPEC_ALLOW, (Rule(("clone",), ALLOW, (condition,)),))


def test_an_exec_takes_what_kata_takes() -> None:
    wire = oci_pb2.Process(
        Args=["x"],
        Cwd="/tmp",
        Terminal=True,
        User=oci_pb2.User(UID=5, GID=6, AdditionalGids=[7]),
        Capabilities=oci_pb2.LinuxCapabilities(Bounding=["CAP_SYS_ADMIN"]),
        NoNewPrivileges=True,
    )
    process = Process.from_json(exec_to_json(wire, AgentService.EXEC_FIELDS))
    assert (process.args, process.cwd, process.terminal) == (("x",), "/tmp", True)
    assert (process.user.uid, process.user.gid, process.user.additional_gids) == (5, 6, (7,))
    assert process.capabilities is None  # the container's own apply
    assert not process.no_new_privileges
