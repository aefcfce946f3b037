"""Test cp's scripts with the shells and tools found in containers, run on this machine instead of in a container."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import stat
import subprocess
import threading
import uuid
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from caisson.agent.client import AgentError
from caisson.agent.client import copy as copying
from caisson.agent.client.bulk import STOP_TIMEOUT
from caisson.agent.client.errors import CopyError
from caisson.agent.rpc.codes import StatusCode
from tests.support.poll import wait_until


class LocalProcess:
    """A process on this machine with the methods of BulkProcess, which finds the tools of a directory."""

    def __init__(self, tools: Path) -> None:
        self.exec_id = uuid.uuid4().hex
        self._path = str(tools)
        self.running: subprocess.Popen[bytes] | None = None

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self.running is not None
        return self.running

    def start(self, document: Mapping[str, Any], timeout: float | None = None) -> None:
        words = [shutil.which(document["args"][0], path=self._path) or "", *document["args"][1:]]
        pipe = subprocess.PIPE
        self.running = subprocess.Popen(
            words, bufsize=0, stdin=pipe, stdout=pipe, stderr=pipe, env={"PATH": self._path, "LC_ALL": "C"}
        )

    def send(self, data: memoryview) -> None:
        assert self.process.stdin is not None
        try:
            while data:
                data = data[self.process.stdin.write(data) :]
        except BrokenPipeError as error:
            raise AgentError(StatusCode.FAILED_PRECONDITION, "stdin is closed") from error

    def end_input(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()

    def receive(self) -> memoryview:
        assert self.process.stdout is not None
        return memoryview(os.read(self.process.stdout.fileno(), 1 << 16))

    def read(self, method: str) -> memoryview:
        assert self.process.stderr is not None and method == "ReadStderr"
        return memoryview(os.read(self.process.stderr.fileno(), 1 << 16))

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self) -> int:
        return self.process.wait()

    def stop(self) -> None:
        if self.running is not None:
            self.process.terminate()
            self.end_input()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_TIMEOUT)

    def close(self) -> None:
        if self.running is not None:
            self.process.kill()
            self.process.wait()


class Container:
    """Runs a container's commands here, with the tools of a directory."""

    def __init__(self, tools: Path) -> None:
        self._tools = tools
        self.ran: list[LocalProcess] = []

    def copy(self, way: str, source: str, target: str) -> list[str]:
        process: Any = LocalProcess(self._tools)
        self.ran.append(process)
        return (copying.put if way == "in" else copying.get)(process, source, target)


@pytest.fixture(params=["busybox", "host"])
def container(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Container]:
    made = Container(Path("/usr/bin") if request.param == "host" else busybox_tools(tmp_path))
    yield made
    for one in made.ran:
        if one.running is not None:
            for stream in (one.running.stdin, one.running.stdout, one.running.stderr):
                assert stream is not None
                stream.close()


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
def test_directories_go_where_cp_puts_them(
    container: Container, source: Path, inside: Path, way: str, suffix: str, target: str, there: bool, found: str
) -> None:
    if there:
        (inside / "new").mkdir(mode=0o711)
    words = f"{source}{suffix}", f"{inside}/{target}"
    assert container.copy(way, *words) == []
    assert listed(inside / found) - ({"tree"} if there else set()) == TREE
    assert (inside / found / "sub/file").read_bytes() == b"data" and (inside / found / "link").is_symlink()
    assert (inside / found / "same").stat().st_ino == (inside / found / "sub/file").stat().st_ino
    if there:
        assert stat.S_IMODE((inside / "new").stat().st_mode) == 0o711
    assert not [path for path in inside.rglob(".caisson-*")]


@pytest.mark.parametrize("way", ["in", "out"])
def test_a_tree_is_merged_into_what_is_there(container: Container, source: Path, inside: Path, way: str) -> None:
    (inside / "sub").mkdir(mode=0o700)
    (inside / "sub/other").write_text("kept")
    (inside / "sub/file").write_text("old")
    (inside / "sub/file").chmod(0o600)
    container.copy(way, f"{source}/.", str(inside))
    assert listed(inside) == TREE | {"sub/other"}
    assert stat.S_IMODE((inside / "sub").stat().st_mode) == 0o700
    assert stat.S_IMODE((inside / "sub/file").stat().st_mode) == 0o600
    assert (inside / "sub/file").read_bytes() == b"data"


@pytest.mark.parametrize("way", ["in", "out"])
@pytest.mark.parametrize("name", [b"\xe9", b"a b'\"\\%$\n", b"-n", b"\xff\n"])
def test_names_are_bytes(container: Container, tmp_path: Path, inside: Path, way: str, name: bytes) -> None:
    (tmp_path / os.fsdecode(name)).write_bytes(name)
    words = f"{tmp_path}/{os.fsdecode(name)}", str(inside)
    container.copy(way, *words)
    assert [os.fsencode(path.name) for path in inside.iterdir()] == [name]
    container.copy(way, words[0], f"{inside}/{os.fsdecode(name)}.2")
    assert len(list(inside.iterdir())) == 2


@pytest.mark.parametrize("way", ["in", "out"])
def test_sockets_and_devices_are_named(container: Container, source: Path, inside: Path, way: str) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(source / "s"))
        with pytest.raises(CopyError, match=r"/s: a socket cannot be copied"):
            container.copy(way, f"{source}/s", str(inside))
        with pytest.raises(CopyError, match="/dev/null: a device cannot be copied"):
            container.copy(way, "/dev/null", str(inside))
        (left_out,) = container.copy(way, str(source), f"{inside}/new")
    assert "s" in left_out and listed(inside / "new") == TREE


@pytest.mark.parametrize("way", ["in", "out"])
@pytest.mark.parametrize("path", ["/proc/self/status", "/proc/cpuinfo", "/sys/kernel/mm/transparent_hugepage/enabled"])
def test_files_of_the_kernel_are_read_to_their_end(container: Container, inside: Path, way: str, path: str) -> None:
    if not Path(path).exists():
        pytest.skip(f"no {path}")
    container.copy(way, path, f"{inside}/copy")
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
def test_what_cannot_be_copied_is_one_line(
    container: Container, source: Path, inside: Path, way: str, given: str, target: str, why: str
) -> None:
    (inside / "file").write_text("kept")
    (inside / "full/same").mkdir(parents=True)
    names = {"source": source, "inside": inside}
    with pytest.raises(CopyError, match=why) as error:
        container.copy(way, given.format(**names), target.format(**names))
    assert "\n" not in str(error.value)
    assert listed(inside) == {"file", "full", "full/same"} and (inside / "file").read_text() == "kept"


@pytest.mark.parametrize("way", ["in", "out"])
def test_a_device_is_written_to_and_stays(container: Container, source: Path, way: str) -> None:
    before = Path("/dev/null").stat()
    container.copy(way, f"{source}/same", "/dev/null")
    assert os.path.samestat(before, Path("/dev/null").stat())


def test_a_directory_that_takes_no_files_is_named(container: Container, source: Path) -> None:
    with pytest.raises(CopyError) as error:
        container.copy("in", f"{source}/sub/file", "/proc/new")
    assert str(error.value) == "/proc: No such file or directory"


def test_a_full_device_is_named(container: Container, source: Path) -> None:
    with pytest.raises(CopyError) as error:
        container.copy("out", f"{source}/sub/file", "/dev/full")
    assert str(error.value) == "/dev/full: No space left on device"


@pytest.mark.parametrize("way", ["in", "out"])
def test_interrupted_it_leaves_no_process_and_no_partial_file(
    container: Container, tmp_path: Path, inside: Path, way: str
) -> None:
    with (tmp_path / "big").open("wb") as big:
        big.truncate(2 << 30)
    (inside / "big").write_text("before")

    def interrupt() -> None:
        wait_until(lambda: container.ran and container.ran[0].running, "it has started")
        wait_until(lambda: list(inside.glob(".caisson-*")), "it is copying")
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

    def raise_it(*_: object) -> None:
        raise Interrupted

    before = signal.signal(signal.SIGUSR1, raise_it)
    interrupter = threading.Thread(target=interrupt)
    interrupter.start()
    try:
        with pytest.raises(Interrupted):
            container.copy(way, str(tmp_path / "big"), str(inside))
    finally:
        interrupter.join()
        signal.signal(signal.SIGUSR1, before)
    (process,) = container.ran
    assert process.process.returncode not in (None, -signal.SIGKILL)
    assert [path.name for path in inside.iterdir()] == ["big"] and (inside / "big").read_text() == "before"


class Interrupted(BaseException):
    """What Ctrl-C raises."""
