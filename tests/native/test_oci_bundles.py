"""Test bundles as callers of the OCI command line make them: what is accepted, refused and run."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.native.oci_support import OURS, Oci, bundle, edit

pytestmark = pytest.mark.root
NAME = f"oci-{os.getpid()}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"process": None}, "process property must not be empty"),
        ({"cwd": "relative"}, "Cwd must be an absolute path"),
        ({"args": []}, "args must not be empty"),
        ({"terminal": True}, "cannot allocate tty if runc will detach without setting console socket"),
    ],
)
def test_configurations_that_are_refused(oci: Oci, sleeper: Path, change: dict[str, object], message: str) -> None:
    edit(sleeper, lambda value: value.update(change) if "process" in change else value["process"].update(change))
    result = oci.detached("create", "-b", str(sleeper), NAME)
    assert (result.status, result.message) == (1, f"runc create failed: {message}")


def test_unknown_capabilities_and_fields_are_no_errors(oci: Oci, tmp_path: Path, busybox_rootfs: Path) -> None:
    made = bundle(tmp_path / "b", busybox_rootfs, "true")
    edit(made, lambda value: value.update(windows={"x": 1}, newField=True))
    edit(made, lambda value: value["process"]["capabilities"]["bounding"].append("CAP_FUTURE"))
    edit(
        made,
        lambda value: value["process"].update(rlimits=[{"type": "RLIMIT_CORE", "soft": n, "hard": 2} for n in (1, 2)]),
    )
    result = oci("run", "-b", str(made), NAME)
    assert result.status == 0 and "ignoring unknown or unavailable capabilities: [CAP_FUTURE]" in result.err


def test_a_relative_rootfs_and_bundle(oci: Oci, tmp_path: Path, busybox_rootfs: Path) -> None:
    made = bundle(tmp_path / "b", busybox_rootfs, "echo", "here")
    (made / "rootfs").symlink_to(busybox_rootfs)
    edit(made, lambda value: value["root"].update(path="rootfs"))
    assert oci.ok("run", NAME, cwd=made) == "here\n"


def test_a_container_in_the_hosts_mount_namespace(oci: Oci, tmp_path: Path, busybox_rootfs: Path) -> None:
    """Propagation is kept as it is; what it has mounted stays, as with runc."""
    made = bundle(tmp_path / "b", busybox_rootfs, "readlink", "/proc/self/ns/mnt")
    (made / "root").mkdir()

    def change(value: dict[str, Any]) -> None:
        value["linux"]["namespaces"] = [one for one in value["linux"]["namespaces"] if one["type"] != "mount"]
        value["mounts"] = [one for one in value["mounts"] if one["destination"] == "/proc"]
        value["linux"].update(maskedPaths=[], readonlyPaths=[])

    edit(made, change)
    before = subprocess.check_output(["findmnt", "-n", "-o", "TARGET,PROPAGATION", "/"])
    try:
        assert oci.ok("run", "-b", str(made), NAME) == f"{Path('/proc/self/ns/mnt').readlink()}\n"
    finally:
        subprocess.run(["umount", "-R", "-l", str(busybox_rootfs)], check=True)
    assert subprocess.check_output(["findmnt", "-n", "-o", "TARGET,PROPAGATION", "/"]) == before
    edit(made, lambda value: value["linux"].update(maskedPaths=["/proc/keys"]))
    assert "unable to restrict sys entries without a private MNT namespace" in oci("run", "-b", str(made), NAME).message


@pytest.mark.parametrize("option", ["bind", "idmap"])
def test_sources_and_destinations_below_the_root(oci: Oci, tmp_path: Path, busybox_rootfs: Path, option: str) -> None:
    """A source may be provided by earlier mounts, and a destination may be a host path to it."""
    made = bundle(tmp_path / "b", busybox_rootfs, "cat", "/var/file")
    (made / "source").mkdir()
    (made / "source" / "file").write_text("below\n")
    maps = [{"containerID": 0, "hostID": 0, "size": 65536}]
    mapped = {"uidMappings": maps, "gidMappings": maps} if option == "idmap" else {}
    listed: list[dict[str, Any]] = [
        {"destination": "/mnt", "source": "source", "type": "bind", "options": ["bind"]},
        {"destination": f"{busybox_rootfs}/var", "source": f"{busybox_rootfs}/mnt", "type": "bind",
         "options": ["bind", *([option] if mapped else [])], **mapped},
    ]  # fmt: skip
    edit(made, lambda value: value["mounts"].extend(listed))
    assert oci.ok("run", "-b", str(made), NAME) == "below\n"


def test_pids_limit_0_is_1(oci: Oci, sleeper: Path) -> None:
    edit(sleeper, lambda value: value["linux"]["resources"].update(pids={"limit": 0}))
    oci.running(sleeper, NAME)
    limit = Path(f"/sys/fs/cgroup/pids/{NAME}/pids.max")
    assert limit.read_text() == "1\n"
    oci.ok("update", "--pids-limit", "-1", NAME)
    assert limit.read_text() == "max\n"
    oci.ok("update", "--pids-limit", "0", NAME)
    assert limit.read_text() == "1\n"


@pytest.mark.parametrize("program", [str(OURS), *filter(None, [shutil.which("runc")])])
def test_a_bundle_of_spec_rootless(oci: Oci, tmp_path: Path, busybox_rootfs: Path, program: str) -> None:
    """With its user namespace, message queues and cgroups, even if it has no cgroup (an ordinary user)."""
    subprocess.run([program, "spec", "--rootless", "-b", str(tmp_path)], check=True)
    script = "id -u; grep -c mqueue /proc/mounts; ls /sys/fs/cgroup | grep -c memory"
    edit(tmp_path, lambda value: value["process"].update(terminal=False, args=["sh", "-c", script]))
    edit(tmp_path, lambda value: value["root"].update(path=str(busybox_rootfs)))
    edit(tmp_path, lambda value: value["process"]["capabilities"].pop("ambient", None))
    assert oci.ok("run", "-b", str(tmp_path), NAME) == "0\n1\n1\n"


def test_hooks(oci: Oci, tmp_path: Path, busybox_rootfs: Path) -> None:
    made = bundle(tmp_path / "b", busybox_rootfs, "true")
    log = tmp_path / "order"

    def hook(point: str, status: int = 0) -> list[dict[str, object]]:
        script = f"cat >/dev/null; echo {point} >>{log}; exit {status}"
        return [{"path": "/bin/sh", "args": ["sh", "-c", script]}]

    points = ("prestart", "createRuntime", "poststart", "poststop")
    edit(made, lambda value: value.update(hooks={point: hook(point) for point in points}))
    oci.ok("run", "-b", str(made), NAME)
    assert log.read_text().split() == list(points)
    for point in points[:3]:
        edit(made, lambda value, point=point: value.update(hooks={point: hook(point, 5)}))
        result = oci("run", "-b", str(made), NAME)
        assert result.status == 1 and f"error running {point} hook #0: " in result.message, result
        assert oci.ok("list", "-q") == ""
    edit(made, lambda value: value.update(hooks={"poststop": hook("poststop", 5)}))
    result = oci("run", "-b", str(made), NAME)
    assert result.status == 0 and "level=warning" in result.err
