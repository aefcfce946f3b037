"""Test traces: a span for each request, delivered to a listener; and a clear error if the packages are missing."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from caisson.agent.base.errors import Unsupported
from caisson.agent.base.tracing import Tracing
from caisson.agent.rpc.codes import StatusCode as Code
from caisson.proto.kata1 import agent_pb2
from tests.native.agent_support import RunningAgent, refused


@asynccontextmanager
async def receiver(path: Path) -> AsyncIterator[asyncio.Queue[dict[str, Any]]]:
    """Listen as a host does; yield spans as they arrive."""
    spans: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            spans.put_nowait(json.loads(line))
        writer.close()

    server = await asyncio.start_unix_server(take, path, limit=1 << 20)
    async with server:
        yield spans


@pytest.mark.root
async def test_requests_are_traced_while_it_is_on(tmp_path: Path, nsexec_path: Path, busybox_rootfs: Path) -> None:
    path = tmp_path / "traces"
    agent = RunningAgent(tmp_path, nsexec_path, busybox_rootfs, "--trace-target", f"unix:{path}")

    try:
        async with receiver(path) as spans, agent.connect() as client:
            stop, start = agent_pb2.StopTracingRequest(), agent_pb2.StartTracingRequest()
            assert await refused(client.rpc.StopTracing(stop)) == (Code.FAILED_PRECONDITION, "tracing not enabled")
            await client.version()  # before it is enabled
            await client.rpc.StartTracing(start)
            assert await refused(client.rpc.StartTracing(start)) == (
                Code.FAILED_PRECONDITION,
                "tracing already enabled",
            )
            await client.create_sandbox()
            await refused(client.rpc.StartContainer(agent_pb2.StartContainerRequest(container_id="none")))
            await client.rpc.StopTracing(stop)
            await client.version()  # and after it is disabled
            found = [await spans.get() for _ in range(spans.qsize())]
            names = [span["name"] for span in found]
            assert names[:4] == ["StartTracing", "StartTracing", "CreateSandbox", "StartContainer"]
            assert "Check" not in names and "Version" not in names
            failed = found[3]
            assert failed["attributes"]["container_id"] == "none"
            assert failed["status"]["status_code"] == "ERROR"
            assert failed["attributes"]["rpc.grpc.status"] != "OK"
            assert found[2]["status"]["status_code"] != "ERROR"
            assert found[2]["start_time"] <= found[2]["end_time"] <= failed["end_time"]
            # Enabled again, after a host that left and came back.
            await client.rpc.StartTracing(start)
            await client.rpc.StopTracing(stop)
            assert (await spans.get())["name"] == "StartTracing"
    finally:
        agent.stop()


@pytest.mark.root
async def test_a_host_that_does_not_listen_costs_its_spans_and_nothing_else(
    tmp_path: Path, nsexec_path: Path, busybox_rootfs: Path
) -> None:
    agent = RunningAgent(
        tmp_path, nsexec_path, busybox_rootfs, "--trace", "true", "--trace-target", f"unix:{tmp_path}/nobody"
    )

    try:
        async with agent.connect() as client:
            await client.create_sandbox()
            await client.rpc.StopTracing(agent_pb2.StopTracingRequest())
            await client.version()
    finally:
        agent.stop()


def test_without_the_packages_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "opentelemetry"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    tracing = Tracing("unix:/nobody")
    with pytest.raises(Unsupported, match="the template `tracing` has them"):
        tracing.start()
    assert not tracing.enabled
