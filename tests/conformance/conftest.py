"""Run conformance tests against an agent on this machine, as the native tests do, over every transport."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conformance.generations import KATA1, KATA3, Generation
from tests.conformance.transports import MemoryAgent, MemoryAgent3, TtrpcAgent, run_in_child
from tests.native.agent_support import RunningAgent
from tests.native.conftest import busybox_rootfs, check_nothing_is_left, nsexec_path

__all__ = ["busybox_rootfs", "nsexec_path"]

#: Each with the API generation spoken over it.
TRANSPORTS = {
    "http2": (RunningAgent, KATA1),
    "ttrpc": (TtrpcAgent, KATA3),
    "memory-1": (MemoryAgent, KATA1),
    "memory-3": (MemoryAgent3, KATA3),
}


@pytest.fixture(params=TRANSPORTS)
def agent(
    request: pytest.FixtureRequest, tmp_path: Path, nsexec_path: Path, busybox_rootfs: Path
) -> Iterator[RunningAgent]:
    """Start a fresh agent behind each transport; at the end nothing of it is left."""
    running = TRANSPORTS[request.param][0](tmp_path, nsexec_path, busybox_rootfs)
    yield running
    running.stop()
    check_nothing_is_left(running, tmp_path)


@pytest.fixture
def generation(agent: RunningAgent, request: pytest.FixtureRequest) -> Generation:
    """Return the statuses and rules for the transport's generation."""
    return next(generation for kind, generation in TRANSPORTS.values() if type(agent) is kind)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a test of an in-process agent in a separate process, with its own event loop."""
    if not isinstance(pyfuncitem.funcargs.get("agent"), MemoryAgent):
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    if failure := run_in_child(inspect.unwrap(pyfuncitem.obj), arguments):
        pytest.fail(failure, pytrace=False)
    return True
