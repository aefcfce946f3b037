"""Boot one VM for the whole session, and use it as a user does: through the command line."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from caisson.agent.client.guest import Guest
from tests.support.poll import wait_until

ROOT = Path(__file__).resolve().parents[2]

#: Timeout of anything here in seconds, on a busy machine without hardware virtualization.
TIMEOUT = float(os.environ.get("CAISSON_TEST_TIMEOUT", "280"))

#: The command under test, as a shell would parse it: the checkout's, or an installed one.
COMMAND = shlex.split(os.environ.get("CAISSON_COMMAND", "")) or [sys.executable, str(ROOT / "tasks.py")]

#: A directory of images built elsewhere, by template name; an image that is not there is built.
IMAGES = os.environ.get("CAISSON_IMAGES", "")

#: The same if a kernel is compiled, too.
COMPILE_TIMEOUT = 2400


class Caisson:
    """The command line, with this session's own run directory."""

    def __init__(self, run: Path) -> None:
        self.run_directory = run
        self.environment = os.environ | {"CAISSON_RUN": str(run)}

    def argv(self, *words: str) -> list[str]:
        return [*COMMAND, *words]

    def start(self, *words: str, **options: Any) -> subprocess.Popen[bytes]:
        return subprocess.Popen(self.argv(*words), env=self.environment, **options)

    def __call__(self, *words: str, stdin: bytes = b"", timeout: float = TIMEOUT) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            self.argv(*words), env=self.environment, input=stdin, capture_output=True, timeout=timeout
        )

    def info(self, name: str) -> dict[str, Any]:
        return dict(json.loads((self.run_directory / name / "vm.json").read_text()))

    def manifest(self, name: str) -> dict[str, Any]:
        """Return what a VM's image was built from."""
        return dict(json.loads((self.run_directory / name / "image.json").read_text()))

    def make_containers(self, *names: str, vm: str = "default") -> None:
        """Create containers on the guest's own root file system, as the library does: exec creates none."""
        directory = self.run_directory / vm
        machine: Any = SimpleNamespace(directory=directory, agent_socket=directory / "agent.sock")

        async def work() -> None:
            async with Guest(machine) as guest:
                for name in names:
                    await guest.container(name)

        asyncio.run(work())

    def leftovers(self) -> list[str]:
        """Return processes and files of VMs in this session's run directory."""
        walk = os.walk(self.run_directory)  # skips what is removed meanwhile
        found = [f"{place}/{name}" for place, names, files in walk for name in names + files]
        for process in Path("/proc").glob("[0-9]*"):
            try:
                words = (process / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if any(str(self.run_directory).encode() in word for word in words):
                found.append(b" ".join(words).decode(errors="replace"))
        return found


@contextlib.contextmanager
def fresh() -> Iterator[Caisson]:
    """Provide the command line with its own run directory, in which nothing may be left at the end."""
    # Short: the path of a Unix socket holds 107 bytes.
    path = Path(tempfile.mkdtemp(prefix="caisson-", dir="/tmp"))
    caisson = Caisson(path)
    try:
        yield caisson
        wait_until(lambda: not caisson.leftovers(), "nothing is left", found=caisson.leftovers)
    finally:
        if caisson.leftovers():  # a test failed before it got there
            caisson("stop-vm", "--all")
        shutil.rmtree(path)


@pytest.fixture(scope="session")
def caisson() -> Iterator[Caisson]:
    """Provide the session's command line, with the booted VM."""
    with fresh() as caisson:
        yield caisson


@pytest.fixture
def own() -> Iterator[Caisson]:
    """Provide a command line for one test only."""
    with fresh() as caisson:
        yield caisson


def built(*words: str) -> Path:
    """Return the directory of an image, built if necessary: a kernel from source takes minutes, once."""
    if IMAGES and (elsewhere := Path(IMAGES) / words[-1]).is_dir():
        return elsewhere
    done = subprocess.run((*COMMAND, "build-image", *words), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


@pytest.fixture(scope="session")
def lean() -> Path:
    """Provide an image with a custom kernel.  A test that uses it needs COMPILE_TIMEOUT."""
    return built("--template", "lean")


def image_of_snapshots() -> tuple[str, ...]:
    """Return options of save-snapshot for the image: none, unless images were built elsewhere."""
    elsewhere = Path(IMAGES) / "lean"
    return ("--image", str(elsewhere)) if IMAGES and elsewhere.is_dir() else ()


@pytest.fixture(scope="session")
def vm(caisson: Caisson) -> Iterator[Caisson]:
    """Provide the command line, with a running VM called `default`."""
    booted = caisson("boot-vm", "--detach")
    assert booted.returncode == 0, booted.stderr.decode()
    yield caisson
    stopped = caisson("stop-vm", "--all")
    assert stopped.returncode == 0, stopped.stderr.decode()
