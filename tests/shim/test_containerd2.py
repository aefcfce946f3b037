"""Test containerd 2.x: ctr with our runtime and with runc, and pods through the Sandbox service."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.shim.cri import CONFIGURATION_2, Cri, cri
from tests.shim.engine import RUNTIME
from tests.support.golang import Module
from tests.support.poll import wait_until

pytestmark = [pytest.mark.root, pytest.mark.vm, pytest.mark.nightly, pytest.mark.timeout(3000)]

IMAGE = "docker.io/library/busybox:latest"
RUNC = "io.containerd.runc.v2"
PROGRAMS = ("containerd", "containerd-shim-runc-v2", "ctr")


@pytest.fixture(scope="module")
def containerd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cri]:
    """Build containerd of this release from the module proxy; Go's cache makes it quick the second time."""
    build, sources = tmp_path_factory.mktemp("go"), Path(__file__).parent
    crictl = Module(sources / "go_crictl", build / "crictl").build("sigs.k8s.io/cri-tools/cmd/crictl", "crictl")
    module = Module(sources / "go_containerd", build / "containerd")
    programs = [module.build(f"github.com/containerd/containerd/v2/cmd/{name}", name) for name in PROGRAMS]
    with cri(crictl, CONFIGURATION_2, programs) as made:
        configuration = made.place / "shim.toml"
        (made.place / "shared.toml").write_text(configuration.read_text())
        configuration.write_text(f"{configuration.read_text()}block_roots = true\n")
        yield made
        assert made.vms() == []


def both(containerd: Cri, options: list[str], *command: str) -> subprocess.CompletedProcess[bytes]:
    """Run a container by `ctr run --rm` with runc and with ours; the results must be the same."""
    runc, ours = (
        containerd.ctr("run", "--rm", "--runtime", runtime, *options, IMAGE, "c1", *command)
        for runtime in (RUNC, RUNTIME)
    )
    assert (ours.returncode, ours.stdout) == (runc.returncode, runc.stdout), ours.stderr
    return ours


def task(containerd: Cri, name: str) -> bytes:
    lines = containerd.ctr("tasks", "ls").stdout.splitlines()
    return next((line for line in lines if line.split()[0] == name.encode()), b"")


@pytest.fixture
def sleeper(containerd: Cri) -> Iterator[str]:
    """Start a container that runs until it is killed."""
    run = containerd.ctr("run", "--detach", "--runtime", RUNTIME, IMAGE, "sleeper", "sleep", "1000")
    assert run.returncode == 0, run.stderr
    yield "sleeper"
    containerd.ctr("tasks", "kill", "--signal", "KILL", "sleeper")
    wait_until(lambda: b"STOPPED" in task(containerd, "sleeper"), "the container's end")
    assert containerd.ctr("tasks", "rm", "sleeper").returncode in (0, 137)
    assert containerd.ctr("containers", "rm", "sleeper").returncode == 0


def test_run_passes_streams_and_status(containerd: Cri) -> None:
    done = both(containerd, [], "sh", "-c", "echo out; echo err >&2; exit 7")
    assert (done.returncode, done.stdout) == (7, b"out\n")
    assert done.stderr.splitlines()[-1] == b"err"  # ctr warns about cgroup v1 first
    assert both(containerd, [], "nosuch").returncode != 0


def test_run_honours_its_options(containerd: Cri, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    (tmp_path / "file").write_text("kept")
    words = "grep Cap /proc/self/status; pwd; id; echo $A; touch /x || cat /data/file"
    mount = f"type=bind,src={tmp_path},dst=/data,options=rbind:ro"
    options = ["--cap-drop", "CAP_CHOWN", "--cwd", "/tmp", "--user", "65534", "--env", "A=1", "--mount", mount]
    done = both(containerd, [*options, "--read-only"], "sh", "-c", words)
    assert done.stdout.endswith(b"1\nkept")
    both(containerd, ["--privileged"], "grep", "CapEff", "/proc/self/status")


def test_exec_pause_and_metrics(containerd: Cri, sleeper: str) -> None:
    done = containerd.ctr("tasks", "exec", "--exec-id", "e1", "--cwd", "/tmp", sleeper, "sh", "-c", "pwd; exit 3")
    assert (done.returncode, done.stdout) == (3, b"/tmp\n")
    for verb, state in (("pause", b"PAUSED"), ("resume", b"RUNNING")):
        assert containerd.ctr("tasks", verb, sleeper).returncode == 0
        assert state in task(containerd, sleeper)
    assert b"memory" in containerd.ctr("tasks", "metrics", sleeper).stdout


@pytest.mark.parametrize("runtime", ["caisson", "sandboxed"])
def test_containers_of_a_pod_share_a_vm_and_its_namespaces(containerd: Cri, runtime: str) -> None:
    pod = containerd.pod(runtime, hostname="hh", dns_config={"servers": ["10.0.0.10"]})
    assert len(containerd.vms()) == 1
    first, second = (containerd.container(pod, "sleep", "1000") for _ in range(2))
    for namespace in ("ipc", "uts", "net"):
        words = ("readlink", f"/proc/self/ns/{namespace}")
        links = {containerd.output("exec", "--sync", one, *words) for one in (first, second)}
        assert len(links) == 1, namespace
    assert containerd.output("exec", "--sync", first, "hostname") == "hh"
    assert "nameserver 10.0.0.10" in containerd.output("exec", "--sync", first, "cat", "/etc/resolv.conf")
    assert containerd.addresses(pod)[0] in containerd.output("exec", "--sync", first, "ip", "addr")
    containerd.remove(pod)
    assert containerd.vms() == []


def test_mounts_below_a_recursively_read_only_volume_are_read_only_and_their_owners(
    containerd: Cri, tmp_path: Path
) -> None:
    below = tmp_path / "below"
    below.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", below], check=True)
    try:
        pod = containerd.pod("caisson")
        mounts = [{
            "container_path": "/data", "host_path": str(tmp_path), "readonly": True, "recursive_read_only": True,
        }]  # fmt: skip
        container = containerd.container(pod, "sleep", "1000", mounts=mounts)
        for path in ("/data/x", "/data/below/x"):
            refused = containerd.crictl("exec", "--sync", container, "touch", path)
            assert b"Read-only file system" in refused.stderr, path
    finally:
        subprocess.run(["umount", "--lazy", below], check=True)
    below.rmdir()  # while the container runs
    containerd.remove(pod)


#: ctr unpacks an image for another snapshotter when it first runs it.
EROFS = ("--snapshotter", "erofs")


@pytest.mark.parametrize("disks", [True, False])
def test_erofs_layers_are_a_root_whoever_mounts_them(containerd: Cri, disks: bool) -> None:
    script = "rm /etc/group; echo kept > /etc/kept; ls /etc; cat /etc/kept; id; exit 3"
    options = [*EROFS, *([] if disks else ["--runtime-config-path", f"{containerd.place}/shared.toml"])]
    runc, ours = (
        containerd.ctr("run", "--rm", "--runtime", runtime, *chosen, IMAGE, "c1", "sh", "-c", script)
        for runtime, chosen in ((RUNC, EROFS), (RUNTIME, options))
    )
    assert (ours.returncode, ours.stdout) == (runc.returncode, runc.stdout) and runc.returncode == 3, ours.stderr
    layers = containerd.ctr("run", "--rm", "--runtime", RUNTIME, *options, IMAGE, "c1", "cat", "/proc/mounts")
    assert layers.stdout.split(b" / ")[1].split()[0] == (b"overlay" if disks else b"virtiofs")


def test_a_layer_that_was_written_to_a_disk_can_be_committed(containerd: Cri) -> None:
    words = ("sh", "-c", "echo kept > /etc/kept")
    done = containerd.ctr("run", "--runtime", RUNTIME, *EROFS, IMAGE, "c1", *words)
    assert done.returncode == 0, done.stderr
    snapshots = ("snapshots", "--snapshotter", "erofs")
    committed = containerd.ctr(*snapshots, "commit", "kept", "c1")
    assert committed.returncode == 0, committed.stderr
    assert containerd.ctr(*snapshots, "view", "again", "kept").returncode == 0
    command = containerd.ctr(*snapshots, "mounts", "/mnt", "again").stdout.decode()  # the layers are mounted by now
    committed_layer, _, _ = command.partition("lowerdir=")[2].partition(":")
    assert Path(committed_layer, "etc/kept").read_text() == "kept\n"
    for verb, name in (("rm", "again"), ("rm", "kept")):
        assert containerd.ctr(*snapshots, verb, name).returncode == 0
    containerd.ctr("containers", "rm", "c1")
