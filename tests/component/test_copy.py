"""Test cp's scripts with the shells and tools found in containers, run on this machine instead of in a container."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from caisson.agent.client import AgentError
from caisson.agent.client import copy as copying
from caisson.agent.client.connection import Process
from caisson.agent.client.errors import CopyError
from caisson.agent.rpc.codes import StatusCode


class LocalProcess:
    """A process on this machine with the methods of Process."""

    feed, _ahead = Process.feed, 1

    def __init__(self, exec_id: str) -> None:
        self.exec_id = exec_id
        self.running: asyncio.subprocess.Process | None = None

    @property
    def process(self) -> asyncio.subprocess.Process:
        assert self.running is not None
        return self.running

    async def write(self, data: bytes) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(data)
            await self.process.stdin.drain()
        except ConnectionError as error:
            raise AgentError(StatusCode.FAILED_PRECONDITION, "stdin is closed") from error

    async def close_stdin(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()

    async def stdout(self) -> AsyncIterator[bytes]:
        assert self.process.stdout is not None
        while data := await self.process.stdout.read(1 << 16):
            yield data

    async def stderr(self) -> AsyncIterator[bytes]:
        assert self.process.stderr is not None
        while data := await self.process.stderr.read(1 << 16):
            yield data

    async def signal(self, number: int) -> None:
        if self.process.returncode is not None:
            raise AgentError(StatusCode.NOT_FOUND, "no such process")
        self.process.send_signal(number)

    async def wait(self) -> int:
        return await self.process.wait()


class LocalContainer:
    """Runs a container's commands here, with the tools of a directory."""

    def __init__(self, tools: Path) -> None:
        self._path = tools
        self.ran: list[LocalProcess] = []

    def process(self, exec_id: str) -> LocalProcess:
        self.ran.append(LocalProcess(exec_id))
        return self.ran[-1]

    async def exec(self, words: list[str], env: list[str], exec_id: str) -> LocalProcess:
        process = self.ran[-1]
        words = [shutil.which(words[0], path=str(self._path)) or words[0], *words[1:]]
        pipe = asyncio.subprocess.PIPE
        process.running = await asyncio.create_subprocess_exec(
            *words, stdin=pipe, stdout=pipe, stderr=pipe, env={"PATH": str(self._path), "LC_ALL": "C"}
        )
        return process


@pytest.fixture(params=["busybox", "host"])
async def container(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Any]:
    made = LocalContainer(Path("/usr/bin") if request.param == "host" else busybox_tools(tmp_path))
    yield made
    for process in (one for one in made.ran if one.running):
        transport: Any = process.process._transport  # type: ignore[attr-defined]
        transport.close()  # a pipe that nobody has read to EOF


def busybox_tools(tmp_path: Path) -> Path:
    busybox = shutil.which("busybox")
    assert busybox is not None
    tools = tmp_path / "tools"
    tools.mkdir()
    for applet in ("sh", "tar", "mkdir", "mv", "rm", "cp", "stat", "chmod", "readlink", "cat"):
        (tools / applet).symlink_to(busybox)
    return tools


@pytest.fixture
def inside(tmp_path: Path) -> Path:
    """Provide a directory in the container."""
    (tmp_path / "inside").mkdir()
    return tmp_path / "inside"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    tree = tmp_path / "tree"
    (tree / "sub").mkdir(parents=True)
    (tree / "sub/file").write_bytes(b"data")
    (tree / "sub/file").chmod(0o751)
    (tree / ".hidden").touch()
    (tree / "link").symlink_to("sub")
    os.mkfifo(tree / "pipe")
    os.link(tree / "sub/file", tree / "same")
    return tree


def listed(place: Path) -> set[str]:
    return {str(path.relative_to(place)) for path in place.rglob("*")}


TREE = {"sub", "sub/file", ".hidden", "link", "pipe", "same"}


@pytest.mark.parametrize("way", ["in", "out"])
@pytest.mark.parametrize(
    ("suffix", "target", "there", "found"),
    [
        ("", "new", False, "new"),
        ("", "new", True, "new/tree"),
        ("/", "new", False, "new"),
        ("/.", "new", False, "new"),
        ("/.", "new", True, "new"),
        ("", "new/", True, "new/tree"),
        ("/.", "new/", True, "new"),
        ("", "new/.", True, "new/tree"),
    ],
)
async def test_directories_go_where_cp_puts_them(
    container: Any, source: Path, inside: Path, way: str, suffix: str, target: str, there: bool, found: str
) -> None:
    if there:
        (inside / "new").mkdir(mode=0o711)
    words = f"{source}{suffix}", f"{inside}/{target}"
    assert await (copying.put if way == "in" else copying.get)(container, *words) == []
    assert listed(inside / found) - ({"tree"} if there else set()) == TREE
    assert (inside / found / "sub/file").read_bytes() == b"data" and (inside / found / "link").is_symlink()
    assert (inside / found / "same").stat().st_ino == (inside / found / "sub/file").stat().st_ino
    if there:
        assert stat.S_IMODE((inside / "new").stat().st_mode) == 0o711
    assert not [path for path in inside.rglob(".caisson-*")]


@pytest.mark.parametrize("way", ["in", "out"])
async def test_a_tree_is_merged_into_what_is_there(container: Any, source: Path, inside: Path, way: str) -> None:
    (inside / "sub").mkdir(mode=0o700)
    (inside / "sub/other").write_text("kept")
    (inside / "sub/file").write_text("old")
    (inside / "sub/file").chmod(0o600)
    await (copying.put if way == "in" else copying.get)(container, f"{source}/.", str(inside))
    assert listed(inside) == TREE | {"sub/other"}
    assert stat.S_IMODE((inside / "sub").stat().st_mode) == 0o700
    assert stat.S_IMODE((inside / "sub/file").stat().st_mode) == 0o600
    assert (inside / "sub/file").read_bytes() == b"data"


@pytest.mark.parametrize("way", ["in", "out"])
@pytest.mark.parametrize("name", [b"\xe9", b"a b'\"\\%$\n", b"-n", b"\xff\n"])
async def test_names_are_bytes(container: Any, tmp_path: Path, inside: Path, way: str, name: bytes) -> None:
    (tmp_path / os.fsdecode(name)).write_bytes(name)
    words = f"{tmp_path}/{os.fsdecode(name)}", str(inside)
    await (copying.put if way == "in" else copying.get)(container, *words)
    assert [os.fsencode(path.name) for path in inside.iterdir()] == [name]
    await (copying.put if way == "in" else copying.get)(container, words[0], f"{inside}/{os.fsdecode(name)}.2")
    assert len(list(inside.iterdir())) == 2


@pytest.mark.parametrize("way", ["in", "out"])
async def test_sockets_and_devices_are_named(container: Any, source: Path, inside: Path, way: str) -> None:
    work = copying.put if way == "in" else copying.get
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(source / "s"))
        with pytest.raises(CopyError, match=r"/s: a socket cannot be copied"):
            await work(container, f"{source}/s", str(inside))
        with pytest.raises(CopyError, match="/dev/null: a device cannot be copied"):
            await work(container, "/dev/null", str(inside))
        (left_out,) = await work(container, str(source), f"{inside}/new")
    assert "s" in left_out and listed(inside / "new") == TREE


@pytest.mark.parametrize("way", ["in", "out"])
@pytest.mark.parametrize("path", ["/proc/self/status", "/proc/cpuinfo", "/sys/kernel/mm/transparent_hugepage/enabled"])
async def test_files_of_the_kernel_are_read_to_their_end(container: Any, inside: Path, way: str, path: str) -> None:
    if not Path(path).exists():
        pytest.skip(f"no {path}")
    await (copying.put if way == "in" else copying.get)(container, path, f"{inside}/copy")
    copied = (inside / "copy").read_bytes()
    assert copied and b"\0" not in copied
    if "self" not in path:
        assert copied[:40] == Path(path).read_bytes()[:40]


@pytest.mark.parametrize("way", ["in", "out"])
@pytest.mark.parametrize(
    ("given", "target", "why"),
    [
        ("{source}/missing", "{inside}", "No such file or directory"),
        ("{source}/same/", "{inside}", "Not a directory|No such file or directory"),
        ("{source}/same", "{inside}/no/", "no such directory"),
        ("{source}/same", "{inside}/no/x", "no such directory"),
        ("{source}", "{inside}/file", "not a directory|is not a directory"),
        ("{source}/same", "{inside}/full", "is a directory|directory"),
    ],
)
async def test_what_cannot_be_copied_is_one_line(
    container: Any, source: Path, inside: Path, way: str, given: str, target: str, why: str
) -> None:
    (inside / "file").write_text("kept")
    (inside / "full/same").mkdir(parents=True)
    names = {"source": source, "inside": inside}
    with pytest.raises(CopyError, match=why) as error:
        await (copying.put if way == "in" else copying.get)(container, given.format(**names), target.format(**names))
    assert "\n" not in str(error.value)
    assert listed(inside) == {"file", "full", "full/same"} and (inside / "file").read_text() == "kept"


@pytest.mark.parametrize("way", ["in", "out"])
async def test_a_device_is_written_to_and_stays(container: Any, source: Path, way: str) -> None:
    before = Path("/dev/null").stat()
    await (copying.put if way == "in" else copying.get)(container, f"{source}/same", "/dev/null")
    assert os.path.samestat(before, Path("/dev/null").stat())


@pytest.mark.parametrize("way", ["in", "out"])
async def test_interrupted_it_leaves_no_process_and_no_partial_file(
    container: Any, tmp_path: Path, inside: Path, way: str
) -> None:
    with (tmp_path / "big").open("wb") as big:
        big.truncate(2 << 30)
    work = copying.put if way == "in" else copying.get
    (inside / "big").write_text("before")
    task = asyncio.create_task(work(container, str(tmp_path / "big"), str(inside)))
    while not [path for path in inside.iterdir() if path.name.startswith(".caisson-")] or not container.ran[0].running:
        await asyncio.sleep(0.01)
        assert not task.done()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    (process,) = container.ran
    assert process.process.returncode is not None
    assert [path.name for path in inside.iterdir()] == ["big"] and (inside / "big").read_text() == "before"
