"""Test a pod in a booted guest, with calls in the order recorded from the Kata 3.x shim."""

from __future__ import annotations

import asyncio
import time

import pytest

from caisson.agent.rpc.ttrpc.client import Client
from caisson.agent.rpc.ttrpc.responses import RpcError
from caisson.proto.kata3 import agent_pb2, health_pb2, oci_pb2
from tests.e2e.conftest import TIMEOUT, Caisson
from tests.native.kata3_support import SHM, Host
from tests.support.poll import until

pytestmark = [pytest.mark.root, pytest.mark.vm]


async def test_a_pod_from_check_to_destroy(own: Caisson) -> None:
    booted = await asyncio.to_thread(own, "boot-vm", "kata", "--detach")
    assert booted.returncode == 0, booted.stderr.decode()
    rootfs = own.manifest("kata")["containers"]["busybox"]
    client = await Client.connect(own.run_directory / "kata/agent.sock")
    async with Host(client, rootfs) as host:
        rpc = host.rpc
        await host.health.Check(health_pb2.CheckRequest(), timeout=30)
        sandbox = agent_pb2.CreateSandboxRequest(sandbox_id="pod", hostname="kata-pod", storages=[SHM])
        await rpc.CreateSandbox(sandbox, timeout=60)
        asked = agent_pb2.GuestDetailsRequest(mem_block_size=True, mem_hotplug_probe=True)
        details = await rpc.GetGuestDetails(asked)
        assert details.agent_details.init_daemon and details.agent_details.supports_seccomp

        bind = oci_pb2.Mount(destination="/dev/shm", type="bind", source=SHM.mount_point, options=["rbind"])
        pause = host.containerds_spec("/bin/sleep", "1000", mounts=[bind])
        pause.Linux.Resources.Memory.Limit = 64 << 20
        pause.Linux.Resources.CPU.CopyFrom(oci_pb2.LinuxCPU(Shares=2, Quota=50_000, Period=100_000))
        await host.run("pod", pause)
        event = asyncio.ensure_future(rpc.GetOOMEvent(agent_pb2.GetOOMEventRequest()))
        script = "hostname; echo kept > /dev/shm/file; echo oops >&2; exit 3"
        await host.create("c", host.containerds_spec("/bin/sh", "-c", script, mounts=[bind]))
        reads = [
            asyncio.ensure_future(read(agent_pb2.ReadStreamRequest(container_id="c", exec_id="c", len=32 << 10)))
            for read in (rpc.ReadStdout, rpc.ReadStderr)
        ]
        await rpc.StartContainer(agent_pb2.StartContainerRequest(container_id="c"))
        assert [(await read).data for read in reads] == [b"kata-pod\n", b"oops\n"]
        assert await host.output("c", "c") == b""
        wait = agent_pb2.WaitProcessRequest(container_id="c", exec_id="c")
        assert (await rpc.WaitProcess(wait)).status == 3

        terminal = oci_pb2.Process(Terminal=True, Args=["/bin/sh"], Env=["PATH=/bin", "PS1=$ "], Cwd="/")
        await rpc.ExecProcess(agent_pb2.ExecProcessRequest(container_id="pod", exec_id="tty", process=terminal))
        key = {"container_id": "pod", "exec_id": "tty"}
        await rpc.TtyWinResize(agent_pb2.TtyWinResizeRequest(row=50, column=132, **key))
        await rpc.WriteStdin(agent_pb2.WriteStreamRequest(data=b"stty size; cat /dev/shm/file; exit\n", **key))
        said = await host.output(**key)
        assert b"50 132\r\nkept\r\n" in said
        assert (await rpc.WaitProcess(agent_pb2.WaitProcessRequest(**key))).status == 0

        stats = (await rpc.StatsContainer(agent_pb2.StatsContainerRequest(container_id="pod"))).cgroup_stats
        assert stats.cpu_stats.cpu_usage.total_usage > 0
        assert "kata_guest_meminfo" in (await rpc.GetMetrics(agent_pb2.GetMetricsRequest())).metrics
        for container_id in ("c", "pod"):
            kill = agent_pb2.SignalProcessRequest(container_id=container_id, signal=9)
            await rpc.SignalProcess(kill)
            wait = agent_pb2.WaitProcessRequest(container_id=container_id, exec_id=container_id)
            await rpc.WaitProcess(wait)
            began = time.monotonic()
            await host.remove(container_id)
            print(f"RemoveContainer {container_id}: {time.monotonic() - began:.3f} s")
            await rpc.RemoveStaleVirtiofsShareMounts(agent_pb2.RemoveStaleVirtiofsShareMountsRequest())
        await rpc.DestroySandbox(agent_pb2.DestroySandboxRequest(), timeout=60)
        with pytest.raises(RpcError):
            await event
    await until(lambda: not (own.run_directory / "kata/vm.json").exists(), "the guest is powered off", timeout=TIMEOUT)
