"""A guest of each architecture, built on this one: what this machine's processor cannot run, QEMU emulates."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from caisson.image.build.cache import default_root
from tests.e2e.conftest import Caisson, built

pytestmark = [pytest.mark.vm, pytest.mark.timeout(900)]

#: Debian's names of architectures → the kernel's.
UNAME = {"amd64": b"x86_64", "arm64": b"aarch64"}


@dataclass(frozen=True)
class Image:
    """An image by its directory, and its architecture in the kernel's words."""

    directory: Path
    machine: bytes


@pytest.fixture(scope="module", params=list(UNAME))
def image(request: pytest.FixtureRequest) -> Image:
    return Image(built("--arch", request.param), UNAME[request.param])


def test_a_guest_of_each_architecture_boots_and_executes(own: Caisson, image: Image) -> None:
    booted = own("boot-vm", "--name", "guest", "--detach", "--image", str(image.directory))
    assert booted.returncode == 0, booted.stderr.decode()
    done = own("exec", "--name", "guest", "--", "sh", "-c", "uname -m; echo err >&2; exit 7")
    assert (done.returncode, done.stdout, done.stderr) == (7, image.machine + b"\n", b"err\n")
    data = random.Random(1).randbytes(4_000_000)
    done = own("exec", "--name", "guest", "--", "sha256sum", stdin=data)
    assert done.stdout.split()[0].decode() == hashlib.sha256(data).hexdigest(), done.stderr
    stopped = own("stop-vm", "guest")
    assert stopped.returncode == 0, stopped.stderr.decode()


def test_a_guest_of_each_architecture_is_saved_and_cloned(own: Caisson, image: Image) -> None:
    name = f"e2e-{image.machine.decode()}-{os.getpid()}"
    saved = own("save-snapshot", name, "--image", str(image.directory), "--memory", "256")
    assert saved.returncode == 0, saved.stderr.decode()
    try:
        booted = own("boot-vm", "--name", "clone", "--detach", "--snapshot", name)
        assert booted.returncode == 0, booted.stderr.decode()
        done = own("exec", "--name", "clone", "--", "uname", "-m")
        assert (done.returncode, done.stdout) == (0, image.machine + b"\n"), done.stderr.decode()
        stopped = own("stop-vm", "clone")
        assert stopped.returncode == 0, stopped.stderr.decode()
    finally:
        shutil.rmtree(default_root() / "snapshots" / name)
