"""Test which of a snapshotter's mounts become disks."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from caisson.agent.shim import rootdisks
from caisson.agent.shim.rootdisks import LOWER, UPPER, NotOnDisks, RootDisk, root_disks


def mount(fstype: str, source: Path, *options: str) -> Any:
    return SimpleNamespace(type=fstype, source=str(source), options=options)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "file").touch()
    return tmp_path / "file"


def test_a_block_file_becomes_a_disk_without_the_options_of_loop_devices(file: Path) -> None:
    active = mount("ext4", file, "loop", "direct-io", "noatime", "rw")
    assert root_disks([active]) == [RootDisk(file, "ext4", ("noatime", "rw"), writable=True)]
    assert root_disks([mount("ext4", file, "loop", "ro")]) == [RootDisk(file, "ext4", ("ro",), writable=False)]


def layers(
    file: Path, *lower: str, overlay: tuple[str, ...] = (), options: tuple[str, ...] = ("ro", "loop")
) -> list[Any]:
    """Return the mounts of the erofs snapshotter, with a file for the writable layer."""
    said = (
        "X-containerd.mkdir.path={{ mount 0 }}/upper:0755", "X-containerd.mkdir.path={{ mount 0 }}/work:0755",
        "workdir={{ mount 0 }}/work", "upperdir={{ mount 0 }}/upper",
    )  # fmt: skip
    upper, image = mount("ext4", file, "rw", "loop"), mount("erofs", file, *options)
    return [upper, *(image for _ in lower), mount("format/mkdir/overlay", Path("overlay"), *said, *overlay)]


def test_erofs_layers_become_disks_the_writable_one_first(file: Path) -> None:
    upper = RootDisk(file, "ext4", ("rw",), writable=True, layer=UPPER)
    lower = RootDisk(file, "erofs", ("ro",), writable=False, layer=LOWER)
    assert root_disks(layers(file, "a", overlay=("lowerdir={{ mount 1 }}",))) == [upper, lower]
    two = layers(file, "b", "a", overlay=("lowerdir={{ overlay 1 2 }}",))
    assert root_disks(two) == [upper, lower, lower]
    assert root_disks([mount("erofs", file, "ro", "loop")]) == [lower.but(layer="")]


def test_overlays_of_other_kinds_are_the_hosts(file: Path) -> None:
    whole = ("lowerdir={{ overlay 1 2 }}",)
    for mounts in (
        layers(file, "b", "a", overlay=("lowerdir={{ overlay 2 1 }}",)),
        layers(file, "b", "a", overlay=("lowerdir={{ overlay 0 2 }}",)),
        layers(file, "b", "a", overlay=(*whole, "metacopy=on")),
        layers(file, "b", "a", overlay=whole, options=("ro", "loop", "device=/other")),
        layers(file, "b", "a", overlay=whole, options=("ro", "loop", "X-containerd.dmverity=/other")),
        layers(file, "b", "a", overlay=whole)[1:],
        layers(file, "b", "a", overlay=whole)[:-1],
        layers(file, overlay=("lowerdir=/",)),
    ):
        with pytest.raises(NotOnDisks):
            root_disks(mounts)


def test_mounts_of_other_kinds_are_the_hosts(file: Path) -> None:
    link = file.with_name("link")
    link.symlink_to(file)
    loop = mount("ext4", file, "loop")
    for mounts in (
        [],
        [mount("bind", file.parent, "rbind")],
        [mount("overlay", Path("overlay"), "lowerdir=/a:/b")],
        [loop, loop],
        [mount("ext4", file, "rw")],
        [mount("ext4", Path("/dev/null"), "loop")],
        [mount("ext4", file.parent, "loop")],
        [mount("ext4", link, "loop")],
        [mount("ext4", file.with_name("missing"), "loop")],
        [mount("xfs", file, "loop")],
    ):
        with pytest.raises(NotOnDisks):
            root_disks(mounts)


def test_a_file_behind_a_loop_device_is_the_hosts(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rootdisks, "LOOP_DEVICES", tmp_path / "block")
    attribute = tmp_path / "block/loop3/loop/backing_file"
    attribute.parent.mkdir(parents=True)
    attribute.write_text("/another\n")
    assert root_disks([mount("ext4", file, "loop")])
    attribute.write_text(f"{file}\n")
    with pytest.raises(NotOnDisks, match="in use on the host"):
        root_disks([mount("ext4", file, "loop")])
