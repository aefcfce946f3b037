"""Test a VM's life as a user sees it: chosen by evidence, reachable, and removed without a trace."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from caisson.agent import client
from tests.e2e.conftest import ROOT, TIMEOUT, Caisson
from tests.support import guest_root
from tests.support.poll import wait_until

pytestmark = pytest.mark.vm


def can_run_stock_guests() -> bool:
    flags = Path("/proc/cpuinfo").read_text()
    return os.access("/dev/kvm", os.R_OK | os.W_OK) and (" vmx" in flags or " svm" in flags)


def test_a_plain_grpc_channel_reaches_the_agent(vm: Caisson) -> None:
    program = textwrap.dedent(
        """
        import sys, grpc
        from caisson.proto.kata1 import health_pb2
        channel = grpc.insecure_channel("unix:" + sys.argv[1])
        check = channel.unary_unary("/grpc.Health/Check",
            request_serializer=health_pb2.CheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString)
        print(check(health_pb2.CheckRequest(), timeout=60).status)
        """
    )
    agent_socket = vm.run_directory / "default" / "agent.sock"
    done = subprocess.run([sys.executable, "-c", program, agent_socket], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "1\n", done.stderr


def test_the_hybrid_handshake_reaches_a_port(vm: Caisson) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(60)
        client.connect(str(vm.run_directory / "default" / "vsock.sock"))
        client.sendall(b"CONNECT 1024\n")
        assert client.makefile("rb").readline().startswith(b"OK ")


def test_auto_picks_by_evidence_and_says_why(vm: Caisson) -> None:
    (info,) = json.loads(vm("list-vms", "--json").stdout)
    assert info["name"] == "default"
    by_evidence = "kvm" if can_run_stock_guests() else "tcg"
    assert info["accel"] == os.environ.get("CAISSON_ACCEL", by_evidence)
    assert "kvm" in info["accel_reason"].lower() or "CAISSON_ACCEL" in os.environ
    by_evidence = "vhost" if os.access("/dev/vhost-vsock", os.R_OK | os.W_OK) else "user"
    assert info["vsock"] == os.environ.get("CAISSON_VSOCK", by_evidence)


def test_a_second_exec_neither_builds_nor_boots(vm: Caisson) -> None:
    boots = {vm("exec", "--", "cat", "/proc/sys/kernel/random/boot_id").stdout for _ in range(2)}
    assert len(boots) == 1
    assert boots != {b""}


def test_a_name_is_taken_once(vm: Caisson) -> None:
    refused = vm("boot-vm", "--detach")
    assert refused.returncode == 1
    assert b"default" in refused.stderr
    assert b"Traceback" not in refused.stderr


def test_a_vm_that_is_not_there_is_one_line_with_the_way_out(vm: Caisson) -> None:
    refused = vm("exec", "--name", "nobody", "--", "true")
    assert refused.returncode == 125
    assert refused.stderr.count(b"\n") == 1
    assert b"caisson boot-vm nobody" in refused.stderr


@pytest.mark.skipif(can_run_stock_guests(), reason="KVM works on this machine")
def test_kvm_where_it_cannot_work_ends_in_a_clear_error(caisson: Caisson) -> None:
    refused = caisson("boot-vm", "--name", "kvm", "--accel", "kvm", "--detach", timeout=120)
    assert refused.returncode == 1
    assert b"Traceback" not in refused.stderr
    assert b"kvm" in refused.stderr.lower()
    wait_until(lambda: not (caisson.run_directory / "kvm").exists(), "the VM's directory is removed")


def test_exec_boots_a_vm_of_its_own_and_takes_it_down(own: Caisson) -> None:
    done = own("exec", "--", "sh", "-c", "echo out; echo err >&2; exit 4")
    assert (done.returncode, done.stdout, done.stderr) == (4, b"out\n", b"err\n")
    assert own.leftovers() == []


def _kill_supervisor(caisson: Caisson, name: str) -> None:
    os.kill(caisson.info(name)["pids"]["supervisor"], signal.SIGKILL)


def _kill_qemu(caisson: Caisson, name: str) -> None:
    os.kill(caisson.info(name)["pids"]["qemu"], signal.SIGKILL)


def _panic(caisson: Caisson, name: str) -> None:
    async def work() -> None:
        async with client.Agent.connect(caisson.run_directory / name / "agent.sock") as agent:
            python = guest_root.python_of(caisson.manifest(name))
            with pytest.raises(client.AgentGone):
                program = "open('/proc/sysrq-trigger', 'w').write('c')"
                container = await guest_root.container(agent, "panic", [python, "-IS", "-c", program])
                await container.init().wait()

    asyncio.run(work())


@pytest.mark.parametrize(
    ("kill", "why"),
    [(_kill_supervisor, b""), (_kill_qemu, b""), (_panic, b"the guest's kernel panicked: sysrq triggered crash")],
)
def test_a_killed_part_takes_everything_with_it(own: Caisson, kill: Callable[[Caisson, str], None], why: bytes) -> None:
    assert own("boot-vm", "--name", "v", "--detach").returncode == 0
    with own.start("exec", "--name", "v", "--", "sleep", "1000", stdin=-3, stderr=-1) as command:
        wait_until(lambda: b"sleep" in own("exec", "--name", "v", "--", "ps").stdout, "the program runs")
        kill(own, "v")
        assert command.wait(TIMEOUT) == 125
        assert command.stderr is not None
        said = command.stderr.read()
    assert why in said
    assert b"Traceback" not in said


def test_a_killed_client_takes_its_own_vm_with_it(own: Caisson) -> None:
    with own.start("exec", "--", "sh", "-c", "echo up; sleep 1000", stdin=-3, stdout=-1) as command:
        assert command.stdout is not None
        assert command.stdout.readline() == b"up\n"
        command.kill()
