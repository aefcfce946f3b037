"""Test containers and processes as used by a Kata 3.x host, where that differs from 1.x."""

from __future__ import annotations

import asyncio

import pytest

from caisson.agent.rpc.codes import StatusCode
from caisson.proto.kata3 import agent_pb2, oci_pb2
from tests.native.agent_support import RunningAgent, output
from tests.native.kata3_support import SHARED, Host, apart, refused

__all__ = ["apart"]

pytestmark = pytest.mark.root


async def test_an_empty_exec_id_is_the_first_process(apart: RunningAgent) -> None:
    async with await Host.connect(apart) as host:
        await host.rpc.CreateSandbox(agent_pb2.CreateSandboxRequest(sandbox_id="pod"))
        await host.run("c", host.spec("/bin/sh", "-c", "read line; echo got $line; cat; exit 4"))
        write = agent_pb2.WriteStreamRequest(container_id="c", data=b"it\nrest")
        assert (await host.rpc.WriteStdin(write)).len == 7
        write.data = b""  # no data: EOF of its input
        assert (await host.rpc.WriteStdin(write)).len == 0
        assert await host.output("c") == b"got it\nrest"
        wait = agent_pb2.WaitProcessRequest(container_id="c")
        for _ in range(2):  # a host waits again after killing it
            assert (await host.rpc.WaitProcess(wait)).status == 4
        await host.remove("c")


async def test_sigkill_without_an_exec_id_is_for_all_and_other_signals_for_the_first(apart: RunningAgent) -> None:
    async with await Host.connect(apart) as host:
        await host.rpc.CreateSandbox(agent_pb2.CreateSandboxRequest(sandbox_id="pod"))
        await host.run("c", host.spec("/bin/sh", "-c", "trap 'echo usr1' USR1; while :; do sleep 0.05; done"))
        process = oci_pb2.Process(Args=["/bin/sleep", "1000"], Env=["PATH=/bin"], Cwd="/")
        await host.rpc.ExecProcess(agent_pb2.ExecProcessRequest(container_id="c", exec_id="e", process=process))
        signal = agent_pb2.SignalProcessRequest(container_id="c", signal=10)
        await host.rpc.SignalProcess(signal)
        read = agent_pb2.ReadStreamRequest(container_id="c", len=100)
        assert (await host.rpc.ReadStdout(read)).data == b"usr1\n"
        signal.signal = 9
        await host.rpc.SignalProcess(signal)
        for exec_id in ("c", "e"):
            wait = agent_pb2.WaitProcessRequest(container_id="c", exec_id=exec_id)
            assert (await host.rpc.WaitProcess(wait)).status == 137
        await host.rpc.SignalProcess(signal)  # too late, but not an error
        signal.exec_id = "e"
        await host.rpc.SignalProcess(signal)
        signal.signal = 99
        assert (await refused(host.rpc.SignalProcess(signal)))[0] == StatusCode.INVALID_ARGUMENT


async def test_a_running_container_is_removed_and_the_sandbox_made_anew(apart: RunningAgent) -> None:
    async with await Host.connect(apart) as host:
        create = agent_pb2.CreateSandboxRequest(sandbox_id="pod", hostname="one")
        await host.rpc.CreateSandbox(create)
        create.hostname = "two"
        await host.rpc.CreateSandbox(create)
        await host.run("c")
        assert (await refused(host.rpc.CreateSandbox(create)))[0] == StatusCode.ALREADY_EXISTS
        assert await host.sh("c", "hostname") == "two\n"
        await host.remove("c")
        await host.rpc.CreateSandbox(create)


async def test_pids_are_shared_by_those_containers_that_ask_for_it(apart: RunningAgent) -> None:
    async with await Host.connect(apart) as host:
        await host.rpc.CreateSandbox(agent_pb2.CreateSandboxRequest(sandbox_id="pod"))
        await host.run("alone", host.spec("/bin/sleep", "1001"))
        await host.run("first", host.spec("/bin/sleep", "1002"), sandbox_pidns=True)
        await host.run("second", host.spec("/bin/sleep", "1003"), sandbox_pidns=True)
        listed = "cat /proc/[0-9]*/cmdline | tr '\\0' ' '"
        seen = await host.sh("second", listed)
        assert "sleep 1002" in seen and "sleep 1003" in seen and "sleep 1001" not in seen
        assert "sleep 1002" not in await host.sh("alone", listed)


async def test_what_a_container_left_as_its_last_message(apart: RunningAgent) -> None:
    async with await Host.connect(apart) as host:
        await host.rpc.CreateSandbox(agent_pb2.CreateSandboxRequest(sandbox_id="pod"))
        place = f"{SHARED}/termination"
        copy = agent_pb2.CopyFileRequest(path=place, file_mode=0o100666, dir_mode=0o755)
        await host.rpc.CopyFile(copy)
        mount = oci_pb2.Mount(destination="/message", type="bind", source=place, options=["rbind"])
        annotation = {"io.kubernetes.container.terminationMessagePath": "/message"}
        (apart.rootfs / "message").touch()
        await host.run("c", host.spec(mounts=[mount], Annotations=annotation))
        ask = agent_pb2.GetDiagnosticDataRequest(log_type="termination_log", container_id="c")
        assert (await host.rpc.GetDiagnosticData(ask)).data == ""
        await host.sh("c", "printf 'it \\377failed' > /message")
        assert (await host.rpc.GetDiagnosticData(ask)).data == "it �failed"
        await host.sh("c", "head -c 9000 /dev/zero | tr '\\0' x > /message")
        assert (await host.rpc.GetDiagnosticData(ask)).data == "x" * 4096
        ask.log_type = "other"
        assert (await refused(host.rpc.GetDiagnosticData(ask)))[0] == StatusCode.INVALID_ARGUMENT
        await host.run("plain")
        ask = agent_pb2.GetDiagnosticDataRequest(log_type="termination_log", container_id="plain")
        assert "terminationMessagePath" in (await refused(host.rpc.GetDiagnosticData(ask)))[1]


async def test_what_this_agent_does_not_do_is_refused(apart: RunningAgent) -> None:
    async with await Host.connect(apart) as host:
        await host.rpc.CreateSandbox(agent_pb2.CreateSandboxRequest(sandbox_id="pod"))
        share = agent_pb2.SharedMount(name="x", src_ctr="a", src_path="/a", dst_ctr="c", dst_path="/b")
        for fields in ({"stdin_port": 1}, {"shared_mounts": [share]}):
            assert (await refused(host.create("c", **fields)))[0] == StatusCode.UNIMPLEMENTED
        policy = agent_pb2.SetPolicyRequest(policy="package agent_policy")
        assert (await refused(host.rpc.SetPolicy(policy)))[0] == StatusCode.UNIMPLEMENTED
        assert await refused(host.rpc.MemAgentMemcgSet(agent_pb2.MemAgentMemcgConfig())) == (
            StatusCode.INTERNAL,
            "mem-agent is disabled",
        )
        for call in (
            host.rpc.MemAgentCompactSet(agent_pb2.MemAgentCompactConfig()),
            host.rpc.ResizeVolume(agent_pb2.ResizeVolumeRequest()),
            host.rpc.StartContainer(agent_pb2.StartContainerRequest(container_id="no")),
        ):
            await refused(call)


async def test_the_agent_ends_with_its_sandbox(apart: RunningAgent) -> None:
    async with await Host.connect(apart) as host:
        await host.rpc.CreateSandbox(agent_pb2.CreateSandboxRequest(sandbox_id="pod"))
        await host.run("c")
        event = asyncio.ensure_future(host.rpc.GetOOMEvent(agent_pb2.GetOOMEventRequest()))
        await host.rpc.DestroySandbox(agent_pb2.DestroySandboxRequest())  # answered before
        await refused(event)
        assert await asyncio.to_thread(apart.process.wait, 30) == 0


async def test_a_seccomp_profile_of_this_generation_is_applied(apart: RunningAgent) -> None:
    async with await Host.connect(apart) as host:
        await host.rpc.CreateSandbox(agent_pb2.CreateSandboxRequest(sandbox_id="pod"))
        rule = oci_pb2.LinuxSyscall(Names=["mkdir", "mkdirat"], Action="SCMP_ACT_ERRNO", errnoret=95)
        spec = host.spec()
        spec.Linux.Seccomp.CopyFrom(oci_pb2.LinuxSeccomp(DefaultAction="SCMP_ACT_ALLOW", Syscalls=[rule]))
        await host.run("c", spec)
        assert "not supported" in await host.sh("c", "mkdir /x 2>&1")


async def test_a_cgroup_path_of_systemds_form_is_one_in_the_file_system(apart: RunningAgent) -> None:
    async with await Host.connect(apart) as host:
        await host.rpc.CreateSandbox(agent_pb2.CreateSandboxRequest(sandbox_id="pod"))
        spec = host.spec()
        spec.Linux.CgroupsPath = "kubepods.slice:cri:abc"
        await host.run("c", spec)
        assert any(str(path).endswith("/kubepods.slice/cri-abc") for path in apart.cgroups())
        await host.remove("c")


async def test_the_guest_says_what_it_can(apart: RunningAgent) -> None:
    async with await Host.connect(apart) as host:
        asked = agent_pb2.GuestDetailsRequest(mem_block_size=True, mem_hotplug_probe=True)
        details = (await host.rpc.GetGuestDetails(asked)).agent_details
        assert list(details.device_handlers) == []
        assert {"overlayfs", "watchable-bind", "virtio-fs"} <= set(details.storage_handlers)
        assert "image_guest_pull" not in details.storage_handlers


async def test_a_spec_as_containerd_makes_it(apart: RunningAgent) -> None:
    async with await Host.connect(apart) as host:
        await host.rpc.CreateSandbox(agent_pb2.CreateSandboxRequest(sandbox_id="pod", hostname="pod"))
        await host.run("c", host.containerds_spec())
        seen = await host.sh("c", "cat /proc/sys/net/ipv4/ip_unprivileged_port_start /proc/1/oom_score_adj; hostname")
        assert seen == "0\n500\npod\n"
        await host.remove("c")
        spec = host.spec()
        spec.Linux.Sysctl["net.no.such"] = "1"
        code, text = await refused(host.create("c", spec))
        assert (code, "net/no/such" in text) == (StatusCode.INTERNAL, True)
        spec.Linux.Sysctl.clear()
        spec.Linux.Sysctl["vm.swappiness"] = "1"
        assert (await refused(host.create("c", spec)))[0] == StatusCode.INVALID_ARGUMENT


async def test_hosts_of_both_generations_at_once(apart: RunningAgent) -> None:
    """Users who run pods through a Kata host can still inspect them with our commands."""
    async with await Host.connect(apart) as host, apart.connect() as client:
        await host.rpc.CreateSandbox(agent_pb2.CreateSandboxRequest(sandbox_id="pod"))
        await host.run("c", host.spec("/bin/sh", "-c", "read line; echo $line; exit 5"))
        process = await client.container("c").exec(["/bin/echo", "ours"])
        assert await output(process) == b"ours\n"
        first = client.container("c").init()
        await first.write(b"typed by the other\n")
        assert await host.output("c") == b"typed by the other\n"
        assert await first.wait() == 5
        wait = agent_pb2.WaitProcessRequest(container_id="c")
        assert (await host.rpc.WaitProcess(wait)).status == 5
        assert await output(first) == b""  # EOF, as each generation reports it
