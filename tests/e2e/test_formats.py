"""Test that images of every format, layout and compression boot, and that a root that was tampered with does not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.e2e.conftest import COMPILE_TIMEOUT, Caisson, built

pytestmark = [pytest.mark.root, pytest.mark.vm, pytest.mark.timeout(COMPILE_TIMEOUT)]


def boots(own: Caisson, image: Path) -> str:
    """Boot it, and return what its root is: the first line of a container's mounts is its own root's."""
    booted = own("boot-vm", "--image", str(image), "--detach")
    assert booted.returncode == 0, booted.stderr.decode()
    done = own("exec", "--", "head", "-n1", "/proc/mounts")
    assert done.returncode == 0, done.stderr.decode()
    assert own("stop-vm").returncode == 0
    return done.stdout.decode().split()[2]


@pytest.mark.parametrize(
    ("settings", "filesystem"),
    [
        ("compression=zstd", "tmpfs rootfs"),
        ("compression=gzip", "tmpfs rootfs"),
        ("format=erofs", "erofs"),
        ("format=erofs-lz4hc layout=gpt", "erofs"),
        ("format=squashfs verity=true layout=gpt", "squashfs"),
        ("format=ext4 layout=dax", "ext4"),
        ("format=erofs verity=true", "erofs"),
    ],
)
def test_it_boots(own: Caisson, settings: str, filesystem: str) -> None:
    words = [word for setting in settings.split() for word in ("--set", setting)]
    image = built("--template", "lean", *words)
    assert boots(own, image) in filesystem.split()
    document = json.loads((image / "image.json").read_text())
    file = image / document["root"]["file"]
    assert file.stat().st_size == document["root"]["bytes"]
    assert ("verity" in document["root"]) == ("verity" in settings)


def test_a_root_with_one_other_byte_does_not_boot(own: Caisson, lean: Path, tmp_path: Path) -> None:
    image = tmp_path / "image"
    shutil.copytree(built("--template", "lean", "--set", "format=erofs", "--set", "verity=true"), image)
    root = bytearray((image / "root.img").read_bytes())
    # The kernel reads an init first of all.
    at = root.index(b"#!/usr/bin/python3")
    root[at + 20] ^= 1
    (image / "root.img").write_bytes(root)
    booted = own("boot-vm", "--image", str(image), "--detach")
    assert booted.returncode == 1
    said = booted.stderr.decode()
    assert "the guest's kernel panicked" in said
    assert "device-mapper: verity" in said and "is corrupted" in said


def test_a_kernel_that_could_not_mount_its_root_is_refused_when_the_image_is_built(own: Caisson) -> None:
    refused = own("build-image", "--set", "format=erofs", "--set", "layout=gpt")
    assert refused.returncode == 1
    said = refused.stderr.decode()
    assert "needs a kernel with CONFIG_VIRTIO_BLK, CONFIG_EROFS_FS built in" in said
    assert "--template lean" in said
