"""Test what of containerd's mounts the host refuses to mount."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from caisson.agent.shim.mounts import MountError, mount_rootfs


def mount(fstype: str, source: str, *options: str) -> Any:
    return SimpleNamespace(type=fstype, source=source, options=options)


@pytest.mark.parametrize(
    ("refused", "why"),
    [
        (mount("erofs", "/layer", "X-containerd.dmverity=/layer.dmverity"), 'set containerd\'s dmverity_mode = "off"'),
        (mount("mkfs/ext4", "/file", "rw"), "mounts of type mkfs/ext4 need containerd for mkfs"),
        (mount("format/bind", "{{ mount 0 }}"), "there are 0 mounts before it"),
        (mount("format/overlay", "overlay", "lowerdir={{ overlay 0 7 }}"), "there are 0 mounts before it"),
        (mount("format/bind", "{{ source 0 }}"), "unknown reference"),
    ],
)
def test_mounts_that_need_more_than_mount_are_refused_by_name(tmp_path: Path, refused: Any, why: str) -> None:
    with pytest.raises(MountError, match=why):
        mount_rootfs([refused], tmp_path / "rootfs", tmp_path / "place", "rootfs")
    assert list(tmp_path.iterdir()) == []
