"""Send requests of any shape: each gets a status in time, and the agent keeps serving.

Requests are generated from the descriptors, so new fields and methods are covered without a change here.  The agent
runs in its own network namespace; values that would change this machine (its clock, files outside the test's) are not
generated.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from hypothesis import strategies as st

from caisson.agent.client import Agent, AgentError
from caisson.agent.client.channel import AgentChannel
from caisson.agent.rpc.codes import StatusCode as Code
from caisson.proto.kata1 import agent_pb2 as agent1
from caisson.proto.kata1 import health_pb2 as health1
from caisson.proto.kata1 import oci_pb2 as oci1
from caisson.proto.kata3 import agent_pb2 as agent3
from caisson.proto.kata3 import health_pb2 as health3
from caisson.proto.kata3 import oci_pb2 as oci3
from tests.native.agent_support import RunningAgent
from tests.support import fuzz

pytestmark = pytest.mark.root

SECONDS = fuzz.seconds(20)

#: Methods that must have succeeded at least once, and how many extra seconds random requests get to reach them.
FAR = {"CreateContainer", "StartContainer", "ExecProcess"}
EXTRA = 200

#: Methods that may wait for an event: the caller hangs up instead.
WAIT = {"WaitProcess", "ReadStdout", "ReadStderr", "WriteStdin", "GetOOMEvent", "CloseStdin", "OnlineCPUMem"}
HANG_UP, DEADLINE = 0.05, 30.0

#: A process that they stop before its start does not start until it is continued, and StartContainer waits for that.
STOPS = (signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU)

#: Texts with which the agent itself reports a timeout or unavailability; the client uses others for a lost agent.
OWN_TEXTS = ("Timeout reached after", "did not appear within", "no tty")


class Api:
    """A generation's services and messages, without the methods that end the agent."""

    def __init__(self, agent: Any, health: Any, oci: Any, *without: str) -> None:
        self.agent = agent
        self.health = health
        self.oci = oci
        self.service = agent.DESCRIPTOR.services_by_name["AgentService"]
        services = (self.service, health.DESCRIPTOR.services_by_name["Health"])
        self.methods = [
            (service.full_name, method)
            for service in services
            for method in service.methods
            if method.name not in without
        ]


#: The transports, and what is spoken over each.
APIS = {"http2": Api(agent1, health1, oci1), "ttrpc": Api(agent3, health3, oci3, "DestroySandbox")}

BOUNDS = {
    FieldDescriptor.TYPE_INT32: (-(1 << 31), (1 << 31) - 1),
    FieldDescriptor.TYPE_INT64: (-(1 << 63), (1 << 63) - 1),
    FieldDescriptor.TYPE_UINT32: (0, (1 << 32) - 1),
    FieldDescriptor.TYPE_UINT64: (0, (1 << 64) - 1),
}
TEXTS = st.one_of(
    st.sampled_from(
        ["", "\0", "a\0b", "..", ".", "/", "x" * 300, "café", "\n", "-1", "0", "1" * 40, "a/../b", "%s", "{}"]
    ),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
)
IDS = st.one_of(st.sampled_from(["box", "a", "b", "sandbox"]), TEXTS)


class Requests:
    """Strategies for messages; `root` is a directory usable as a container's root."""

    def __init__(self, root: Path) -> None:
        paths = st.one_of(st.sampled_from([str(root), "/bin/true", "/proc", "/dev", "tmpfs", "/nonexistent/x"]), TEXTS)
        self._by_name: dict[str, st.SearchStrategy[Any]] = {
            "container_id": IDS,
            "exec_id": IDS,
            "sandbox_id": IDS,
            "timeout": st.integers(0, 5),
            "signal": st.integers(0, 100).filter(lambda number: number not in STOPS),
            "Args": st.lists(st.sampled_from(["/bin/true", "sleep", "100", "", "no\0"]), max_size=3),
            "Sec": st.just((1 << 63) - 1),  # beyond any clock's range
            "Usec": st.integers(1_000_000, (1 << 63) - 1),
            "type": st.one_of(
                st.sampled_from(["pid", "mount", "ipc", "uts", "network", "user", "time", "tmpfs"]), TEXTS
            ),
            "nb_cpus": st.integers(0, 1),
        }
        self._by_message: dict[tuple[str, str], st.SearchStrategy[Any]] = {
            ("Root", "Path"): st.one_of(st.just(str(root)), paths),
            ("CopyFileRequest", "path"): st.one_of(st.sampled_from(["/etc/x", "/run/../x", "/run", "/runx/y"]), TEXTS),
            ("Mount", "destination"): st.one_of(st.sampled_from(["/tmp", "/mnt/a", "/proc", "/dev", "/.."]), TEXTS),
            ("Storage", "mount_point"): st.one_of(st.sampled_from(["", "/nonexistent/x", "relative"])),
            ("Hook", "Path"): st.sampled_from(["", "/nonexistent", "relative", "/bin/true"]),
            ("Linux", "CgroupsPath"): st.sampled_from(["", "/../x", "a:b:c"]),
        }

    def nearly(self, sound: Any) -> st.SearchStrategy[Any]:
        """Generate a valid message, and variants with something else merged in."""

        @st.composite
        def build(draw: Any) -> Any:
            message = type(sound)()
            message.CopyFrom(sound)
            if draw(st.booleans()):
                message.MergeFrom(draw(self.message(sound.DESCRIPTOR, depth=2)))
            if not message.container_id.isalnum() or draw(st.booleans()):
                message.container_id = draw(st.sampled_from(["box", "a", "b"]))
            return message

        return build()

    def message(self, descriptor: Descriptor, depth: int = 0) -> st.SearchStrategy[Any]:
        """Generate messages of a type; the deeper, the emptier."""
        kind = message_factory.GetMessageClass(descriptor)
        fields = {field.name: self._field(field, depth) for field in descriptor.fields}

        @st.composite
        def build(draw: Any) -> Any:
            few = st.integers(0, max(len(fields) // (depth + 1), 1))
            names = draw(st.permutations(list(fields)))[: draw(few)] if fields else []
            message = kind()
            for name in names:
                value = draw(fields[name])
                if isinstance(value, dict):
                    getattr(message, name).update(value)
                elif isinstance(value, list):
                    getattr(message, name).extend(value)
                elif hasattr(value, "DESCRIPTOR"):
                    getattr(message, name).CopyFrom(value)
                else:
                    setattr(message, name, value)
            return message

        return build()

    def _field(self, field: FieldDescriptor, depth: int) -> st.SearchStrategy[Any]:
        assert field.containing_type is not None
        special = self._by_message.get((field.containing_type.name, field.name), self._by_name.get(field.name))
        plain = field.message_type is None and field.type not in (field.TYPE_BOOL, field.TYPE_ENUM, field.TYPE_BYTES)
        if special is not None and plain and (not field.is_repeated or field.name == "Args"):
            return special
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            return st.dictionaries(TEXTS, TEXTS, max_size=3)
        one = self._value(field, depth)
        return st.lists(one, max_size=3) if field.is_repeated else one

    def _value(self, field: FieldDescriptor, depth: int) -> st.SearchStrategy[Any]:
        if field.message_type is not None:
            inner = field.message_type
            return st.deferred(lambda: self.message(inner, depth + 1))
        if field.type in BOUNDS:
            low, high = BOUNDS[field.type]
            return st.one_of(st.sampled_from([low, 0, 1, high]), st.integers(low, high))
        if field.type == field.TYPE_STRING:
            return TEXTS
        if field.type == field.TYPE_BYTES:
            return st.binary(max_size=64)
        if field.type == field.TYPE_BOOL:
            return st.booleans()
        if field.type == field.TYPE_ENUM:
            assert field.enum_type is not None
            return st.sampled_from([value.number for value in field.enum_type.values])
        return st.floats(allow_nan=False, width=32)


@pytest.fixture
def isolated_agent(tmp_path: Path, nsexec_path: Path, busybox_rootfs: Path) -> Iterator[RunningAgent]:
    """Start an agent that cannot change this machine's network."""
    running = RunningAgent(
        tmp_path, nsexec_path, busybox_rootfs, "--hotplug-timeout=100ms", within=("unshare", "--net", "--mount")
    )
    yield running
    running.stop()
    assert running.cgroups() == []


@pytest.mark.fuzz
@pytest.mark.timeout(fuzz.LIMIT + EXTRA)
@pytest.mark.parametrize("transport", APIS)
def test_any_request_gets_a_status(isolated_agent: RunningAgent, transport: str) -> None:
    requests, api = Requests(isolated_agent.rootfs), APIS[transport]
    counts: dict[str, int] = {}
    done: dict[str, int] = {}

    async def ask(channel: AgentChannel, service: str, method: Any, request: Any) -> None:
        counts[method.name] = counts.get(method.name, 0) + 1
        patience = HANG_UP if method.name in WAIT else DEADLINE
        try:
            await channel.call(service, method.name, request.SerializeToString(), patience)
            done[method.name] = done.get(method.name, 0) + 1
        except AgentError as error:
            text = error.details
            assert "calling application" not in text, (method.name, request)
            if method.name not in WAIT and not any(one in text for one in OWN_TEXTS):
                gone = (Code.DEADLINE_EXCEEDED, Code.UNAVAILABLE, Code.CANCELLED)
                assert error.code not in gone, (method.name, request, text)

    with asyncio.Runner() as runner:

        async def connect() -> AgentChannel:
            return Agent.connect(isolated_agent.socket, "ttrpc" if transport == "ttrpc" else "grpc").channel

        channel = runner.run(connect())
        until = time.monotonic() + SECONDS

        def goes_on() -> bool:
            """Random requests must get as far as a process in a container, however slow the machine is."""
            return time.monotonic() < until + (0 if set(done) >= FAR else EXTRA)

        weights = [pair for pair in api.methods for _ in range(3 if "Container" in pair[1].name else 1)]
        strategies = {pair[1].name: requests.message(pair[1].input_type) for pair in api.methods}
        process = api.oci.Process(Args=["/bin/sleep", "100"], Cwd="/")
        spec = api.oci.Spec.FromString(
            isolated_agent.spec("/bin/sleep", "100").SerializeToString()
        )  # of the same bytes
        sound = [
            api.agent.CreateContainerRequest(OCI=spec),
            api.agent.StartContainerRequest(),
            api.agent.ExecProcessRequest(exec_id="x", process=process),
            api.agent.SignalProcessRequest(signal=9),
            api.agent.UpdateContainerRequest(resources=api.oci.LinuxResources()),
        ]
        for one in sound:
            name = type(one).__name__.removesuffix("Request")
            strategies[name] = st.one_of(strategies[name], requests.nearly(one))
        asked = st.sampled_from(weights).flatmap(
            lambda pair: st.tuples(st.just(pair[0]), st.just(pair[1]), strategies[pair[1].name])
        )

        @settings(
            max_examples=500,
            deadline=None,
            derandomize=False,  # in CI it would be: always the same requests
            database=None,
            phases=[Phase.generate],
            verbosity=Verbosity.quiet,
            suppress_health_check=list(HealthCheck),
        )
        @given(st.lists(asked, min_size=1, max_size=12))
        def several(some: list[tuple[str, Any, Any]]) -> None:
            if goes_on():
                begin = api.agent.CreateSandboxRequest(sandbox_id="s")
                method = api.service.methods_by_name["CreateSandbox"]
                runner.run(ask(channel, api.service.full_name, method, begin))
                for one in some:
                    runner.run(ask(channel, *one))

        while goes_on():
            several()

        async def serving() -> Any:
            answer = await channel.call("grpc.Health", "Check", b"", DEADLINE)
            return api.health.HealthCheckResponse.FromString(answer)

        assert runner.run(serving()).status == api.health.HealthCheckResponse.SERVING
        runner.run(channel.close())
    log = isolated_agent.log.read_text()
    assert "a bug in a handler" not in log, [line for line in log.splitlines() if "a bug in a handler" in line][:3]
    print(f"{sum(counts.values())} requests: {counts}; of these done: {done}")
    assert set(done) >= FAR, done
