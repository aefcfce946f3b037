"""Test garbage on nsexec's init pipe: every malformed message makes it exit by itself, and leaves no child."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from struct import pack

import pytest

from caisson.agent.libcontainer.config.reader import SpecError
from caisson.agent.libcontainer.config.spec import Spec
from caisson.agent.libcontainer.errors import LaunchError
from caisson.agent.libcontainer.plan import plan, wire
from caisson.agent.libcontainer.plan import wire as steps
from tests.native.nsexec_support import Box, children, config

pytestmark = pytest.mark.root


def _run(nsexec: Path, data: bytes, kind: str = "standard", **more: str) -> tuple[int, bytes]:
    """Send it these bytes and EOF; return its wait status and what it reported on the sync socket."""
    ours, theirs = socket.socketpair()
    ours_sync, theirs_sync = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    env = {
        "_LIBCONTAINER_INITPIPE": str(theirs.fileno()),
        "_LIBCONTAINER_SYNCPIPE": str(theirs_sync.fileno()),
        "_LIBCONTAINER_INITTYPE": kind,
        **more,
    }
    with ours, theirs, ours_sync, theirs_sync:
        actions = [(os.POSIX_SPAWN_DUP2, s.fileno(), s.fileno()) for s in (theirs, theirs_sync)]
        pid = os.posix_spawn(nsexec, ["nsexec"], env, file_actions=actions)
        theirs.close()
        theirs_sync.close()
        try:
            ours.sendall(data)
            ours.shutdown(socket.SHUT_WR)
        except (BrokenPipeError, ConnectionResetError):
            pass
        _, status = os.waitpid(pid, 0)
        ours_sync.settimeout(5)
        said = ours_sync.recv(20000)
    assert children() == []
    return status, said


@pytest.mark.parametrize("number", ["-1", "x", "4294967296", "3 "])
@pytest.mark.parametrize("name", ["_CAISSON_PRESERVED", "_LIBCONTAINER_LOGLEVEL", "_LIBCONTAINER_LOGPIPE"])
def test_the_environment_has_numbers(nsexec_path: Path, name: str, number: str) -> None:
    status, said = _run(nsexec_path, b"", **{name: number})
    assert os.waitstatus_to_exitcode(status) == 1 and name.encode() in said


def _boot(*attributes: bytes) -> bytes:
    body = b"".join(attributes)
    return pack("=IHHII", 16 + len(body), wire.MESSAGE_BOOTSTRAP, 1, 1, 0) + body


def _plan(*attributes: bytes) -> bytes:
    body = b"".join(attributes)
    return wire.bootstrap() + pack("=IHHII", 16 + len(body), wire.MESSAGE_PLAN, 1, 1, 0) + body


def _hook(timeout: int, argc: int, envc: int, strings: bytes) -> bytes:
    return wire.attribute(steps.CREATE_HOOK, pack("=3I", timeout, argc, envc) + strings)


FLAGS = wire.number(wire.CLONE_FLAGS, 0)
VERSION = wire.number(steps.PLAN_VERSION, steps.VERSION)
STATE = wire.text(steps.HOOK_STATE, "{")
BAD = {
    "nothing": b"",
    "half a header": b"\x20\0\0\0\x30\xf2",
    "header only, of more": pack("=IHHII", 64, 62000, 1, 1, 0),
    "wrong type": pack("=IHHII", 16, 62001, 1, 1, 0),
    "error type": pack("=IHHII", 16, 2, 1, 1, 0),
    "message length 0": pack("=IHHII", 0, 62000, 1, 1, 0),
    "message length 15": pack("=IHHII", 15, 62000, 1, 1, 0),
    "message length max": pack("=IHHII", 0xFFFFFFFF, 62000, 1, 1, 0) + bytes(1000),
    "message of 2 MiB": pack("=IHHII", 2 << 20, 62000, 1, 1, 0) + bytes(2 << 20),
    **{f"attribute length {n}": _boot(pack("=HH", n, wire.CLONE_FLAGS), bytes(4)) for n in range(4)},
    "attribute without payload": _boot(pack("=HH", 4, wire.CLONE_FLAGS)),
    "longer than the rest": _boot(pack("=HH", 12, wire.CLONE_FLAGS), bytes(4)),
    "65535": _boot(pack("=HH", 65535, wire.UID_MAP), bytes(100)),
    "padding missing": _boot(pack("=HH", 5, wire.NS_PATHS), b"\0"),
    "attribute header cut": _boot(FLAGS, b"\x08\x00\x91"),
    "duplicate": _boot(FLAGS, FLAGS),
    "unknown low": _boot(wire.number(1, 0)),
    "unknown high": _boot(wire.number(0xFFFF, 0)),
    "unknown between": _boot(wire.number(27300, 0)),
    "a number of 8 bytes": _boot(wire.attribute(wire.CLONE_FLAGS, bytes(8))),
    "a number of 2 bytes": _boot(wire.attribute(wire.CLONE_FLAGS, bytes(2))),
    "a boolean of 1 byte": _boot(wire.attribute(wire.SETGROUPS, b"\1")),
    "a boolean of 2": _boot(wire.attribute(wire.SETGROUPS, b"\2\0\0\0")),
    "flags beyond namespaces": _boot(wire.number(wire.CLONE_FLAGS, 0x100)),
    "no NUL": _boot(wire.attribute(wire.OOM_SCORE_ADJ, b"100 ")),
    "NUL inside": _boot(wire.attribute(wire.OOM_SCORE_ADJ, b"1\0000\0")),
    "empty text": _boot(wire.attribute(wire.OOM_SCORE_ADJ, b"")),
    "maps without a user namespace": _boot(wire.text(wire.UID_MAP, "0 0 1\n")),
    "no plan": wire.bootstrap(),
    "plan without version": _plan(wire.number(steps.PIVOT, 0)),
    "plan of another version": _plan(wire.number(steps.PLAN_VERSION, 2)),
    "empty plan": _plan(VERSION),
    "steps out of order": _plan(VERSION, wire.number(steps.PIVOT, 0), wire.text(steps.ROOTFS, "/")),
    "propagation with other flags": _plan(VERSION, wire.number(steps.PROPAGATION, 0x1000)),
    "step twice": _plan(VERSION, wire.number(steps.PIVOT, 0), wire.number(steps.PIVOT, 0)),
    "unknown step": _plan(VERSION, wire.number(steps.STRINGS + 1, 0)),
    "short mount": _plan(VERSION, wire.attribute(steps.MOUNT, bytes(20))),
    "mount without texts": _plan(VERSION, wire.attribute(steps.MOUNT, bytes(40) + b"abc")),
    "mount with an empty option": _plan(VERSION, wire.attribute(steps.MOUNT, bytes(40) + b"/a\0b\0c\0\0\0\0")),
    "mount with one map": _plan(VERSION, wire.attribute(wire.MOUNT, bytes(40) + b"/a\0b\0c\x000 0 1\n\0\0")),
    "mapped tmpfs": _plan(VERSION, wire.attribute(wire.MOUNT, pack("=I", 32) + bytes(36) + b"/a\0b\0tmpfs\0\0\0")),
    "request of half a header": _plan(VERSION, wire.attribute(wire.NETLINK, b"lo\0" + pack("=I", 4))),
    "request of another length": _plan(VERSION, wire.attribute(wire.NETLINK, b"lo\0" + pack("=I", 32) + bytes(24))),
    "too many groups": _plan(VERSION, *[wire.attribute(wire.GROUPS, bytes(60_000))] * 5),
    "memory policy of half a word": _plan(VERSION, wire.attribute(wire.MEMORY_POLICY, bytes(8))),
    "hook without a state": _plan(VERSION, _hook(0, 1, 0, b"/h\0h\0")),
    "hook with a relative path": _plan(VERSION, STATE, _hook(0, 1, 0, b"h\0h\0")),
    "hook without arguments": _plan(VERSION, STATE, _hook(0, 0, 0, b"/h\0")),
    "hook with fewer strings": _plan(VERSION, STATE, _hook(0, 1, 1, b"/h\0h\0")),
    "hook with more strings": _plan(VERSION, STATE, _hook(0, 1, 0, b"/h\0h\0x\0")),
    "hook with a billion strings": _plan(VERSION, STATE, _hook(0, 1 << 31, 1 << 31, b"/h\0h\0")),
    "hook of a century": _plan(VERSION, STATE, _hook(0x7FFFFFFF, 1, 0, b"/h\0h\0")),
    "hook of half a number": _plan(VERSION, STATE, wire.attribute(steps.CREATE_HOOK, bytes(10))),
    "filter of half an instruction": _plan(VERSION, wire.attribute(steps.SECCOMP, bytes(8))),
    "groups of half a number": _plan(VERSION, wire.attribute(steps.GROUPS, bytes(6))),
    "strings without a program": _plan(VERSION, wire.attribute(steps.STRINGS, pack("=II", 0, 0))),
    "a billion strings": _plan(VERSION, wire.attribute(steps.STRINGS, pack("=II", 1 << 30, 1 << 30))),
}


@pytest.mark.parametrize("data", BAD.values(), ids=BAD.keys())
def test_malformed_messages(nsexec_path: Path, data: bytes) -> None:
    status, said = _run(nsexec_path, data)
    assert os.waitstatus_to_exitcode(status) == 1
    assert said.startswith(b'{"type":"procError","step":"bootstrap"')


def _good() -> bytes:
    return plan.init_messages(Spec.from_json(config("true")), rootfs="/no/such/root", bundle="/", join={}, cgroups={})


def test_an_init_needs_a_mount_namespace(nsexec_path: Path) -> None:
    good = _good()
    length = int.from_bytes(good[:4], "little")
    status, said = _run(nsexec_path, wire.bootstrap(create=0x20000000) + good[length:])
    assert os.waitstatus_to_exitcode(status) == 1
    assert b"namespaces" in said


def _mutations() -> Iterator[bytes]:
    """Yield a valid bootstrap and plan with each 16-bit word replaced by values that lengths should not have."""
    good = _good()
    words = [offset for offset in range(0, len(good), 4) if offset < 200 or offset % 64 == 0]
    for offset in words:
        for value in (0, 3, 0xFFFF):
            yield good[:offset] + pack("=H", value) + good[offset + 2 :]


def test_mutated_messages_never_crash_it(nsexec_path: Path) -> None:
    # The root does not exist: a message that happens to be valid fails there, in stage 2, which this test has to reap.
    for data in _mutations():
        ours, theirs = socket.socketpair()
        pid = os.posix_spawn(
            nsexec_path,
            ["nsexec"],
            {"_LIBCONTAINER_INITPIPE": str(theirs.fileno()), "_LIBCONTAINER_INITTYPE": "standard"},
            file_actions=[(os.POSIX_SPAWN_DUP2, theirs.fileno(), theirs.fileno())],
        )
        with ours, theirs:
            theirs.close()
            ours.sendall(data)
            ours.shutdown(socket.SHUT_WR)
            statuses = [os.waitpid(pid, 0)[1]]
            while True:
                try:
                    statuses.append(os.waitpid(-1, 0)[1])
                except ChildProcessError:
                    break
        assert all(os.WIFEXITED(status) for status in statuses), (data, statuses)
        assert any(os.WEXITSTATUS(status) != 0 for status in statuses), data


@pytest.mark.parametrize("cut", [0.1, 0.5, 0.9, 0.99])
def test_truncated_messages(nsexec_path: Path, cut: float) -> None:
    good = _good()
    status, _ = _run(nsexec_path, good[: int(len(good) * cut)])
    assert os.waitstatus_to_exitcode(status) == 1


def test_strings_fewer_or_more_than_announced(nsexec_path: Path) -> None:
    head = _good()[: -len(wire.strings(["true", "PATH=/bin", "TERM=xterm", "HOME=/root"]))]
    for strings in (["true"], ["true", "PATH=/bin", "TERM=xterm", "HOME=/root", "more"]):
        status, said = _run(nsexec_path, head + wire.strings(strings))
        assert os.waitstatus_to_exitcode(status) == 1
        assert b"bootstrap" in said


@pytest.mark.parametrize("count", [2500, 2600, 6000])
async def test_id_maps_around_the_length_that_wraps(box: Box, count: int) -> None:  # CVE-2021-43784
    """65,530 bytes and more of map text: rejected before anything is spawned, by number or by length."""
    value = config()
    value["linux"]["namespaces"].append({"type": "user"})
    mappings = [{"containerID": n, "hostID": 10**9 + n, "size": 1} for n in range(count)]
    value["linux"]["uidMappings"] = value["linux"]["gidMappings"] = mappings
    with pytest.raises((SpecError, LaunchError), match=r"linux\.uidMappings"):
        await box.create(value)


def test_it_does_nothing_without_an_agent(nsexec_path: Path) -> None:
    pid = os.posix_spawn(
        nsexec_path, ["nsexec"], {}, file_actions=[(os.POSIX_SPAWN_OPEN, 2, "/dev/null", os.O_WRONLY, 0)]
    )
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1


@pytest.mark.parametrize("value", ["", "x", "3x", "-1", "2", "99999999999", "1000"])
def test_descriptors_that_are_none(nsexec_path: Path, value: str) -> None:
    env = {"_LIBCONTAINER_INITPIPE": value, "_LIBCONTAINER_INITTYPE": "standard"}
    pid = os.posix_spawn(nsexec_path, ["nsexec"], env)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1


def test_is_small_and_static(nsexec_path: Path) -> None:
    program = nsexec_path.read_bytes()
    assert len(program) < 100_000
    assert b"/lib/ld-" not in program


def test_its_sources_are_short_and_say_what_they_are_for() -> None:
    for source in (Path(__file__).parents[2] / "agent" / "nsexec").glob("*.[ch]"):
        text = source.read_text()
        assert text.startswith("/*"), source
        assert text.count("\n") <= 600, source
