"""Test how the host presents the agent's answers about containers: tables, samples, signals, and listings."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from caisson.agent.client import AgentError, AgentGone, Reason, Registry, UsageError, listing
from caisson.agent.client.guest import Guest
from caisson.agent.client.logs import last_lines, parse_time
from caisson.agent.guest import ps
from caisson.agent.rpc.codes import StatusCode
from caisson.commands.streams import print_table
from caisson.proto.caisson import caisson_pb2
from caisson.proto.kata1 import agent_pb2

ROOT = Path(__file__).resolve().parents[2]

TABLE = """UID          PID    PPID  C STIME TTY          TIME CMD
0            132       1  0 14:41 ?        00:00:00 /bin/sh -c a   b; c
1000         137     132 42 Nov24 pts/0    01:02:03 sleep 1
"""


def test_a_table_of_ps() -> None:
    first, second = listing.parse_table(TABLE)
    assert first["command"] == "/bin/sh -c a   b; c"
    assert second == {
        "uid": 1000, "pid": 137, "ppid": 132, "cpu": 42, "started": "Nov24", "tty": "pts/0", "time": "01:02:03",
        "command": "sleep 1",
    }  # fmt: skip
    assert listing.parse_table(TABLE.splitlines()[0]) == []


@pytest.mark.parametrize("line", ["x", "a b c d e f g h", "0 1 2", "\x85 1 2 3", "0 ٣x 1 2 a b c d", "\x1b[2J"])
def test_a_row_that_is_none_is_shown_and_no_error(line: str) -> None:
    """A process chooses its command line: after a newline in it, the rest looks like a row."""
    found = listing.parse_table(f"{TABLE}{line}\n")
    assert len(found) == 3
    assert found[2] == {"command": line}


def test_a_name_with_line_ends_and_controls_keeps_to_its_row(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("name", "id"), [], [{"name": "n\nl\x1b[2J:1", "id": "1"}, {"name": "web", "id": None}], as_json=False)
    _, first, second = capsys.readouterr().out.splitlines()
    assert first.endswith("  1") and first.startswith("n\\nl\\x1b[2J:1")
    assert second.split() == ["web", "-"]


def test_the_agents_own_table_can_be_read() -> None:
    import os

    (row,) = listing.parse_table(ps.table([os.getpid()]))
    assert (row["pid"], row["ppid"], row["uid"]) == (os.getpid(), os.getppid(), os.geteuid())


def sample(busy: int, memory: int = 4096, limit: int = (1 << 63) - 4096, pids: int = 3, most: int = 0) -> Any:
    return agent_pb2.CgroupStats(
        cpu_stats=agent_pb2.CpuStats(cpu_usage=agent_pb2.CpuUsage(total_usage=busy)),
        memory_stats=agent_pb2.MemoryStats(usage=agent_pb2.MemoryData(usage=memory, limit=limit)),
        pids_stats=agent_pb2.PidsStats(current=pids, limit=most),
    )


def test_usage_is_a_share_of_the_time_between_two_samples() -> None:
    used = listing.usage("web", 10.0, sample(1_000_000_000), 12.0, sample(2_500_000_000))
    assert used == {
        "container": "web", "cpu_percent": 75.0, "cpu_seconds": 2.5, "memory": 4096, "memory_limit": None, "pids": 3,
        "pids_limit": None,
    }  # fmt: skip
    assert tuple(used) == listing.USAGE
    limited = listing.usage("web", 0.0, sample(0), 1.0, sample(0, limit=1 << 20, most=10))
    assert (limited["memory_limit"], limited["pids_limit"]) == (1 << 20, 10)


@pytest.mark.parametrize(
    ("text", "number"),
    [("9", 9), ("KILL", 9), ("SIGkill", 9), ("usr1", signal.SIGUSR1), ("RTMIN+3", signal.SIGRTMIN + 3)],
)
def test_signals(text: str, number: int) -> None:
    assert listing.signal_number(text) == number


@pytest.mark.parametrize("text", ["", "0", "65", "-1", "FOO", "SIG", "KILL+x", "1.5", "RTMAX+1"])
def test_kill_rejects_unknown_signals(text: str) -> None:
    with pytest.raises(UsageError, match=": is not a signal"):
        listing.signal_number(text)


class FakeAgent:
    """Answers about some containers; all others are unknown."""

    def __init__(self, *containers: str, reason: Reason = Reason.CONTAINER_NOT_FOUND) -> None:
        self.containers = containers
        self.reason = reason
        self.guest = SimpleNamespace(ListProcesses=self.list_processes)

    async def list_processes(self, request: Any) -> Any:
        if request.container_id not in self.containers:
            text = f"container {request.container_id}: not found"
            raise AgentError(StatusCode.INVALID_ARGUMENT, "invalid container id", self.reason, text)
        return caisson_pb2.ListProcessesResponse(table=TABLE)


def ask(agent: Any, known: Registry, container: str = "") -> list[str]:
    return [one["container"] for one in asyncio.run(listing.processes(agent, known, container))]


def test_containers_that_are_no_more_are_forgotten(tmp_path: Path) -> None:
    known = Registry(tmp_path / "containers")
    assert known.names() == []
    for name in ("web", "db", "gone"):
        known.add(name, disk=f"disk-{name}")
    assert ask(FakeAgent("web", "db"), known) == ["db", "web"]
    assert known.names() == ["db", "web"]
    assert known.metadata("web") == {"disk": "disk-web"}
    assert known.metadata("gone") == {}
    known.discard("web")
    known.discard("web")
    assert ask(FakeAgent("web", "db"), known) == ["db"]


def test_one_that_was_asked_for_by_name_need_not_be_known_but_must_exist(tmp_path: Path) -> None:
    known = Registry(tmp_path / "containers")
    assert ask(FakeAgent("web"), known, "web") == ["web"]
    with pytest.raises(AgentError, match="db: not found"):
        ask(FakeAgent("web"), known, "db")


MAKER = """
import sys
import time
from pathlib import Path
from caisson.agent.client import Registry
held = Registry(Path(sys.argv[1])).lease("run-1", disk="d")
print("held", flush=True)
sys.stdin.read()
"""


def test_leases_last_until_their_process_is_killed(tmp_path: Path) -> None:
    directory = tmp_path / "containers"
    known = Registry(directory)
    known.add("web")
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", MAKER, directory], cwd=ROOT, stdin=pipe, stdout=pipe) as maker:
        assert maker.stdout is not None
        assert maker.stdout.readline() == b"held\n"
        assert known.held("run-1") and not known.held("web") and not known.held("nobody")
        assert known.orphaned() == []
        assert ask(FakeAgent("web"), known) == ["web"]
        assert known.names() == ["run-1", "web"]  # it is being created
        maker.kill()
    assert known.orphaned() == ["run-1"]
    assert known.metadata("run-1")["disk"] == "d"
    known.add("run-1", disk="d")  # it outlives its command
    assert known.orphaned() == []
    assert ask(FakeAgent("web"), known) == ["web"]
    assert known.names() == ["web"]


def test_a_vm_that_has_gone_takes_no_note(tmp_path: Path) -> None:
    known = Registry(tmp_path / "vm/containers")
    with pytest.raises(AgentGone, match="the VM has ended"):
        known.add("web")
    assert known.names() == [] and known.orphaned() == []


def test_another_failure_forgets_nothing(tmp_path: Path) -> None:
    known = Registry(tmp_path / "containers")
    known.add("web")
    with pytest.raises(AgentError):
        ask(FakeAgent(reason=Reason.UNSPECIFIED), known)
    assert known.names() == ["web"]


@pytest.mark.parametrize(
    ("pieces", "count", "last"),
    [
        ([b"a\nb\nc\n"], 2, b"b\nc\n"),
        ([b"a\nb\nc"], 2, b"b\nc"),
        ([b"a\n", b"b", b"b\nc\n"], 2, b"bb\nc\n"),
        ([b"a\n"], 5, b"a\n"),
        ([b"a\nb\n"], 0, b""),
        ([b"\n\n\n"], 1, b"\n"),
        ([], 3, b""),
    ],
)
def test_the_last_lines_of_output(pieces: list[bytes], count: int, last: bytes) -> None:
    assert b"".join(data for _, data in last_lines([(1, one) for one in pieces], count)) == last


def test_times_of_logs() -> None:
    assert abs(parse_time("10m") - (time.time() - 600)) < 5 and parse_time("12.5") == 12.5
    assert parse_time("2026-01-02T03:04:05+00:00") == 1767323045
    with pytest.raises(UsageError, match="--since 'yesterday'"):
        parse_time("yesterday")


def test_a_long_sample_ends_with_the_agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "ALIVE_INTERVAL", 0.01)
    asked = []

    async def usage_now(_: Any) -> Any:
        return agent_pb2.StatsContainerResponse()

    async def version() -> str:
        asked.append("version")
        if len(asked) == 3:
            raise AgentGone("it has ended")
        return "1"

    agent: Any = SimpleNamespace(rpc=SimpleNamespace(StatsContainer=usage_now), version=version)
    with pytest.raises(AgentGone):
        asyncio.run(listing.stats(agent, Registry(tmp_path), "web", interval=600.0))


def test_a_container_whose_making_is_interrupted_is_known(tmp_path: Path) -> None:
    async def ensure_container(*_: Any) -> None:
        raise asyncio.CancelledError

    (tmp_path / "image.json").write_text('{"containers": {"busybox": "/busybox"}}')
    guest = Guest(SimpleNamespace(directory=tmp_path, agent_socket=tmp_path / "agent.sock"))
    guest.agent = SimpleNamespace(ensure_container=ensure_container)  # type: ignore[assignment]
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(guest.container())
    assert Registry(tmp_path / "containers").names() == ["default"]
