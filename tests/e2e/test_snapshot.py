"""Test many simultaneous clones of one saved guest: each is a separate machine, and the snapshot is unchanged.

CAISSON_CLONES is their number (4, so that CI runs it as well; 20 for the full run).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from caisson.agent import client
from caisson.image.build.cache import default_root
from caisson.proto.kata1 import oci_pb2
from tests.e2e.conftest import COMPILE_TIMEOUT, TIMEOUT, Caisson, fresh, image_of_snapshots

pytestmark = [pytest.mark.vm, pytest.mark.timeout(COMPILE_TIMEOUT)]

CLONES = int(os.environ.get("CAISSON_CLONES", "4"))
MEMORY = "192"

#: What each clone is asked, one item per line.
QUESTIONS = (
    "cat /proc/sys/kernel/hostname /run/machine-id /proc/sys/kernel/random/boot_id /proc/sys/kernel/random/uuid;"
    "head -c 16 /dev/urandom | md5sum; date +%s"
)


@dataclass(frozen=True)
class Answer:
    """A clone's answers; the last one is the interval of host time in which it gave its date."""

    hostname: str
    machine_id: str
    boot_id: str
    uuid: str
    random: str
    date: int
    window: tuple[float, float]


@pytest.fixture(scope="module")
def snapshot() -> Iterator[str]:
    """Provide the name of this session's own snapshot."""
    name = f"e2e-{os.getpid()}"
    with fresh() as caisson:
        saved = caisson(
            "save-snapshot", "--name", name, "--memory", MEMORY, *image_of_snapshots(), timeout=COMPILE_TIMEOUT
        )
        assert saved.returncode == 0, saved.stderr.decode()
    yield name
    shutil.rmtree(default_root() / "snapshots" / name)


@contextlib.contextmanager
def clones(caisson: Caisson, snapshot: str, count: int) -> Iterator[list[str]]:
    names = [f"clone{number}" for number in range(count)]
    try:
        commands = [caisson.start("boot-vm", "--snapshot", snapshot, "--name", n, "--detach", stderr=-1) for n in names]
        for command in commands:
            _, errors = command.communicate(timeout=TIMEOUT)
            assert command.returncode == 0, errors.decode()
        yield names
    finally:
        assert caisson("stop-vm", "--all").returncode == 0


async def ask(caisson: Caisson, name: str) -> Answer:
    """Run a container in a clone, and get its answers."""
    async with client.Agent.connect(caisson.run_directory / name / "agent.sock") as agent:
        await agent.create_sandbox()
        rootfs = caisson.manifest(name)["containers"]["busybox"]
        spec = client.default_spec(rootfs, hostname="")
        spec.Mounts.append(
            oci_pb2.Mount(destination="/run/machine-id", source="/run/machine-id", type="bind", options=["bind", "ro"])
        )
        container = await agent.ensure_container("c", spec)
        began = time.time()
        process = await container.exec(["sh", "-c", QUESTIONS], env=[client.PATH])
        output = b"".join([data async for data in process.stdout()])
        assert await process.wait() == 0
        lines = output.decode().split("\n")
        return Answer(*lines[:5], int(lines[5]), (began, time.time()))  # type: ignore[arg-type, call-arg]


async def ask_all(caisson: Caisson, names: list[str]) -> list[Answer]:
    return await asyncio.gather(*(ask(caisson, name) for name in names))


def digests(snapshot: str) -> list[str]:
    directory = default_root() / "snapshots" / snapshot
    return [hashlib.sha256((directory / name).read_bytes()).hexdigest() for name in ("ram", "state", "snapshot.json")]


def test_each_clone_is_a_machine_of_its_own(own: Caisson, snapshot: str) -> None:
    before = digests(snapshot)
    with clones(own, snapshot, CLONES) as names:
        answers = asyncio.run(ask_all(own, names))
        infos = [own.info(name) for name in names]
    assert [answer.hostname for answer in answers] == names
    for field in ("machine_id", "boot_id", "uuid", "random"):
        assert len({getattr(answer, field) for answer in answers}) == CLONES, field
    assert all(len(answer.machine_id) == 32 for answer in answers)
    assert len({info["cid"] for info in infos}) == CLONES
    assert {info["snapshot"] for info in infos} == {snapshot}
    for answer in answers:
        began, ended = answer.window
        assert began - 2 < answer.date <= ended + 1, answer  # accurate to a second; fractions were cut off
    assert digests(snapshot) == before


def test_a_command_in_a_clone_and_its_end(own: Caisson, snapshot: str) -> None:
    with clones(own, snapshot, 1) as (name,):
        done = own("exec", "--name", name, "--", "sh", "-c", "echo out; exit 7")
        assert (done.returncode, done.stdout) == (7, b"out\n")


@pytest.mark.parametrize(
    ("words", "status", "complaint"),
    [
        (["--snapshot", "nobody-saved-this"], 1, b"save it: caisson save-snapshot nobody-saved-this"),
        (["--snapshot", "../x"], 2, b"snapshot '../x': is not a name"),
    ],
)
def test_a_template_that_is_not_there(own: Caisson, words: list[str], status: int, complaint: bytes) -> None:
    refused = own("boot-vm", "--detach", *words)
    assert refused.returncode == status
    assert complaint in refused.stderr
    assert b"Traceback" not in refused.stderr


def test_snapshot_rejects_other_settings(own: Caisson, snapshot: str) -> None:
    more = own("boot-vm", "--detach", "--snapshot", snapshot, "--memory", "512")
    assert more.returncode == 2
    assert b"cannot be combined with" in more.stderr
    file = default_root() / "snapshots" / snapshot / "snapshot.json"
    text = file.read_text()
    saved = json.loads(text)["compatibility"]
    try:
        file.write_text(text.replace(saved["qemu"], "6.66"))
        other = own("boot-vm", "--detach", "--snapshot", snapshot)
    finally:
        file.write_text(text)
    assert other.returncode == 1
    assert b"QEMU was 6.66, and is " + saved["qemu"].encode() in other.stderr


def test_a_template_is_replaced_under_a_running_clone(own: Caisson, snapshot: str) -> None:
    file: Path = default_root() / "snapshots" / snapshot / "ram"
    before = file.stat().st_ino
    with clones(own, snapshot, 1) as (name,):
        saved = own("save-snapshot", "--name", snapshot, "--memory", MEMORY, *image_of_snapshots())
        assert saved.returncode == 0, saved.stderr.decode()
        assert file.stat().st_ino != before
        assert own("exec", "--name", name, "--", "true").returncode == 0
