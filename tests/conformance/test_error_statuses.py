"""Check each method's error without a sandbox, for an unknown container and for an unknown process.

Compares, row by row, with the table of each generation: hosts see codes and texts, and some compare them.
"""

from __future__ import annotations

from typing import Any

import pytest

from caisson.agent.client import Agent
from caisson.agent.rpc.codes import StatusCode as Code
from caisson.proto.kata1 import agent_pb2, oci_pb2, types_pb2
from tests.conformance.generations import Generation
from tests.native.agent_support import RunningAgent, refused

pytestmark = pytest.mark.root

PROCESS = oci_pb2.Process(Args=["/bin/true"], Cwd="/")

#: Each method's arguments; container "no" and process "no" never exist.
REQUESTS: dict[str, Any] = {
    "CreateContainer": agent_pb2.CreateContainerRequest(OCI=oci_pb2.Spec(Process=PROCESS)),
    "StartContainer": agent_pb2.StartContainerRequest(),
    "ExecProcess": agent_pb2.ExecProcessRequest(exec_id="no", process=PROCESS),
    "SignalProcess": agent_pb2.SignalProcessRequest(exec_id="no", signal=9),
    "WaitProcess": agent_pb2.WaitProcessRequest(exec_id="no"),
    "WriteStdin": agent_pb2.WriteStreamRequest(exec_id="no", data=b"x"),
    "ReadStdout": agent_pb2.ReadStreamRequest(exec_id="no", len=1),
    "ReadStderr": agent_pb2.ReadStreamRequest(exec_id="no", len=1),
    "CloseStdin": agent_pb2.CloseStdinRequest(exec_id="no"),
    "TtyWinResize": agent_pb2.TtyWinResizeRequest(exec_id="no", row=1, column=1),
    "ListProcesses": agent_pb2.ListProcessesRequest(format="json"),
    "UpdateContainer": agent_pb2.UpdateContainerRequest(resources=oci_pb2.LinuxResources()),
    "StatsContainer": agent_pb2.StatsContainerRequest(),
    "PauseContainer": agent_pb2.PauseContainerRequest(),
    "ResumeContainer": agent_pb2.ResumeContainerRequest(),
    "RemoveContainer": agent_pb2.RemoveContainerRequest(),
}
OF_A_PROCESS = ("WaitProcess", "WriteStdin", "ReadStdout", "ReadStderr", "CloseStdin", "TtyWinResize")
OF_ONE_GENERATION = ("ListProcesses",)


def _methods(generation: Generation) -> list[str]:
    return [method for method in REQUESTS if method not in OF_ONE_GENERATION or method in generation.only]


async def ask(client: Agent, method: str, container_id: str) -> tuple[Code, str]:
    request = type(REQUESTS[method])()
    request.CopyFrom(REQUESTS[method])
    request.container_id = container_id
    return await refused(getattr(client.rpc, method)(request))


@pytest.mark.parametrize("ended", [False, True])
async def test_without_a_sandbox(agent: RunningAgent, generation: Generation, ended: bool) -> None:
    wanted = dict.fromkeys(_methods(generation), generation.container_not_found)
    wanted |= dict.fromkeys(generation.gated, generation.sandbox_not_running)
    wanted["CreateContainer"] = generation.create_without_sandbox
    wanted["SignalProcess"] = generation.signal_without_sandbox

    async with agent.connect() as client:
        if ended and generation.survives_destroy:
            await client.create_sandbox()
            await client.destroy_sandbox()
        for method in _methods(generation):
            assert await ask(client, method, "no") == wanted[method], method


async def test_unknown_containers(agent: RunningAgent, generation: Generation) -> None:
    async with agent.connect() as client:
        await client.create_sandbox()
        special = {"SignalProcess": generation.signal_unknown_container}
        for method in _methods(generation):
            if method != "CreateContainer":
                wanted = special.get(method, generation.container_not_found)
                assert await ask(client, method, "no") == wanted, method


async def test_unknown_processes(agent: RunningAgent, generation: Generation) -> None:
    async with agent.connect() as client:
        await client.create_sandbox()
        await client.ensure_container("box", agent.spec())
        for method in OF_A_PROCESS:
            assert await ask(client, method, "box") == generation.process_not_found, method
        assert await ask(client, "SignalProcess", "box") == generation.signal_unknown_process


async def test_existing_objects_are_already_exists(agent: RunningAgent, generation: Generation) -> None:
    async with agent.connect() as client:
        begin = agent_pb2.CreateSandboxRequest()
        await client.rpc.CreateSandbox(begin)
        if generation.sandbox_exists is None:
            await client.rpc.CreateSandbox(begin)
        else:
            assert await refused(client.rpc.CreateSandbox(begin)) == generation.sandbox_exists
        await client.create_container("box", agent.spec())
        assert await refused(client.create_container("box", agent.spec())) == generation.container_exists


async def test_methods_that_need_no_sandbox(agent: RunningAgent, generation: Generation) -> None:
    async with agent.connect() as client:
        rpc = client.rpc
        if generation.survives_destroy:
            await rpc.DestroySandbox(agent_pb2.DestroySandboxRequest())
        assert await client.version()
        assert (await rpc.GetGuestDetails(agent_pb2.GuestDetailsRequest())).agent_details.version
        assert (await rpc.ListInterfaces(agent_pb2.ListInterfacesRequest())).Interfaces
        await rpc.ListRoutes(agent_pb2.ListRoutesRequest())
        for call in (
            rpc.UpdateInterface(agent_pb2.UpdateInterfaceRequest(interface=types_pb2.Interface())),
            rpc.CopyFile(agent_pb2.CopyFileRequest(path="/no")),
            rpc.ReseedRandomDev(agent_pb2.ReseedRandomDevRequest()),
        ):
            assert "Sandbox not started" not in (await refused(call))[1]
