"""Test moving network devices into a container, with their addresses."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import pytest

from caisson.agent.libcontainer.config.reader import SpecError
from caisson.agent.libcontainer.errors import LaunchError
from tests.native.nsexec_support import Box, config

pytestmark = pytest.mark.root


@pytest.fixture
def device() -> Iterator[str]:
    """Create a network device of our own, with addresses of all kinds."""
    name = f"c{uuid4().hex[:10]}"
    peer = f"{name}p"
    commands = (
        ["link", "add", name, "type", "veth", "peer", "name", peer],
        ["link", "set", peer, "up"],
        ["link", "set", name, "mtu", "1789"],
        ["addr", "add", "192.0.2.7/25", "dev", name],
        ["addr", "add", "2001:db8::7/64", "dev", name, "nodad"],
        ["addr", "add", "169.254.7.7/16", "scope", "link", "dev", name],
    )
    for words in commands:
        subprocess.run(["ip", *words], check=True)
    yield name
    subprocess.run(["ip", "link", "del", peer], capture_output=True)  # already gone if the peer's namespace is


def with_devices(**devices: Any) -> dict[str, Any]:
    value = config()
    value["linux"]["netDevices"] = devices
    value["process"]["capabilities"]["effective"] = value["process"]["capabilities"]["permitted"] = []
    return value


@pytest.mark.parametrize("name", ["", "inside0"])
@pytest.mark.parametrize("userns", [False, True])
def test_a_device_is_moved_with_its_addresses(box: Box, device: str, name: str, userns: bool) -> None:
    value = with_devices(**{device: {"name": name} if name else {}})
    if userns:
        maps = [{"containerID": 0, "hostID": 100_000, "size": 65_536}]
        value["linux"] |= {"uidMappings": maps, "gidMappings": maps}
        value["linux"]["namespaces"].append({"type": "user"})
    out = box.sh(f"ip -o addr show dev {name or device}; ip -o link show dev {name or device}", value)
    assert "inet 192.0.2.7/25" in out and "inet6 2001:db8::7/64 scope global" in out
    assert "169.254.7.7" not in out
    assert "mtu 1789" in out and "UP" in out.splitlines()[-1]
    assert subprocess.run(["ip", "link", "show", device], capture_output=True).returncode != 0


def test_it_stays_in_a_namespace_that_was_there_before(box: Box, device: str) -> None:
    async def work() -> tuple[str, str]:
        other = await box.running()
        value = with_devices(**{device: {"name": "inside0"}})
        value["process"]["args"] = ["ip", "addr", "show", "dev", "inside0"]
        value["mounts"] = [mount for mount in value["mounts"] if mount["destination"] != "/sys"]
        value["linux"]["namespaces"] = [one for one in value["linux"]["namespaces"] if one["type"] != "network"]
        value["linux"]["namespaces"].append({"type": "network", "path": f"/proc/{other.child.pid}/ns/net"})
        box.fifo = box.path / "second.fifo"
        status, out, err = await box.output(value)
        assert (status, err) == (0, "")
        return out, (await box.exec(other, {"args": ["ip", "addr", "show", "dev", "inside0"]}))[1]

    for out in box.run(work()):
        assert "inet 192.0.2.7/25" in out and "mtu 1789" in out


def test_hooks_of_the_runtime_see_it_moved(box: Box, device: str) -> None:
    value = with_devices(**{device: {"name": "inside0"}})
    script = f"ip link show {device} >{box.path}/before 2>&1; true"
    value["hooks"] = {
        "createRuntime": [
            {"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/usr/sbin:/sbin:/usr/bin:/bin"]}
        ]
    }
    assert "inside0" in box.sh("ls /sys/class/net", value)
    assert "does not exist" in (box.path / "before").read_text()


async def test_a_device_that_is_not_there(box: Box) -> None:
    with pytest.raises(LaunchError, match="network device no-such0: no such device"):
        await box.output(with_devices(**{"no-such0": {}}))


async def test_a_name_that_is_taken_inside(box: Box, device: str) -> None:
    with pytest.raises(LaunchError, match=f"network device {device}: file exists"):
        await box.output(with_devices(**{device: {"name": "lo"}}))


@pytest.mark.parametrize(
    ("devices", "why"),
    [
        ({"a/b": {}}, "invalid network device name"),
        ({"eth0": {"name": "a" * 16}}, "invalid network device name"),
        ({"eth0": {"name": "x"}, "eth1": {"name": "x"}}, "gives two devices one name"),
        ({"eth0": {"mtu": 1}}, r"eth0\.mtu"),
    ],
)
async def test_names_that_are_not_valid(box: Box, devices: dict[str, Any], why: str) -> None:
    with pytest.raises(SpecError, match=rf"linux\.netDevices.*{why}"):
        await box.output(with_devices(**devices))


async def test_a_network_namespace_is_needed(box: Box) -> None:
    value = with_devices(eth0={})
    value["linux"]["namespaces"] = [one for one in value["linux"]["namespaces"] if one["type"] != "network"]
    value["mounts"] = [one for one in value["mounts"] if one["destination"] != "/sys"]
    with pytest.raises((SpecError, LaunchError), match="without a NET namespace"):
        await box.output(value)
