"""Test Kubernetes pods: a kubelet's calls to containerd's CRI plugin, with our runtime."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.shim.cri import Cri, cri
from tests.support.golang import Module
from tests.support.poll import wait_until

pytestmark = [pytest.mark.root, pytest.mark.vm, pytest.mark.nightly, pytest.mark.timeout(1200)]

#: include/uapi/linux/capability.h
CAP_SYS_ADMIN = 21

SLEEP = ("sleep", "1000")


@pytest.fixture(scope="session")
def crictl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    module = Module(Path(__file__).with_name("go_crictl"), tmp_path_factory.mktemp("go") / "crictl")
    return module.build("sigs.k8s.io/cri-tools/cmd/crictl", "crictl")


@pytest.fixture(scope="module")
def kubelet(crictl: Path) -> Iterator[Cri]:
    with cri(crictl) as made:
        yield made
        assert made.vms() == []


@pytest.fixture(params=["caisson", "runc"])
def runtime(request: pytest.FixtureRequest) -> str:
    """Run each test with runc as well: pods in VMs must behave as runc's do."""
    return str(request.param)


@pytest.fixture
def pod(kubelet: Cri, runtime: str) -> Iterator[str]:
    made = kubelet.pod(runtime, hostname="hh", dns_config={"servers": ["10.0.0.10"], "searches": ["svc.local"]})
    yield made
    kubelet.remove(made)
    assert made not in kubelet.output("pods", "--quiet", "--no-trunc")


def test_containers_of_a_pod_share_a_vm_and_its_namespaces(kubelet: Cri, pod: str, runtime: str) -> None:
    assert len(kubelet.vms()) == (1 if runtime == "caisson" else 0)
    own = {"security_context": {"namespace_options": {"pid": 1}}}
    first, second = (kubelet.container(pod, *SLEEP, linux=own) for _ in range(2))
    for namespace in ("ipc", "uts", "net"):
        words = ("readlink", f"/proc/self/ns/{namespace}")
        links = {kubelet.output("exec", "--sync", one, *words) for one in (first, second)}
        assert len(links) == 1, namespace
    assert kubelet.output("exec", "--sync", first, "hostname") == "hh"
    assert "nameserver 10.0.0.10" in kubelet.output("exec", "--sync", first, "cat", "/etc/resolv.conf")
    shared = {"security_context": {"namespace_options": {"pid": 0}}}
    third = kubelet.container(pod, *SLEEP, linux=shared)
    fourth = kubelet.container(pod, "sleep", "1234", linux=shared)
    assert "sleep 1234" in kubelet.output("exec", "--sync", third, "ps")
    assert "sleep 1234" not in kubelet.output("exec", "--sync", first, "ps")
    kubelet.output("stop", "--timeout", "1", fourth)
    kubelet.output("rm", fourth)
    assert kubelet.inspect(third)["state"] == "CONTAINER_RUNNING"


def test_a_container_ends_with_its_status_and_its_logs(kubelet: Cri, pod: str) -> None:
    ended = kubelet.container(pod, "sh", "-c", "echo out; echo err >&2; exit 5")
    wait_until(lambda: kubelet.inspect(ended)["state"] == "CONTAINER_EXITED", "the container's end")
    status = kubelet.inspect(ended)
    assert (status["exitCode"], status["reason"]) == (5, "Error")
    logs = kubelet.crictl("logs", ended)
    assert (logs.stdout, logs.stderr) == (b"out\n", b"err\n")
    hog = kubelet.container(pod, "tail", "/dev/zero", linux={"resources": {"memory_limit_in_bytes": 32 << 20}})
    wait_until(lambda: kubelet.inspect(hog)["state"] == "CONTAINER_EXITED", "the hog's end")
    assert kubelet.inspect(hog)["reason"] == "OOMKilled"


def test_exec_attach_and_port_forward_are_streams(kubelet: Cri, pod: str) -> None:
    container = kubelet.container(pod, "sh", "-c", "mkdir /www; echo page > /www/index.html; httpd -f -h /www -p 80")
    assert kubelet.output("exec", "--sync", container, "echo", "out") == "out"
    assert kubelet.crictl("exec", "--sync", container, "sh", "-c", "exit 3").returncode != 0
    assert kubelet.crictl("exec", "--interactive", container, "wc", "-c", stdin=bytes(300_000)).stdout == b"300000\n"
    attached = kubelet.container(pod, "cat", stdin=True, stdin_once=True)
    assert kubelet.crictl("attach", "--stdin", attached, stdin=b"typed\n").stdout == b"typed\n"
    forwarding = kubelet.start("port-forward", pod, "0:80")
    try:
        assert forwarding.stdout is not None
        line = forwarding.stdout.readline().decode()  # Forwarding from 127.0.0.1:PORT -> 80
        port = line.split(":")[1].split()[0]
        assert kubelet.fetch(f"127.0.0.1:{port}") == b"page\n"
    finally:
        forwarding.kill()
        forwarding.communicate()


def test_an_exec_that_takes_too_long_is_killed(kubelet: Cri, pod: str) -> None:
    container = kubelet.container(pod, *SLEEP)
    late = kubelet.crictl("exec", "--sync", "--timeout", "1", container, "sleep", "4321")
    assert late.returncode != 0 and b"timeout" in late.stderr.lower(), late.stderr
    assert "sleep 4321" not in kubelet.output("exec", "--sync", container, "ps")


def test_a_termination_message_is_read_on_the_node(kubelet: Cri, pod: str, tmp_path: Path) -> None:
    message = tmp_path / "message"
    message.touch()
    mounts = [{"container_path": "/dev/termination-log", "host_path": str(message)}]
    ended = kubelet.container(pod, "sh", "-c", "echo why > /dev/termination-log; exit 3", mounts=mounts)
    wait_until(lambda: kubelet.inspect(ended)["state"] == "CONTAINER_EXITED", "the container's end")
    assert message.read_text() == "why\n"


def test_a_pod_is_reached_by_both_families_and_by_a_port_of_the_node(kubelet: Cri, runtime: str) -> None:
    ports = [{"container_port": 80, "host_port": 18080}]
    pod = kubelet.pod(runtime, port_mappings=ports)
    script = "mkdir /www; echo page > /www/index.html; httpd -f -h /www -p [::]:80"
    container = kubelet.container(pod, "sh", "-c", script)
    kubelet.output("exec", "--sync", container, "sh", "-c", "until wget -qO- 127.0.0.1; do sleep 0.1; done")
    v4, v6 = kubelet.addresses(pod)
    assert {kubelet.fetch(place) for place in (v4, f"[{v6}]", "127.0.0.1:18080")} == {b"page\n"}
    route = kubelet.output("exec", "--sync", container, "ip", "-6", "route")
    assert "default via fd00:213:7::1 dev eth0" in route
    kubelet.remove(pod)


def test_mounts_below_a_read_only_volume_stay_writable(kubelet: Cri, pod: str, tmp_path: Path) -> None:
    below = tmp_path / "below"
    below.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", below], check=True)
    try:
        mounts = [{"container_path": "/data", "host_path": str(tmp_path), "readonly": True}]
        container = kubelet.container(pod, *SLEEP, mounts=mounts)
        kubelet.output("exec", "--sync", container, "touch", "/data/below/x")
        assert kubelet.crictl("exec", "--sync", container, "touch", "/data/x").returncode != 0
        assert (below / "x").exists()
    finally:
        subprocess.run(["umount", below], check=True)


def test_volumes_security_and_statistics(kubelet: Cri, pod: str, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    (tmp_path / "secret").write_text("kept")
    mounts = [
        {"container_path": "/data", "host_path": str(tmp_path)},
        {"container_path": "/ro", "host_path": str(tmp_path), "readonly": True},
    ]
    context = {"run_as_user": {"value": 1000}, "run_as_group": {"value": 2000}, "readonly_rootfs": True}
    container = kubelet.container(pod, *SLEEP, mounts=mounts, linux={"security_context": context})
    assert kubelet.output("exec", "--sync", container, "sh", "-c", "cat /data/secret; id -u; id -g") == "kept1000\n2000"
    for path in ("/ro/x", "/x"):
        assert kubelet.crictl("exec", "--sync", container, "touch", path).returncode != 0
    stats = kubelet.output("stats", "--output", "json", "--id", container)
    assert '"workingSetBytes"' in stats
    kubelet.output("update", "--memory", str(64 << 20), container)


def test_a_privileged_pod_has_no_device_of_the_host(kubelet: Cri) -> None:
    context = {"security_context": {"privileged": True}}
    pod = kubelet.pod("caisson", linux=context)
    container = kubelet.container(pod, *SLEEP, linux=context)
    effective = kubelet.output("exec", "--sync", container, "grep", "CapEff", "/proc/self/status")
    kubelet.output("exec", "--sync", container, "brctl", "addbr", "br0")
    kubelet.remove(pod)
    assert int(effective.split()[1], 16) >> CAP_SYS_ADMIN & 1, effective


def test_the_hosts_network_is_refused_by_name(kubelet: Cri) -> None:
    options = {"security_context": {"namespace_options": {"network": 2}}}
    with pytest.raises(AssertionError, match="host's network"):
        kubelet.pod("caisson", linux=options)
