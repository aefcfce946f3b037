"""Test listeners of seccomp filters: an agent on a Unix socket answers instead of the kernel."""

from __future__ import annotations

import array
import fcntl
import json
import os
import platform
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from caisson.agent.client.seccomp import BY_CAPABILITY, PERMITTED
from caisson.agent.libcontainer.config.reader import SpecError
from caisson.agent.libcontainer.config.spec import Spec
from caisson.agent.libcontainer.errors import LaunchError
from caisson.agent.libcontainer.process.listener import Listener
from caisson.agent.libcontainer.process.nsexec import Nsexec
from caisson.agent.libcontainer.state import OCI_VERSION
from tests.native.nsexec_support import Box, config, make_rootfs
from tests.native.test_seccomp import NATIVE

pytestmark = pytest.mark.root

CONTINUE = 1  # SECCOMP_USER_NOTIF_FLAG_CONTINUE
MKDIR = {"x86_64": (83, 258), "aarch64": (34,)}[platform.machine()]
NOTIF_RECV, NOTIF_SEND = 0xC0502100, 0xC0182101  # seccomp_unotify(2), struct seccomp_notif and seccomp_notif_resp
ENOMEDIUM = 123


class Agent:
    """Answers notifications of every listener that it receives: ENOMEDIUM for mkdir, continue for others."""

    def __init__(self, path: Path) -> None:
        self.states: list[dict[str, Any]] = []
        self._server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._server.bind(str(path))
        self._server.listen(8)
        self._threads = [threading.Thread(target=self._serve)]
        self._threads[0].start()

    def _serve(self) -> None:
        while True:
            connection, _ = self._server.accept()
            with connection:
                data, ancillary, _, _ = connection.recvmsg(65536, 1024)
                if not data:
                    return
                while True:
                    try:
                        self.states.append(json.loads(data))
                        break
                    except ValueError:
                        data += connection.recv(65536)
            fds = array.array("i", b"".join(payload for _, _, payload in ancillary))
            thread = threading.Thread(target=self._answer, args=(fds[0],))
            self._threads.append(thread)
            thread.start()

    def _answer(self, listener: int) -> None:
        """Answer until no process has the filter any more."""
        notification = bytearray(80)
        try:
            while True:
                notification[:] = bytes(80)
                fcntl.ioctl(listener, NOTIF_RECV, notification)
                found, _, _, number = struct.unpack_from("=QIIi", notification)
                answer = (0, -ENOMEDIUM, 0) if number in MKDIR else (0, 0, CONTINUE)
                fcntl.ioctl(listener, NOTIF_SEND, struct.pack("=QqiI", found, *answer))
        except OSError:  # ENOENT
            os.close(listener)

    def close(self) -> None:
        name = self._server.getsockname()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(name)
        for thread in self._threads:
            thread.join(10)
        self._server.close()


@pytest.fixture
def agent(box: Box) -> Iterator[Agent]:
    agent = Agent(box.path / "agent.sock")
    yield agent
    for launched in box.created:  # a listener ends with the last process of its filter
        if not launched.child.status.done():  # type: ignore[attr-defined]
            os.kill(launched.child.pid, 9)
            box.run(launched.child.wait())
    agent.close()


def with_listener(
    box: Box, *args: str, names: tuple[str, ...] = ("mkdir", "mkdirat"), **process: Any
) -> dict[str, Any]:
    value = config(*args, **process)
    value["annotations"] = {"some": "thing"}
    value["linux"]["seccomp"] = {
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": [NATIVE],
        "flags": ["SECCOMP_FILTER_FLAG_TSYNC"],
        "listenerPath": str(box.path / "agent.sock"),
        "listenerMetadata": "for the agent",
        "syscalls": [{"names": list(names), "action": "SCMP_ACT_NOTIFY"}],
    }
    return value


@pytest.mark.parametrize("user", [0, 1000])
@pytest.mark.parametrize("no_new_privs", [False, True])
def test_an_agent_answers_for_the_kernel(box: Box, agent: Agent, no_new_privs: bool, user: int) -> None:
    script = ["sh", "-c", "mkdir /tmp/x || grep -E '^(CapPrm|CapEff|NoNewPrivs)' /proc/self/status"]
    own = ["CAP_KILL"]
    value = with_listener(
        box,
        *script,
        noNewPrivileges=no_new_privs,
        user={"uid": user, "gid": user},
        capabilities={name: own for name in ("bounding", "effective", "permitted")},
    )

    async def work() -> tuple[int, int, str, str]:
        with box.stdio() as (stdio, out, err):
            launched = await box.create(value, stdio=stdio)
            await box.start(launched)
            await launched.child.wait()
            return launched.child.pid, launched.child.status.result(), out.read_text(), err.read_text()  # type: ignore[attr-defined]

    pid, status, out, err = box.run(work())
    assert (status, err) == (0, "mkdir: can't create directory '/tmp/x': No medium found\n")
    rights = "0" * 14 + ("20" if user == 0 else "00")
    assert out.split() == ["CapPrm:", rights, "CapEff:", rights, "NoNewPrivs:", str(int(no_new_privs))]
    (state,) = agent.states
    assert state == {
        "ociVersion": OCI_VERSION,
        "fds": ["seccompFd"],
        "pid": pid,
        "metadata": "for the agent",
        "state": {
            "ociVersion": OCI_VERSION,
            "id": "box",
            "status": "creating",
            "pid": pid,
            "bundle": str(box.path),
            "annotations": {"some": "thing"},
        },
    }


@pytest.mark.parametrize("no_new_privs", [False, True])
async def test_a_process_that_joins_has_a_listener_of_its_own(box: Box, agent: Agent, no_new_privs: bool) -> None:
    value = with_listener(box, "sleep", "1000", noNewPrivileges=no_new_privs)

    init = await box.running(value)
    pid, result = init.child.pid, await box.exec(init, {"args": ["mkdir", "/tmp/x"]}, value)
    assert result == (1, "", "mkdir: can't create directory '/tmp/x': No medium found\n")
    first, other = agent.states
    assert first["pid"] == pid == other["state"]["pid"] != other["pid"]
    assert (first["state"]["status"], other["state"]["status"]) == ("creating", "running")


@pytest.mark.parametrize("no_new_privs", [False, True])
async def test_system_calls_that_nsexec_makes_itself(box: Box, agent: Agent, no_new_privs: bool) -> None:
    """The agent has the listener before nsexec makes a call that it has to answer."""
    names = ("execve", "openat", "open", "read", "close", "setsid", "ioctl", "prlimit64")
    value = with_listener(box, "sleep", "1000", names=names, noNewPrivileges=no_new_privs)

    init = await box.running(value)
    assert (await box.exec(init, {"args": ["echo", "fine"], "noNewPrivileges": no_new_privs}, value)) == (
        0,
        "fine\n",
        "",
    )


@pytest.mark.parametrize("no_new_privs", [False, True])
async def test_every_system_call_may_be_asked_about(box: Box, agent: Agent, no_new_privs: bool) -> None:
    """Except write, with which nsexec reports that there is a listener."""
    names = {*PERMITTED.split(), *" ".join(BY_CAPABILITY.values()).split(), "keyctl", "pivot_root", "clone", "socket"}
    value = with_listener(box, "sleep", "1000", names=tuple(sorted(names - {"write"})), noNewPrivileges=no_new_privs)

    init = await box.running(value)
    process = {"args": ["sh", "-c", "echo fine; mkdir /tmp/x"], "noNewPrivileges": no_new_privs}
    status, out, err = await box.exec(init, process, value)
    assert (status, out) == (1, "fine\n") and "No medium found" in err
    with pytest.raises(LaunchError, match="no such file or directory"):  # its last calls are notified, too
        await box.exec(init, {"args": ["/no/such/program"], "noNewPrivileges": no_new_privs}, value)


@pytest.mark.parametrize("no_new_privs", [False, True])
async def test_an_agent_that_never_answers_holds_up_nothing_for_ever(
    sealed: Nsexec, tmp_path: Path, no_new_privs: bool
) -> None:
    tmp_path.chmod(0o755)
    names = ("openat", "open", "close", "setsid", "prctl", "capset", "setresuid", "fchdir", "chdir", "execve")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as silent:
        silent.bind(str(tmp_path / "agent.sock"))
        silent.listen(8)
        box = Box(tmp_path, make_rootfs(tmp_path / "rootfs"), sealed, timeout=1.0)
        value = with_listener(box, "true", names=names, noNewPrivileges=no_new_privs)
        with pytest.raises(LaunchError, match="nsexec took longer than 1 s and was killed"):
            await box.start(await box.create(value))
        await box.close()  # no child, no descriptor


async def test_without_an_agent_nothing_is_created(box: Box) -> None:
    with pytest.raises(LaunchError, match=r"failed to connect with seccomp agent .*agent\.sock: no such file"):
        await box.output(with_listener(box, "true"))


def test_the_thread_that_sends_a_listener_closes_it(box: Box) -> None:
    """Its caller may have stopped waiting, and the descriptor's number must not be another's by then."""
    spec, fd = Spec.from_json(with_listener(box, "true")), os.eventfd(0)
    with pytest.raises(LaunchError, match="failed to connect"):
        Listener(spec, "box", str(box.path)).send(fd, os.getpid())
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"defaultAction": "SCMP_ACT_NOTIFY"}, "SCMP_ACT_NOTIFY cannot be used as the default action"),
        ({"syscalls": [{"names": ["write"], "action": "SCMP_ACT_NOTIFY"}]}, "cannot be used for the write syscall"),
        ({"listenerPath": "", "listenerMetadata": ""}, "listenerPath: is missing"),
    ],
)
async def test_profiles_that_would_hang(box: Box, change: dict[str, Any], why: str) -> None:
    value = with_listener(box, "true")
    value["linux"]["seccomp"] |= change
    with pytest.raises(SpecError, match=why):
        await box.output(value)
