"""Test namespaces that a configuration joins by path, through the OCI command line."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.native.oci_support import Oci, bundle, edit

pytestmark = pytest.mark.root
NAME = f"oci-ns-{os.getpid()}"


@pytest.mark.parametrize("kind", ["ipc", "mount", "network", "uts", "cgroup"])
def test_joins_a_namespace_by_its_path(oci: Oci, tmp_path: Path, busybox_rootfs: Path, kind: str) -> None:
    """A mount namespace, too: the container's mounts are created in it, and its root becomes the container's (runc)."""
    file = {"mount": "mnt", "network": "net"}.get(kind, kind)
    made = bundle(tmp_path / "b", busybox_rootfs, "sh", "-c", f"readlink /proc/self/ns/{file}; sleep 99")
    option = f"--{'net' if kind == 'network' else kind}"
    holder = subprocess.Popen(["unshare", option, "sh", "-c", "echo; exec sleep 99"], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == b"\n"
        path = Path(f"/proc/{holder.pid}/ns/{file}")

        def join(value: dict[str, Any]) -> None:
            kept = [one for one in value["linux"]["namespaces"] if one["type"] != kind]
            value["linux"]["namespaces"] = [*kept, {"type": kind, "path": str(path)}]
            value.pop("hostname")

        edit(made, join)
        pid = oci.running(made, NAME)
        assert Path(f"/proc/{pid}/ns/{file}").readlink() == path.readlink()
        assert oci.ok("exec", NAME, "readlink", f"/proc/self/ns/{file}").strip() == str(path.readlink())
        if kind == "mount":
            assert Path(f"/proc/{holder.pid}/root/bin/busybox").samefile(busybox_rootfs / "bin/busybox")
    finally:
        oci("delete", "-f", NAME)
        holder.kill()
        holder.communicate()


def test_a_path_of_another_kind_of_namespace_is_refused(oci: Oci, sleeper: Path) -> None:
    edit(sleeper, lambda value: value["linux"]["namespaces"].append({"type": "cgroup", "path": "/proc/self/ns/ipc"}))
    result = oci.detached("run", "-d", "-b", str(sleeper), NAME)
    assert result.status == 1 and "cgroup" in result.message
    assert oci.ok("list", "-q") == ""


def test_a_user_namespace_by_path_may_come_with_its_maps(oci: Oci, tmp_path: Path, busybox_rootfs: Path) -> None:
    """containerd and cri-o set both for the containers of a pod."""
    made = bundle(tmp_path / "b", busybox_rootfs, "cat", "/proc/self/uid_map")
    command = ["unshare", "--user", "--map-root-user", "sh", "-c", "echo; exec sleep 99"]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == b"\n"
        maps = [{"containerID": 0, "hostID": 0, "size": 1}]

        def join(value: dict[str, Any]) -> None:
            value["linux"].update(uidMappings=maps, gidMappings=maps)
            value["linux"]["namespaces"].append({"type": "user", "path": f"/proc/{holder.pid}/ns/user"})
            value["mounts"] = [mount for mount in value["mounts"] if mount["type"] in ("proc", "tmpfs")]

        edit(made, join)
        assert oci.ok("run", "-b", str(made), NAME).split() == ["0", "0", "1"]
    finally:
        holder.kill()
        holder.communicate()
