"""Test the containerd shim without containerd: its command line, and configurations rewritten for the guest."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from google.protobuf import any_pb2

from caisson.agent.pods.guest import MAX_WAITS, until_plugged
from caisson.agent.pods.machines import MachineError
from caisson.agent.pods.network import NetworkError, links
from caisson.agent.rpc.codes import StatusCode
from caisson.agent.rpc.ttrpc.responses import RpcError
from caisson.agent.shim import spec as shim_spec
from caisson.agent.shim.dns import rewritten
from caisson.agent.shim.errors import ShimError, status_of
from caisson.agent.shim.events import Publisher
from caisson.agent.shim.host import OVERHEAD, size_of
from caisson.agent.shim.launch import RUNTIME_OPTIONS, Arguments, _bootstrap_id, group_of, socket_path
from caisson.agent.shim.options import RuntimeOptions, shim_cgroup
from caisson.agent.shim.spec import UnsupportedSpec, fill_known, guest_spec, network_namespace
from caisson.agent.shim.stats import UNLIMITED, metrics
from caisson.agent.shim.task import TaskService
from caisson.commands import machines, pods
from caisson.commands.shim import FEATURES_URL, main
from caisson.proto.containerd import bootstrap_pb2, linux_runc_options_pb2, options_pb2, runc_options_pb2, types_pb2
from caisson.proto.contract import GUEST_SHARED, GUEST_SHM
from caisson.proto.from_json import FieldError
from caisson.proto.kata3 import agent_pb2, oci_pb2
from tests.support.poll import until

NAMESPACES = [{"type": kind} for kind in ("mount", "network", "uts", "pid", "ipc")]


def spec(**linux: Any) -> dict[str, Any]:
    return {
        "process": {"args": ["sh"], "apparmorProfile": "docker-default"},
        "root": {"path": "/var/lib/x/merged"},
        "hooks": {"prestart": [{"path": "/proc/1/exe"}]},
        "linux": {"namespaces": NAMESPACES} | linux,
    }


@pytest.mark.parametrize("words", [["-id", "c", "-namespace", "n"], ["--id=c", "-namespace=n"]])
def test_arguments_take_both_of_gos_forms(words: list[str]) -> None:
    arguments = Arguments([*words, "-debug", "start"], {})
    assert (arguments.id, arguments.namespace, arguments.debug, arguments.action) == ("c", "n", True, "start")


@pytest.mark.parametrize("words", [["-id"], ["-nonsense", "x", "start"]])
def test_arguments_reject_what_is_not_known(words: list[str]) -> None:
    with pytest.raises(ValueError, match=r"needs a value|unknown flag"):
        Arguments(words, {})


def test_the_environment_names_the_namespace_where_the_command_line_does_not() -> None:
    assert Arguments(["start"], {"NAMESPACE": "k8s.io", "GRPC_ADDRESS": "/a"}).namespace == "k8s.io"


def test_containers_of_a_pod_share_a_socket(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"annotations": {"io.kubernetes.cri.sandbox-id": "pod"}}))
    assert group_of(str(tmp_path)) == "pod"
    arguments = Arguments(["-address", "/run/containerd/containerd.sock", "-namespace", "k8s.io", "start"], {})
    path = socket_path(arguments, "pod")
    assert path != socket_path(arguments, "other")
    with socket.socket(socket.AF_UNIX) as probe, pytest.raises(OSError, match=r"No such file|refused"):
        probe.connect(path)  # short enough for sockaddr_un


def test_of_runcs_options_the_shims_cgroup_is_taken() -> None:
    given = any_pb2.Any(type_url="containerd.runc.v1.Options")
    given.value = runc_options_pb2.Options(shim_cgroup="/own", binary_name="runc").SerializeToString()
    assert shim_cgroup(given) == "/own"
    assert RuntimeOptions.parse(given.SerializeToString(), "c1") is None
    ours = options_pb2.Options(config_path="/x.toml")
    given.type_url, given.value = ours.DESCRIPTOR.full_name, ours.SerializeToString()
    assert given.type_url == RUNTIME_OPTIONS
    assert RuntimeOptions.parse(given.SerializeToString(), "c1") == RuntimeOptions("/x.toml", "")
    given.type_url = "containerd.linux.runc.CreateOptions"  # from clients of containerd 1.x
    given.value = linux_runc_options_pb2.CreateOptions(shim_cgroup="/old").SerializeToString()
    assert shim_cgroup(given) == "/old"
    assert shim_cgroup(any_pb2.Any()) == ""


def test_another_program_in_the_place_of_runc_is_refused_by_name() -> None:
    given = any_pb2.Any(type_url="containerd.runc.v1.Options")
    given.value = runc_options_pb2.Options(binary_name="crun").SerializeToString()
    with pytest.raises(ShimError, match="binary_name: crun"):
        shim_cgroup(given)


def test_bootstrap_parameters_are_told_from_options() -> None:
    parameters = bootstrap_pb2.BootstrapParams(instance_id="c1", namespace="default")
    assert _bootstrap_id(parameters.SerializeToString()) == "c1"
    assert _bootstrap_id(b"") == ""


def test_the_guests_spec_has_nothing_of_the_host() -> None:
    limits = {"cpu": {"cpus": "0-3", "shares": 5}, "memory": {"limit": 7, "swappiness": 0, "disableOOMKiller": True}}
    made = guest_spec(spec(mountLabel="x", resources=limits), "c1").document
    assert made["root"] == {"path": f"{GUEST_SHARED}/c1/rootfs", "readonly": False}
    assert "hooks" not in made and "apparmorProfile" not in made["process"]
    assert [one["type"] for one in made["linux"]["namespaces"]] == ["mount", "ipc", "uts"]
    assert made["linux"]["resources"] == {"cpu": {"shares": 5}, "memory": {"limit": 7}}
    assert "mountLabel" not in made["linux"]


def test_bind_mounts_become_volumes_of_the_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hosts").touch()
    monkeypatch.setattr(shim_spec, "mounts", lambda: [("/run/somewhere", "tmpfs", "shm", "rw")])
    document = spec()
    document["mounts"] = [
        {"destination": "/etc/hosts", "type": "bind", "source": str(tmp_path / "hosts"), "options": ["rbind", "ro"]},
        {"destination": "/dev/shm", "type": "bind", "source": "/run/somewhere", "options": ["rbind"]},
        {"destination": "/proc", "type": "proc", "source": "proc"},
    ]
    made = guest_spec(document, "c1")
    assert [(one.source, one.name) for one in made.volumes] == [(str(tmp_path / "hosts"), "volume0")]
    sources = [mount["source"] for mount in made.document["mounts"]]
    assert sources == [f"{GUEST_SHARED}/c1/volume0", GUEST_SHM, "proc"]
    assert document["mounts"][0]["source"] == str(tmp_path / "hosts"), "the host's own must be unchanged"
    document["mounts"][1]["source"] = str(tmp_path)  # a volume at the place of the shared memory
    assert [one.destination for one in guest_spec(document, "c1").volumes] == ["/etc/hosts", "/dev/shm"]


@pytest.mark.parametrize(
    ("options", "below"),
    [
        (["rbind", "ro"], [["bind"]]),
        (["rbind", "rro"], [["bind", "rro"]]),
        (["bind", "ro"], []),
        (["rbind", "rslave", "ro"], []),
    ],
    ids=["writable", "read-only", "none", "those that come later, too"],
)
def test_mounts_below_a_read_only_volume_are_volumes_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], below: list[list[str]]
) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    monkeypatch.setattr(
        "caisson.agent.shim.spec.mount_points",
        lambda top: [top] + [f"{top}/{place}" for place in ("a/b", "socket") if top == str(tmp_path)],
    )
    document = spec()
    document["mounts"] = [{"destination": "/data", "type": "bind", "source": str(tmp_path), "options": options}]
    made = guest_spec(document, "c1")
    assert [one.source for one in made.volumes] == [str(tmp_path), str(tmp_path / "a/b")][: 1 + len(below)]
    assert [one.recursive for one in made.volumes] == ([False] * 2 if below else ["rbind" in options])
    place = {"destination": "/data/a/b", "type": "bind", "source": f"{GUEST_SHARED}/c1/volume1"}
    assert made.document["mounts"][1:] == [{**place, "options": options} for options in below]


def test_info_says_what_holds_in_a_guest(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    with mock.patch.object(sys, "argv", ["containerd-shim-caisson-v2", "-info"]):
        assert main() == 0
    info = types_pb2.RuntimeInfo.FromString(capfdbinary.readouterr().out)
    features = json.loads(info.features.value)
    assert info.features.type_url == FEATURES_URL and "rro" in features["mountOptions"]
    assert "user" not in features["linux"]["namespaces"] and "idmap" not in features["mountOptions"]


@pytest.mark.parametrize(("text", "mounts"), [("block_roots = true", "erofs,format/*,mkdir/*"), ("", ""), ("=", "")])
def test_info_claims_mounts_of_image_files_if_roots_are_to_be_disks(
    capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, mounts: str
) -> None:
    (tmp_path / "shim.toml").write_text(text)
    monkeypatch.setattr(pods, "CONFIGURATION", tmp_path / "shim.toml")
    monkeypatch.setattr(sys, "argv", ["containerd-shim-caisson-v2", "-info"])
    assert main() == 0
    info = types_pb2.RuntimeInfo.FromString(capfdbinary.readouterr().out)
    assert info.annotations.get("containerd.io/runtime-allow-mounts", "") == mounts


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"namespaces": [{"type": "pid"}, {"type": "ipc"}]}, "network"),
        ({"namespaces": [{"type": "network"}, {"type": "ipc"}]}, "pid"),
        ({"namespaces": [*NAMESPACES, {"type": "user"}]}, "user"),
        ({"devices": [{"path": "/dev/kvm"}]}, "/dev/kvm"),
    ],
)
def test_what_no_guest_has_is_refused_by_name(change: dict[str, Any], field: str) -> None:
    with pytest.raises(UnsupportedSpec, match=field):
        guest_spec(spec(**change), "c1")


@pytest.mark.parametrize("kind", ["network", "ipc", "pid"])
def test_another_containers_namespace_is_joined_in_a_pod_only(kind: str) -> None:
    others = [one for one in NAMESPACES if one["type"] != kind]
    document = spec(namespaces=[*others, {"type": kind, "path": f"/proc/7/ns/{kind}"}])
    with pytest.raises(UnsupportedSpec, match=f"{kind}: another container's namespace"):
        guest_spec(document, "c1")
    guest_spec(document | {"annotations": {"io.kubernetes.cri.sandbox-id": "p1"}}, "c1")


def test_dockers_name_server_has_another_address_in_the_guest() -> None:
    text = "# 127.0.0.11\nnameserver 127.0.0.11\nnameserver\t127.0.0.11\nnameserver 127.0.0.110\noptions ndots:0"
    changed = "# 127.0.0.11\nnameserver 169.254.0.11\nnameserver\t169.254.0.11\nnameserver 127.0.0.110\noptions ndots:0"
    assert rewritten(text) == changed


def test_devices_that_every_kernel_has_are_the_guests_own() -> None:
    bind = {"type": "bind", "destination": "/etc/masked", "options": ["rbind", "ro", "rprivate", "rslave"]}
    made = guest_spec(spec() | {"mounts": [{**bind, "source": "/dev/null"}]}, "c1")
    assert not made.volumes
    assert made.document["mounts"] == [{**bind, "source": "/dev/null", "options": ["rbind", "ro", "rprivate"]}]
    with pytest.raises(UnsupportedSpec, match="a device of the host cannot be shared"):
        guest_spec(spec() | {"mounts": [{**bind, "source": "/dev/tty"}]}, "c1")


def test_the_hosts_cgroups_are_the_containers_own() -> None:
    bind = {"type": "bind", "source": "/sys/fs/cgroup", "destination": "/sys/fs/cgroup", "options": ["rbind", "ro"]}
    made = guest_spec(spec() | {"mounts": [bind]}, "c1")
    assert made.document["mounts"] == [{**bind, "type": "cgroup", "source": "cgroup", "options": ["ro"]}]
    assert not made.volumes


def test_a_socket_of_the_host_is_no_volume(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "docker.sock"))
        document = spec() | {"mounts": [{"type": "bind", "source": str(tmp_path / "docker.sock"), "destination": "/s"}]}
        with pytest.raises(UnsupportedSpec, match="a socket of the host cannot be shared"):
            guest_spec(document, "c1")


def test_a_pods_network_namespace_is_found() -> None:
    joined = {"linux": {"namespaces": [{"type": "network", "path": "/var/run/netns/cni-1"}]}}
    assert network_namespace(joined) == "/var/run/netns/cni-1"
    assert network_namespace(spec()) == ""


def test_the_hosts_own_network_is_not_taken() -> None:
    with pytest.raises(NetworkError, match="is the host's; a pod needs one of its own"):
        links("/proc/self/ns/net")
    with pytest.raises(NetworkError, match=r"/nowhere: No such file"):
        links("/nowhere")


def test_a_vm_is_sized_by_limits() -> None:
    limited = spec(resources={"memory": {"limit": 256 << 20}, "cpu": {"quota": 250_000, "period": 100_000}})
    assert size_of(limited) == (256 + OVERHEAD, 3)
    assert size_of(spec()) == (0, 0)
    assert size_of(spec() | {"annotations": {"io.kubernetes.cri.sandbox-memory": str(64 << 20)}}) == (64 + OVERHEAD, 0)


def test_fill_takes_json_names_and_ignores_unknown_ones() -> None:
    message = oci_pb2.Spec()
    fill_known(
        message, {"ociVersion": "1.2.0", "process": {"noNewPrivileges": True, "args": ["a"]}, "of-tomorrow": {"x": 1}}
    )
    assert message.Version == "1.2.0" and message.Process.NoNewPrivileges and list(message.Process.Args) == ["a"]
    for wrong in (5, "sh", [5]):
        with pytest.raises(FieldError, match=r"^process\.args") as raised:
            fill_known(oci_pb2.Spec(), {"process": {"args": wrong}})
        assert status_of(raised.value) == (StatusCode.INVALID_ARGUMENT, str(raised.value))


@pytest.mark.parametrize(
    ("codes", "calls"),
    [
        ([StatusCode.DEADLINE_EXCEEDED, StatusCode.OK], 2),
        ([StatusCode.INTERNAL], 1),
        ([StatusCode.DEADLINE_EXCEEDED] * MAX_WAITS, MAX_WAITS),
    ],
)
async def test_a_device_that_is_late_is_asked_for_again(codes: list[StatusCode], calls: int) -> None:
    left = iter(codes)
    asked = []

    async def method(request: str, timeout: float) -> None:
        asked.append(request)
        if (code := next(left)) is not StatusCode.OK:
            raise RpcError(code, "late")

    if codes[-1] is StatusCode.OK:
        await until_plugged(method, "request")
    else:
        with pytest.raises(RpcError, match="late"):
            await until_plugged(method, "request")
    assert asked == ["request"] * calls


async def test_the_guest_is_asked_for_events_no_faster_than_containerd_takes_them() -> None:
    asked = 0

    async def next_event(request: object) -> agent_pb2.OOMEvent:
        nonlocal asked
        asked += 1
        await asyncio.sleep(0)
        return agent_pb2.OOMEvent(container_id="c")

    pod: Any = mock.Mock(rpc=mock.Mock(GetOOMEvent=next_event))
    publisher = Publisher("", "k8s.io", mock.Mock())
    service = TaskService(mock.Mock(), publisher, mock.Mock(), mock.Mock())
    service._containers["c"] = mock.Mock()
    tasks = [asyncio.ensure_future(service._watch_oom(pod))]
    await asyncio.sleep(0.05)
    assert asked == 1
    tasks.append(asyncio.ensure_future(publisher.run()))
    await until(lambda: asked > 10, "events are forwarded")
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.parametrize(
    ("config", "why"), [("/proc/nosuch/shim.toml", "choose another place"), ("/proc/version", "cannot be written")]
)
def test_install_shim_finds_out_before_it_builds_that_its_configuration_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch, config: str, why: str
) -> None:
    monkeypatch.setattr(machines, "image_directory", pytest.fail)
    with pytest.raises(Exception, match=why):
        pods.install_shim(image="", memory=512, cpus=1, config=config, accel="auto", vsock="auto")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("memroy = 1", "memroy: unknown setting; the settings are snapshot, image, memory, cpus, accel, vsock"),
        ("memory = '1G'", "memory: not a whole number; memory is in MiB"),
        ("cpus = true", "cpus: not a whole number"),
        ("image = 7", "image: not a string"),
        ("block_roots = 1", "block_roots: not true or false"),
        ("memory =", "Invalid value"),
        ("", "names no image; run: caisson install-shim"),
    ],
)
def test_a_configuration_that_is_wrong_is_refused_by_its_setting(tmp_path: Path, text: str, why: str) -> None:
    file = tmp_path / "shim.toml"
    file.write_text(text)
    for configured in (pods.Pods(configuration=file), pods.Pods.from_config("", text)):
        with pytest.raises(MachineError, match=re.escape(why)):
            configured.start("pod", memory=64, cpus=1)


def test_a_configuration_that_is_not_there_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match=r"shim\.toml: no such file; run: caisson install-shim"):
        pods.Pods(configuration=tmp_path / "shim.toml").start("pod", memory=64, cpus=1)


@pytest.mark.parametrize(
    ("agents", "containerds"),
    [
        ((100, 500, 130, 600), (30, 100)),
        ((100, 500, 100, UNLIMITED), (0, UNLIMITED)),
        ((100, UNLIMITED, 99, UNLIMITED), (0, UNLIMITED)),  # read at two moments
    ],
)
def test_swap_is_counted_without_memory(agents: tuple[int, ...], containerds: tuple[int, int]) -> None:
    """As containerd's metrics have it; the agent's, like those of cgroup v1, count both together."""
    stats = agent_pb2.StatsContainerResponse()
    memory = stats.cgroup_stats.memory_stats
    memory.usage.usage, memory.usage.limit, memory.swap_usage.usage, memory.swap_usage.limit = agents
    made = metrics(stats).memory
    assert (made.usage, made.usage_limit) == agents[:2]
    assert (made.swap_usage, made.swap_limit) == containerds
