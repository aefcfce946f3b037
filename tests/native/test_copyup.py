"""Test tmpfs mounts that start with the image's contents."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from caisson.agent.libcontainer.config.reader import SpecError
from caisson.agent.libcontainer.config.spec import Spec
from caisson.agent.libcontainer.errors import LaunchError
from tests.native.nsexec_support import Box, config

pytestmark = pytest.mark.root


def value(*options: str, destination: str = "/data") -> dict[str, Any]:
    made = config()
    mount = {"destination": destination, "type": "tmpfs", "source": "tmpfs", "options": ["tmpcopyup", *options]}
    made["mounts"].append(mount)
    return made


def fill(data: Path) -> None:
    """Create one file of each type, with different owners and modes."""
    (data / "inner/deep").mkdir(parents=True)
    (data / "file").write_bytes(b"x" * 100_000)
    os.utime(data / "file", (1_000_000, 1_000_000))
    (data / "inner/deep/setuid").write_text("s")
    os.chown(data / "inner/deep/setuid", 7, 8)
    (data / "inner/deep/setuid").chmod(0o4711)
    (data / "inner").chmod(0o1777)
    os.chown(data / "inner", 5, 6)
    (data / "absolute").symlink_to("/proc/1/root/etc/passwd")
    (data / "up").symlink_to("../../../../etc")
    os.mkfifo(data / "fifo", 0o640)
    os.mknod(data / "null", 0o20606, os.makedev(1, 3))
    data.chmod(0o751)
    os.chown(data, 3, 4)


def test_everything_is_copied_and_nothing_followed(box: Box) -> None:
    data = box.rootfs / "data"
    data.mkdir()
    fill(data)
    script = (
        "cd /data; stat -c '%n %F %a %u %g %s' . * inner/deep inner/deep/*; readlink absolute; readlink up;"
        "stat -c %Y file; md5sum <file"
    )
    plain = box.sh(script)
    copied = box.sh(f"{script}; touch new; rm file; grep -c ' /data tmpfs ' /proc/mounts", value())

    def without_sizes_of_directories(text: str) -> list[str]:
        return [line.rpartition(" ")[0] if " directory " in line else line for line in text.splitlines()]

    assert without_sizes_of_directories(copied) == [*without_sizes_of_directories(plain), "1"]
    assert (data / "file").exists() and not (data / "new").exists()  # the image is unchanged


def test_read_only_and_with_a_mode(box: Box) -> None:
    (box.rootfs / "data").mkdir()
    (box.rootfs / "data/file").write_text("kept")
    out = box.sh("cat /data/file; touch /data/x 2>&1 || stat -c ' %a' /data", value("ro", "mode=700"))
    assert out == "kepttouch: /data/x: Read-only file system\n 700\n"


def test_where_there_is_nothing(box: Box) -> None:
    assert box.sh("ls -A /nowhere; touch /nowhere/x", value(destination="/nowhere")) == ""


def test_copy_up_reports_a_full_tmpfs(box: Box) -> None:
    (box.rootfs / "data").mkdir()
    (box.rootfs / "data/large").write_bytes(bytes(200_000))
    with pytest.raises(LaunchError, match="tmpcopyup large: the tmpfs is too small for what the image has there"):
        box.sh("true", value("size=64k"))


def test_directories_without_end(box: Box) -> None:
    path = box.rootfs / "data"
    for _ in range(70):
        path /= "d"
    path.mkdir(parents=True)
    with pytest.raises(LaunchError, match="more than 64 nested directories"):
        box.sh("true", value())


def test_for_tmpfs_alone() -> None:
    made = config()
    made["mounts"].append({"destination": "/x", "type": "bind", "source": "/tmp", "options": ["tmpcopyup"]})
    from caisson.agent.libcontainer.plan import plan

    with pytest.raises(SpecError, match=r"mounts\[4\].options: 'tmpcopyup' is only for tmpfs"):
        plan.init_messages(Spec.from_json(made), rootfs="/r", bundle="/", join={}, cgroups={})
