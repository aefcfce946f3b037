"""Test guests of each architecture, built on this one: QEMU emulates what this machine's processor cannot run."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from caisson.image.build.cache import default_root
from tests.build.container_images import busybox_layer, oci_layout
from tests.e2e.conftest import Caisson, built, fresh

pytestmark = [pytest.mark.vm, pytest.mark.timeout(900)]

#: Debian's names of architectures → the kernel's.
UNAME = {"amd64": b"x86_64", "arm64": b"aarch64"}


@dataclass(frozen=True)
class Image:
    """An image's directory, and its architecture as named by Debian and by the kernel."""

    directory: Path
    architecture: str
    machine: bytes


@pytest.fixture(scope="module", params=list(UNAME))
def image(request: pytest.FixtureRequest) -> Image:
    return Image(built("--arch", request.param), request.param, UNAME[request.param])


@pytest.fixture(scope="module")
def guest(image: Image) -> Iterator[Caisson]:
    """Boot a VM of the image, called `default`; yield the command line."""
    with fresh() as caisson:
        booted = caisson("boot-vm", "--detach", "--image", str(image.directory))
        assert booted.returncode == 0, booted.stderr.decode()
        yield caisson
        stopped = caisson("stop-vm", "default")
        assert stopped.returncode == 0, stopped.stderr.decode()


def test_a_guest_of_each_architecture_boots_and_executes(guest: Caisson, image: Image) -> None:
    done = guest("exec", "--", "sh", "-c", "uname -m; echo err >&2; exit 7")
    assert (done.returncode, done.stdout, done.stderr) == (7, image.machine + b"\n", b"err\n")
    data = random.Random(1).randbytes(4_000_000)
    done = guest("exec", "--", "sha256sum", stdin=data)
    assert done.stdout.split()[0].decode() == hashlib.sha256(data).hexdigest(), done.stderr


def test_a_container_image_of_each_architecture_runs(guest: Caisson, image: Image, tmp_path: Path) -> None:
    program = guest("exec", "--", "cat", "/bin/busybox").stdout
    words = ["/bin/sh", "-c", 'busybox uname -m; id -un; echo "$A" >&2; exit 7']
    layers = [busybox_layer(program)]
    layout = oci_layout(tmp_path, layers, image.architecture, Cmd=words, User="web", Env=["PATH=/bin", "A=b"])
    done = guest("run", str(layout), "--name", "default")
    assert (done.returncode, done.stdout) == (7, image.machine + b"\nweb\n"), done.stderr
    assert done.stderr.splitlines()[-1] == b"b"


def test_an_image_of_another_architecture_than_the_guests_is_refused(
    guest: Caisson, image: Image, tmp_path: Path
) -> None:
    (other,) = set(UNAME) - {image.architecture}
    done = guest("run", str(oci_layout(tmp_path, [busybox_layer()], other, Cmd=["/bin/sh"])), "--name", "default")
    assert done.returncode == 125
    assert f"no image for linux/{image.architecture}; it has linux/{other}".encode() in done.stderr


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
