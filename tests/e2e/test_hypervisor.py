"""Test Kata's remote hypervisor with real VMs: pods of a shim that has its own mounts and network namespace."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from caisson.image.build.cache import default_root
from caisson.image.packages.distribution import extract, packages_of
from tests.e2e.conftest import ROOT, TIMEOUT, Caisson, built, fresh
from tests.shim.engine import rootfs
from tests.support.poll import wait_until
from tests.support.trees import unpacked

pytestmark = [
    pytest.mark.root,
    pytest.mark.vm,
    pytest.mark.skipif(shutil.which("tc") is None, reason="needs iproute2"),
]


class Service:
    """A running service, with the VMs in its own directory."""

    def __init__(self, caisson: Caisson, place: Path) -> None:
        self.caisson = caisson
        self.socket = place / "hypervisor.sock"
        self.log = place / "log"

    def vms(self) -> list[str]:
        return sorted(path.name for path in self.caisson.run_directory.glob("pod-*"))


@pytest.fixture(scope="module")
def snapshot() -> Iterator[str]:
    """Provide the name of this module's own snapshot."""
    name = f"e2e-hypervisor-{os.getpid()}"
    with fresh() as caisson:
        saved = caisson("save-snapshot", name, "--image", str(built()), "--vsock", "user", timeout=TIMEOUT)
        assert saved.returncode == 0, saved.stderr.decode()
    yield name
    shutil.rmtree(default_root() / "snapshots" / name)


@pytest.fixture(scope="module")
def service(snapshot: str) -> Iterator[Service]:
    with serving(snapshot) as made:
        yield made


@contextmanager
def serving(snapshot: str, programs: str = "") -> Iterator[Service]:
    """Run the service, with a directory first on its PATH; it exits cleanly, and leaves nothing."""
    with fresh() as caisson, tempfile.TemporaryDirectory() as place:
        caisson.environment["PATH"] = f"{programs}:{os.environ['PATH']}" if programs else os.environ["PATH"]
        made = Service(caisson, Path(place))
        try:
            with made.log.open("wb") as log:
                words = ("hypervisor", "--socket", str(made.socket), "--snapshot", snapshot)
                process = caisson.start(*words, stdin=subprocess.DEVNULL, stderr=log)
            wait_until(made.socket.exists, "the service listens", found=made.log.read_text)
            yield made
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0, made.log.read_text()
            assert not made.socket.exists() and "a bug in a handler" not in made.log.read_text()
        finally:
            process.kill()
            process.wait()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Create a container's root on the host."""
    return unpacked(rootfs(), tmp_path / "root")


@contextmanager
def shim(service: Service, root: Path, sandbox: str, netns: str = "") -> Iterator[tuple[subprocess.Popen[bytes], Any]]:
    """Run a shim with a pod; yield it and its findings so far."""
    words = ["unshare", "--mount", "--propagation", "private", sys.executable, "-m", "tests.e2e.kata_shim"]
    words += [str(service.socket), str(root), sandbox, netns]
    with subprocess.Popen(words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line, service.log.read_text()
            yield process, json.loads(line)
        finally:
            process.kill()


@contextmanager
def namespace() -> Iterator[str]:
    """Create a network namespace; yield its path."""
    words = ["unshare", "--net", "sh", "-c", "echo; exec sleep 600"]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None and process.stdout.readline()
            yield f"/proc/{process.pid}/ns/net"
        finally:
            process.kill()


def inside(namespace: str, script: str) -> str:
    words = ["nsenter", f"--net={namespace}", "sh", "-ec", script]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def pod_network() -> Iterator[tuple[str, str]]:
    """Create a pod's namespace, as set up by CNI, and the namespace of its veth pair's peer."""
    with namespace() as pod, namespace() as peer:
        pid = peer.split("/")[2]
        inside(
            pod,
            f"""
            ip link add eth0 mtu 1400 type veth peer name host netns {pid}
            ip addr add 10.9.0.2/24 dev eth0
            ip addr add fd09::2/64 dev eth0 nodad
            ip link set lo up; ip link set eth0 up
        """,
        )
        inside(peer, "ip addr add 10.9.0.1/24 dev host; ip addr add fd09::1/64 dev host nodad; ip link set host up")
        inside(pod, "ip route add default via 10.9.0.1; ip -6 route add default via fd09::1")
        yield pod, peer


@pytest.mark.timeout(600)
def test_a_recorded_pod_runs_with_its_roots_and_its_network(
    service: Service, root: Path, pod_network: tuple[str, str]
) -> None:
    pod, peer = pod_network
    before = inside(pod, "ip -4 -o addr; ip route; tc qdisc")
    with shim(service, root, "pod1", pod) as (process, found):
        assert (found["stdout"], found["stderr"], found["status"]) == ("kata-pod\n", "oops\n", 3)
        assert found["seccomp"] and found["cpu"] > 0
        assert "50 132\r\nwritten\r\n" in found["terminal"].replace("$ ", "")
        clock = next(int(line) for line in found["terminal"].split() if line.isdigit() and len(line) == 10)
        assert abs(time.time() - clock) < 60, "a clone's clock must be the host's"
        assert [(root / "root" / name).read_text() for name in ("by-second", "by-exec")] == ["written\n"] * 2
        assert "10.9.0.2/24" in found["network"] and "fd09::2/64" in found["network"]
        assert "default via 10.9.0.1" in found["network"] and "default via fd09::1" in found["network"]
        inside(peer, "busybox ping -c 1 -W 10 10.9.0.2; busybox ping -c 1 -W 10 fd09::2")
        assert len(service.vms()) == 1
        output, _ = process.communicate(timeout=TIMEOUT)
        assert process.returncode == 0
    print({name: round(value, 3) for name, value in json.loads(output).items() if isinstance(value, float)})
    assert service.vms() == []
    assert inside(pod, "ip -4 -o addr; ip route; tc qdisc") == before, "the namespace must be unchanged"


@pytest.mark.timeout(600)
def test_a_vm_ends_with_its_shim(service: Service, root: Path) -> None:
    with shim(service, root, "pod2") as (process, _):
        assert len(service.vms()) == 1
        process.kill()
        wait_until(lambda: service.vms() == [], "the VM ends", found=service.log.read_text)
    assert "a shim exited without stopping its VM" in service.log.read_text()


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_roots_come_by_the_virtiofsd_in_rust_as_well(snapshot: str, root: Path, tmp_path: Path) -> None:
    """That of a later Debian release, with the libraries that it needs."""
    tree = tmp_path / "tree"
    tree.mkdir()
    packages = packages_of("debian", default_root() / "apt" / "trixie-virtiofsd", "trixie", "amd64")
    packages.update()
    extract(packages.fetch(["virtiofsd", "libc6", "libseccomp2", "libcap-ng0", "libgcc-s1"]), tree)
    program = tmp_path / "bin/virtiofsd"
    program.parent.mkdir()
    libraries = tree / "usr/lib/x86_64-linux-gnu"
    loader = f"{libraries}/ld-linux-x86-64.so.2 --library-path {libraries} {tree}/usr/libexec/virtiofsd"
    program.write_text(f'#!/bin/sh\nexec {loader} "$@"\n')
    program.chmod(0o755)
    with serving(snapshot, str(program.parent)) as service:
        with shim(service, root, "pod") as (process, found):
            assert [(root / "root" / name).read_text() for name in ("by-second", "by-exec")] == ["written\n"] * 2
            assert found["status"] == 3
            process.communicate(timeout=TIMEOUT)
            assert process.returncode == 0
