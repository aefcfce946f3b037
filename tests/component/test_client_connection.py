"""The client's connection to an agent that takes its time."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc

from caisson.agent.client import Agent, ReadinessProbe
from caisson.proto.kata1 import health_pb2

#: Seconds for an agent's first answer: more than the client's longest pause between two attempts.
SLOWNESS = 1.5


async def _version(request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
    answer: bytes = health_pb2.VersionCheckResponse(agent_version="slow").SerializeToString()
    return answer


async def _check(request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
    serving = health_pb2.HealthCheckResponse.SERVING
    answer: bytes = health_pb2.HealthCheckResponse(status=serving).SerializeToString()
    return answer


async def _carry(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    while data := await source.read(65536):
        target.write(data)
    target.close()


async def test_an_agent_that_is_slow_to_answer_is_waited_for(tmp_path: Path) -> None:
    """A busy guest without KVM: whoever connected and heard nothing for half a second was told that nobody answers."""
    attempts = 0

    async def delayed(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal attempts
        attempts += 1
        await asyncio.sleep(SLOWNESS)  # what this is about
        inner, outer = await asyncio.open_unix_connection(str(tmp_path / "server"))
        await asyncio.gather(_carry(reader, outer), _carry(inner, writer), return_exceptions=True)

    server = grpc.aio.server()
    handlers = {"Version": grpc.unary_unary_rpc_method_handler(_version)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("grpc.Health", handlers),))
    server.add_insecure_port(f"unix:{tmp_path / 'server'}")
    await server.start()
    relay = await asyncio.start_unix_server(delayed, tmp_path / "agent.sock")
    try:
        async with Agent.connect(tmp_path / "agent.sock") as agent:
            assert await agent.version() == "slow"
    finally:
        relay.close()
        await server.stop(None)
    assert attempts == 1


async def test_a_guests_first_answer_comes_on_the_first_connection_that_the_guest_takes(tmp_path: Path) -> None:
    """A starting guest refuses, then lets the question wait, and then answers it: it is asked once, and not again."""
    attempts = 0
    refusing, serving = 3, asyncio.Event()

    async def starting(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal attempts
        attempts += 1
        if attempts <= refusing:
            writer.close()
            return
        await serving.wait()
        inner, outer = await asyncio.open_unix_connection(str(tmp_path / "server"))
        await asyncio.gather(_carry(reader, outer), _carry(inner, writer), return_exceptions=True)

    server = grpc.aio.server()
    handlers = {"Check": grpc.unary_unary_rpc_method_handler(_check)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("grpc.Health", handlers),))
    server.add_insecure_port(f"unix:{tmp_path / 'server'}")
    await server.start()
    ready, told = ReadinessProbe(timeout=0.2), []
    told.append(await asyncio.to_thread(ready, tmp_path / "agent.sock"))  # nobody is there yet
    guest = await asyncio.start_unix_server(starting, tmp_path / "agent.sock")
    while attempts <= refusing:
        told.append(await asyncio.to_thread(ready, tmp_path / "agent.sock"))
    told.append(await asyncio.to_thread(ready, tmp_path / "agent.sock"))
    serving.set()
    while not told[-1]:
        told.append(await asyncio.to_thread(ready, tmp_path / "agent.sock"))
    guest.close()
    await server.stop(None)
    assert told[-1] and not any(told[:-1])
    assert attempts == refusing + 1
