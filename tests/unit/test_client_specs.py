"""What becomes of an image's wishes, of a bundle's configuration and of a rule for ports."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from caisson.agent.client import AgentError, UsageError, foreground
from caisson.agent.client.console import console_port
from caisson.agent.client.forward import Rule
from caisson.agent.client.specs import spec_from_bundle, writable_spec

#: What `runc spec` writes, shortened.
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
        "oomScoreAdj": -5,
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
    """The bundle with one field changed, by its names with dots between."""
    document: dict[str, Any] = json.loads(json.dumps(BUNDLE))
    *above, name = path.split(".")
    place = document
    for part in above:
        place = place[part]
    place[name] = value
    return document


def test_a_bundle() -> None:
    spec = spec_from_bundle(BUNDLE)
    assert spec.Version == "1.0.2-dev" and spec.Hostname == "runc" and spec.Annotations == {"a": "b"}
    assert list(spec.Process.Args) == ["sh"] and spec.Process.Terminal and spec.Process.ConsoleSize.Width == 80
    assert (spec.Process.User.UID, spec.Process.User.GID, list(spec.Process.User.AdditionalGids)) == (1, 2, [3, 4])
    assert spec.Process.Rlimits[0].Soft == 512 and spec.Process.OOMScoreAdj == -5
    assert list(spec.Process.Capabilities.Bounding) == ["CAP_KILL"]
    assert spec.Linux.Resources.Memory.Limit == 1 << 30 and spec.Linux.Resources.HugepageLimits[0].Pagesize == "2MB"
    assert spec.Linux.UIDMappings[0].HostID == 1000 and spec.Linux.Sysctl == {"net.ipv4.ip_forward": "1"}
    assert list(spec.Linux.MaskedPaths) == ["/proc/kcore"] and spec.Mounts[0].options == ["nosuid"]
    # What a guest decides itself.
    assert [one.Type for one in spec.Linux.Namespaces] == ["ipc"] and spec.Linux.CgroupsPath == ""


@pytest.mark.parametrize(
    ("path", "value", "why"),
    [
        ("process.args", [], "process.args: empty; name a program"),
        ("process.args", "sh", "process.args must be a list"),
        ("linux.sysctl", [], "linux.sysctl must be an object"),
        ("process.args", [1], "process.args"),
        ("process.scheduler", {"policy": "SCHED_OTHER"}, r"process\.scheduler: not supported in a guest"),
        ("linux.intelRdt", [], r"linux\.intelRdt must be an object"),
        ("linux.resources.unified", {"memory.high": "1"}, r"linux\.resources\.unified: not supported"),
        (
            "mounts",
            [{"destination": "/x", "source": "/y", "type": "bind"}],
            r"mounts\[0\]: bind source /y is a path of the host",
        ),
        (
            "mounts",
            [{"destination": "/x", "source": "/y", "options": ["rbind"]}],
            r"mounts\[0\]: bind source /y is a path of the host",
        ),
        ("process.user.uid", -1, r"process\.user\.uid"),
        ("process", 5, "process must be an object"),
        ("annotations", {"a": 1}, "annotations"),
    ],
)
def test_bundle_rejects_settings_that_are_the_guests(path: str, value: object, why: str) -> None:
    with pytest.raises(UsageError, match=f"config.json: {why}"):
        spec_from_bundle(changed(path, value))


def test_an_images_wishes() -> None:
    spec = writable_spec(["/x", "y"], env=["A=1", "PATH=/opt", "A=2=3"], user="web:logs", cwd="/srv", terminal=True)
    assert list(spec.Process.Args) == ["/x", "y"] and spec.Process.Cwd == "/srv" and spec.Process.Terminal
    assert sorted(spec.Process.Env) == ["A=2=3", "PATH=/opt"]
    assert spec.Process.User.Username == "web:logs"
    assert not spec.Root.Readonly and not spec.Process.NoNewPrivileges
    assert all(mount.destination not in ("/tmp", "/home") for mount in spec.Mounts)
    assert writable_spec(["/x"]).Process.User.Username == "0"
    assert any(setting.startswith("PATH=") for setting in writable_spec(["/x"]).Process.Env)


class SlowGuest:
    """Its disk shows up at the third time that it is asked for."""

    def __init__(self, code: grpc.StatusCode = grpc.StatusCode.DEADLINE_EXCEEDED) -> None:
        self.requests: list[Any] = []
        self._code = code
        self.rpc = SimpleNamespace(CreateContainer=self.create)

    async def create(self, request: Any) -> None:
        self.requests.append(request)
        if len(self.requests) < 3:
            raise AgentError(self._code, "Timeout reached after 3s waiting for device 10/00")

    async def create_sandbox(self) -> bool:
        return True

    def container(self, container_id: str) -> str:
        return container_id


def test_a_disk_is_waited_for() -> None:
    guest: Any = SlowGuest()
    spec = writable_spec(["/x"])
    container: Any = asyncio.run(foreground.create_on_disk(guest, "web", spec, "10/00", "squashfs"))
    assert container == "web"
    request = guest.requests[-1]
    assert len(guest.requests) == 3 and request.container_id == "web"
    disk, *_, root = request.storages
    assert (disk.driver, disk.source, disk.fstype) == ("blk", "10/00", "squashfs") and "ro" in disk.options
    assert root.fstype == "overlay" and f"lowerdir={disk.mount_point}" in root.options
    assert request.OCI.Root.Path == root.mount_point


def test_another_refusal_is_told_at_once() -> None:
    guest: Any = SlowGuest(grpc.StatusCode.INVALID_ARGUMENT)
    with pytest.raises(AgentError):
        asyncio.run(foreground.create_on_disk(guest, "web", writable_spec(["/x"]), "10/00", "squashfs"))
    assert len(guest.requests) == 1


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("8080:80", Rule("127.0.0.1", 8080, "tcp", 80)),
        ("0:tcp:80", Rule("127.0.0.1", 0, "tcp", 80)),
        ("8080:vsock:4294967294", Rule("127.0.0.1", 8080, "vsock", 4294967294)),
        ("0.0.0.0:8080:80", Rule("0.0.0.0", 8080, "tcp", 80)),
        ("[::1]:8080:vsock:5000", Rule("::1", 8080, "vsock", 5000)),
    ],
)
def test_rules(text: str, rule: Rule) -> None:
    assert Rule.parse(text) == rule


@pytest.mark.parametrize(
    "text", ["", "80", ":80", "80:", "x:80", "1:udp:2", "1:2:3:4", "65536:1", "1:65536", "1:vsock:4294967295", "-1:2"]
)
def test_forward_rejects_malformed_rules(text: str) -> None:
    with pytest.raises(UsageError):
        Rule.parse(text)


def test_the_port_of_a_guests_shell() -> None:
    assert console_port(["quiet", "agent.debug_console_vport=1026"]) == 1026
    for words in ([], ["agent.debug_console_vport=0"], ["agent.log_vport=1025"]):
        with pytest.raises(UsageError, match="boot it with"):
            console_port(words)
