"""Test pods as CRI creates them: several containers in one VM, by ctr and the annotations that name a pod."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.shim.engine import RUNTIME, Engine
from tests.support.poll import wait_until

pytestmark = [pytest.mark.root, pytest.mark.vm, pytest.mark.timeout(600)]

IMAGE = "docker.io/library/busybox:latest"


@pytest.fixture(scope="module")
def containerd(docker: Engine) -> Iterator[Engine]:
    """Provide containerd with docker's image in a separate namespace."""
    saved = docker.place / "busybox.tar"
    assert docker.docker("save", "--output", str(saved), "busybox").returncode == 0
    imported = docker.ctr("images", "import", "--snapshotter", "native", str(saved))
    assert imported.returncode == 0, imported.stderr
    yield docker
    docker.ctr("images", "rm", IMAGE)


def run(containerd: Engine, name: str, *options: str) -> None:
    words = ["run", "--detach", "--snapshotter", "native", "--runtime", RUNTIME, *options, IMAGE, name]
    done = containerd.ctr(*words, "sleep", "1000")
    assert done.returncode == 0, done.stderr


def output(containerd: Engine, name: str, script: str) -> bytes:
    return containerd.ctr("tasks", "exec", "--exec-id", "e1", name, "sh", "-c", script).stdout


def end(containerd: Engine, name: str) -> None:
    containerd.ctr("tasks", "kill", "--signal", "KILL", name)
    wait_until(lambda: b"STOPPED" in task(containerd, name), f"the end of {name}")
    assert containerd.ctr("tasks", "rm", name).returncode in (0, 137)
    containerd.ctr("containers", "rm", name)


def task(containerd: Engine, name: str) -> bytes:
    lines = containerd.ctr("tasks", "ls").stdout.splitlines()
    return next((line for line in lines if line.split()[0] == name.encode()), b"")


def test_containers_of_a_pod_share_a_vm_and_its_namespaces(containerd: Engine) -> None:
    pod = ("--annotation", "io.kubernetes.cri.sandbox-id=p1")
    before = containerd.vms()
    run(containerd, "p1", *pod)
    run(containerd, "p2", *pod)
    assert len(containerd.vms()) == len(before) + 1
    for namespace in ("ipc", "uts", "net"):
        link = f"readlink /proc/self/ns/{namespace}"
        assert output(containerd, "p1", link) == output(containerd, "p2", link) != b"", namespace
    assert b"sleep" not in output(containerd, "p2", "cat /proc/2/cmdline"), "processes must not be shared"
    end(containerd, "p2")
    assert output(containerd, "p1", "echo here") == b"here\n", "the pod must survive"
    end(containerd, "p1")
    assert containerd.vms() == before and containerd.mounts() == []


def test_a_pod_without_its_first_container_ends(containerd: Engine) -> None:
    run(containerd, "alone")
    assert len(containerd.vms()) == 1
    end(containerd, "alone")
    assert containerd.vms() == [] and containerd.mounts() == []
