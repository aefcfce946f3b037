"""Test the guest itself as used by a Kata 3.x host: files, volumes, metrics, network."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
from typing import Any

import pytest

from caisson.agent.rpc.codes import StatusCode
from caisson.proto.kata3 import agent_pb2, csi_pb2, types_pb2
from tests.native.agent_support import RunningAgent
from tests.native.kata3_support import SHARED, Host, apart, inside, refused

__all__ = ["apart"]

pytestmark = pytest.mark.root
MAC = "02:00:00:00:00:0a"


def ip(agent: RunningAgent, *words: str) -> Any:
    """Return the output of ip(8) in the agent's namespace."""
    command = ["nsenter", f"--net=/proc/{agent.pid}/ns/net", "ip", "-json", *words]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(out) if out.strip() else []


async def test_a_tree_is_copied_with_links_owners_and_modes(apart: RunningAgent) -> None:
    place = f"{SHARED}/volume"

    async with await Host.connect(apart) as host:

        async def copy(name: str, mode: int, data: bytes = b"", **fields: Any) -> None:
            size = fields.pop("file_size", len(data) if stat.S_ISREG(mode) else 0)
            request = agent_pb2.CopyFileRequest(
                path=f"{place}{name}", file_mode=mode, dir_mode=0o750, uid=7, gid=8, data=data, file_size=size,
                **fields,
            )  # fmt: skip
            await host.rpc.CopyFile(request)

        await copy("", 0o042770)
        await copy("/..2026", 0o040755)
        await copy("/..2026/key", 0o100640, b"one")
        await copy("/..data", 0o120777, b"..2026")
        await copy("/key", 0o120777, b"..data/key")
        await copy("/empty", 0o100600)
        root = inside(apart, place)
        assert (root / "key").read_text() == "one"
        status = root.stat()
        assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid) == (0o2770, 7, 8)
        assert (root / "..data").lstat().st_uid == 7
        assert (root / "empty").stat().st_size == 0
        # A change: different contents beside it, and the link replaced.
        await copy("/..2027/key", 0o104755, b"tw", file_size=3)
        await copy("/..2027/key", 0o104755, b"o", file_size=3, offset=2)
        await copy("/..data", 0o120777, b"..2027")
        assert (root / "key").read_text() == "two"
        assert stat.S_IMODE((root / "key").stat().st_mode) == 0o4755
        assert (root / "..2027").stat().st_gid == 8
        await copy("/..2026", 0o100600, b"a file in place of a directory")
        assert (root / "..2026").is_file()
        await copy("/..2026", 0o040700)
        assert (root / "..2026").is_dir()
        assert sorted(path.name for path in root.iterdir()) == ["..2026", "..2027", "..data", "empty", "key"]


@pytest.mark.parametrize(
    ("path", "mode"),
    [
        ("/run/kata-containers/x", 0o100644),
        ("/etc/passwd", 0o100644),
        (f"{SHARED}/../../x", 0o120777),
        (f"{SHARED}/link/x", 0o100644),
        (f"{SHARED}/link/x", 0o040755),
        (f"{SHARED}/x", 0o060644),
    ],
)
async def test_a_file_goes_nowhere_else(apart: RunningAgent, path: str, mode: int) -> None:
    async with await Host.connect(apart) as host:
        link = agent_pb2.CopyFileRequest(path=f"{SHARED}/link", file_mode=0o120777, data=b"/run/kata-containers")
        await host.rpc.CopyFile(link)
        await refused(host.rpc.CopyFile(agent_pb2.CopyFileRequest(path=path, file_mode=mode)))
        assert [path.name for path in inside(apart, "/run/kata-containers").iterdir()] == ["shared"]


async def test_how_full_a_volume_is(apart: RunningAgent) -> None:
    async with await Host.connect(apart) as host:
        ask = agent_pb2.VolumeStatsRequest(volume_guest_path="/run/kata-containers")
        answer = await host.rpc.GetVolumeStats(ask)
        size, inodes = answer.usage
        assert (size.unit, inodes.unit) == (csi_pb2.VolumeUsage.BYTES, csi_pb2.VolumeUsage.INODES)
        assert size.total == size.used + size.available > 0
        assert (answer.volume_condition.abnormal, answer.volume_condition.message) == (False, "OK")
        ask.volume_guest_path = "/no/such"
        assert (await refused(host.rpc.GetVolumeStats(ask)))[0] == StatusCode.INTERNAL
        await host.rpc.RemoveStaleVirtiofsShareMounts(agent_pb2.RemoveStaleVirtiofsShareMountsRequest())


async def test_metrics_are_prometheus_text(apart: RunningAgent) -> None:
    async with await Host.connect(apart) as host:
        for scrape in (1, 2):
            text = (await host.rpc.GetMetrics(agent_pb2.GetMetricsRequest())).metrics
            assert f"\nkata_agent_scrape_count {scrape}\n" in text
        sample = re.compile(r'(# (HELP|TYPE) \w+ .+|kata_\w+(\{(\w+="[^"]*",?)+\})? -?[0-9.e+]+)')
        assert [line for line in text.splitlines() if not sample.fullmatch(line)] == []
        for name in (
            'kata_guest_meminfo{item="mem_total"}',
            'kata_guest_meminfo{item="s_reclaimable"}',
            'kata_guest_cpu_time{cpu="total",item="user"}',
            'kata_guest_netdev_stat{interface="lo",item="recv_bytes"}',
            'kata_guest_load{item="load1"}',
            'kata_agent_proc_status{item="vmrss"}',
            "kata_agent_total_rss",
        ):
            assert f"\n{name} " in text, name


@pytest.mark.parametrize("path", ["", "relative", "/etc/passwd", "/dev/null", "/dev/no-such"])
async def test_swap_goes_to_block_devices_alone(apart: RunningAgent, path: str) -> None:
    async with await Host.connect(apart) as host:
        await refused(host.rpc.AddSwapPath(agent_pb2.AddSwapPathRequest(path=path)))
        code, text = await refused(host.rpc.AddSwap(agent_pb2.AddSwapRequest(PCIPath=[31, 1])))
        assert (code, "1f/01" in text) == (StatusCode.DEADLINE_EXCEEDED, True)


async def test_addresses_and_routes_are_added_to_what_is_there(apart: RunningAgent) -> None:
    ip(apart, "link", "add", "plugged", "address", MAC, "type", "veth", "peer", "name", "other")
    ip(apart, "link", "set", "other", "up")

    def interface(*addresses: str) -> Any:
        pairs = [address.split("/") for address in addresses]
        return agent_pb2.UpdateInterfaceRequest(
            interface=types_pb2.Interface(
                name="eth7",
                hwAddr=MAC,
                mtu=1400,
                IPAddresses=[types_pb2.IPAddress(address=address, mask=mask) for address, mask in pairs],
            )
        )

    async with await Host.connect(apart) as host:
        assert (await host.rpc.UpdateInterface(interface("192.0.2.10/24"))).name == "eth7"
        await host.rpc.UpdateInterface(interface("192.0.2.10/24", "198.51.100.1/24"))
        shown = ip(apart, "address", "show", "dev", "eth7")[0]["addr_info"]
        assert {one["local"] for one in shown} >= {"192.0.2.10", "198.51.100.1"}

        def routes(*given: dict[str, Any]) -> Any:
            wanted = [types_pb2.Route(**{"device": "eth7", **one}) for one in given]
            return agent_pb2.UpdateRoutesRequest(routes=agent_pb2.Routes(Routes=wanted))

        await host.rpc.UpdateRoutes(routes({"dest": "203.0.113.0/24", "gateway": "192.0.2.1", "mtu": 1300}))
        answer = await host.rpc.UpdateRoutes(routes({"gateway": "192.0.2.1"}))
        found = {(one.dest, one.gateway) for one in answer.Routes if one.gateway}
        assert found == {("203.0.113.0/24", "192.0.2.1"), ("0.0.0.0", "192.0.2.1")}
        await host.rpc.UpdateRoutes(routes({"dest": "203.0.113.0/24", "gateway": "192.0.2.2"}))  # replaced
        shown = ip(apart, "route", "show", "203.0.113.0/24")
        assert [one["gateway"] for one in shown] == ["192.0.2.2"]

        neighbour = types_pb2.ARPNeighbor(
            toIPAddress=types_pb2.IPAddress(address="192.0.2.1"), device="eth7", lladdr="02:00:00:00:00:01"
        )
        request = agent_pb2.AddARPNeighborsRequest(neighbors=agent_pb2.ARPNeighbors(ARPNeighbors=[neighbour]))
        for _ in range(2):
            await host.rpc.AddARPNeighbors(request)

        missing = interface("192.0.2.10/24")
        missing.interface.hwAddr = "02:00:00:00:00:99"
        code, text = await refused(host.rpc.UpdateInterface(missing))  # hosts retry on this code
        assert (code, "Link not found" in text) == (StatusCode.INTERNAL, True)


@pytest.mark.skipif(shutil.which("iptables-save") is None, reason="this machine has no iptables")
async def test_the_packet_filter_is_saved_and_restored(apart: RunningAgent) -> None:
    async with await Host.connect(apart) as host:
        rules = b"*filter\n:INPUT ACCEPT [0:0]\n-A INPUT -p tcp --dport 81 -j DROP\nCOMMIT\n"
        await host.rpc.SetIPTables(agent_pb2.SetIPTablesRequest(data=rules))
        saved = (await host.rpc.GetIPTables(agent_pb2.GetIPTablesRequest())).data
        assert b"--dport 81 -j DROP" in saved
        code, text = await refused(host.rpc.SetIPTables(agent_pb2.SetIPTablesRequest(data=b"nonsense\n")))
        assert (code, "iptables-restore" in text) == (StatusCode.INTERNAL, True)


async def test_cpus_are_counted_in_all(apart: RunningAgent) -> None:
    async with await Host.connect(apart) as host:
        for count in (0, 1, os.cpu_count() or 1):
            await host.rpc.OnlineCPUMem(agent_pb2.OnlineCPUMemRequest(nb_cpus=count, cpu_only=True))
