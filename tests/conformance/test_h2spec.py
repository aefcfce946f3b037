"""Run h2spec, the conformance test of HTTP/2 servers: it reports no failures."""

from __future__ import annotations

import asyncio
import xml.etree.ElementTree as ET
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from caisson.agent.base.log import Log
from caisson.agent.rpc.http2 import hpack
from caisson.agent.rpc.http2.connection import MAX_FRAME_SIZE, Http2Connection
from caisson.agent.rpc.http2.messages import HttpRequest, HttpResponse
from tests.support.golang import Module

PACKAGE = "github.com/summerwind/h2spec/cmd/h2spec"
BUILD_TIMEOUT, RUN_TIMEOUT = 600, 120

#: h2spec sends this one with 20 KB: too much for a server with the smallest MAX_FRAME_SIZE, but not for ours.
LARGE_HEADERS = "Sends a large size HEADERS frame that exceeds the SETTINGS_MAX_FRAME_SIZE"


@pytest.fixture(scope="session")
def h2spec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build h2spec."""
    module = Module(Path(__file__).with_name("go_h2spec"), tmp_path_factory.mktemp("go") / "h2spec")
    return module.build(PACKAGE, "h2spec")


@pytest.fixture
async def port() -> AsyncIterator[int]:
    """Return a port on this machine where every request gets a response."""
    header = hpack.encode((b":status", b"200"), (b"content-type", b"text/plain"))
    buffer = memoryview(bytearray(1 << 18))

    async def respond(request: HttpRequest) -> HttpResponse:
        return HttpResponse(header, [b"a response that flow control can cut into pieces"])

    def connection() -> Http2Connection:
        return Http2Connection(respond, 1 << 20, buffer, Log("fatal"), lambda _: None)

    server = await asyncio.get_running_loop().create_server(connection, "127.0.0.1", 0)
    yield server.sockets[0].getsockname()[1]
    server.close()


async def failures(h2spec: Path, port: int, report: Path, *words: str) -> tuple[int, set[str]]:
    """Run h2spec; return how many tests ran, and which failed."""
    command = [str(h2spec), "-h", "127.0.0.1", "-p", str(port), "-o", "10", "-j", str(report), *words]
    pipe = asyncio.subprocess.PIPE
    program = await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=asyncio.subprocess.STDOUT)
    said, _ = await asyncio.wait_for(program.communicate(), RUN_TIMEOUT)
    assert report.exists(), said.decode()
    cases = list(ET.parse(report).getroot().iter("testcase"))
    failed = {case.get("classname", "") for case in cases if case.find("failure") is not None}
    return len(cases), failed | {case.get("classname", "") for case in cases if case.find("error") is not None}


@pytest.mark.timeout(BUILD_TIMEOUT + RUN_TIMEOUT)
async def test_h2spec_finds_nothing(h2spec: Path, port: int, tmp_path: Path) -> None:
    count, failed = await failures(h2spec, port, tmp_path / "report")
    assert count >= 140
    assert failed == {LARGE_HEADERS}


@pytest.mark.timeout(BUILD_TIMEOUT + RUN_TIMEOUT)
async def test_a_frame_beyond_the_largest_that_we_take_is_an_error(h2spec: Path, port: int, tmp_path: Path) -> None:
    longer = str(MAX_FRAME_SIZE // 4)  # five fields of this many bytes
    count, failed = await failures(h2spec, port, tmp_path / "report", "--max-header-length", longer, "http2/4.2/3")
    assert (count, failed) == (1, set())
