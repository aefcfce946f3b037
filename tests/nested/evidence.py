"""Check by the guest's own evidence, as a pytest plugin, which accelerator and vsock device each test's VM had.

The guest reports the hypervisor's CPUID signature (leaf 0x40000000), the clock sources its kernel found, and the
context id of its vsock device.  Each test is reported with the evidence of its VMs; it fails if a VM does not match
$CAISSON_ACCEL and $CAISSON_VSOCK, or if there is no evidence about one.

Sources: Documentation/virt/kvm/x86/cpuid.rst; vsock(7), IOCTL_VM_SOCKETS_GET_LOCAL_CID.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from caisson.agent import client
from tests.support import guest_root

#: The signature under KVM, and under QEMU's own emulation.
SIGNATURES = {"kvm": "KVMKVMKVM", "tcg": "TCGTCGTCGTCG"}

#: How often to ask a guest that does not answer.
ATTEMPTS = 5

#: The context id of guests on our own vsock device, except clones; the others get random ones above it.
USER_CID = 3

#: Runs in the guest.  The bytes are: push rbx; mov r8, rdi; mov eax, 0x40000000; xor ecx, ecx; cpuid; then ebx, ecx and
#: edx are stored at the first argument.
PROGRAM = """
import ctypes, fcntl, json, mmap, os, struct
code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
code.write(bytes.fromhex("53 4989f8 b800000040 31c9 0fa2 418918 41894804 41895008 5b c3"))
words = ctypes.create_string_buffer(12)
ctypes.CFUNCTYPE(None, ctypes.c_void_p)(ctypes.addressof(ctypes.c_char.from_buffer(code)))(ctypes.addressof(words))
device = os.open("/dev/vsock", os.O_RDONLY)
cid = struct.unpack("I", fcntl.ioctl(device, 0x7B9, bytes(4)))[0]
clocks = open("/sys/devices/system/clocksource/clocksource0/available_clocksource").read().split()
print(json.dumps({"hypervisor": words.raw.rstrip(b"\\0").decode(), "cid": cid, "clocks": clocks}))
"""


async def ask(directory: Path) -> dict[str, Any]:
    """Ask the guest of the VM in a directory; retry a slow one while it runs.  Raises AgentError."""
    python = guest_root.python_of(json.loads((directory / "image.json").read_text()))
    for number in range(ATTEMPTS):
        try:
            async with client.Agent.connect(directory / "agent.sock") as agent:
                idle = [python, "-IS", "-c", "import signal; signal.pause()"]
                container = await guest_root.container(agent, f"evidence{number}", idle)
                done = await guest_root.run(container, python, "-IS", "-c", PROGRAM)
                await container.remove()
                await agent.destroy_sandbox()  # a test may start by creating one
                break
        except client.AgentGone:  # the time limit of an attempt to connect
            if number == ATTEMPTS - 1:
                raise
    assert done.status == 0, done.stderr.decode()
    return dict(json.loads(done.stdout))


def _in_a_thread(directory: Path) -> dict[str, Any]:
    """Do the same as ``ask``, even if an event loop is already running."""
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, ask(directory)).result()


def judge(said: dict[str, Any], info: dict[str, Any], vsock: str) -> list[str]:
    """Return how a guest's evidence contradicts vm.json, the environment, or this vsock device."""
    accel = os.environ["CAISSON_ACCEL"]
    found = []
    if said["hypervisor"] != SIGNATURES[accel]:
        found.append(f"the hypervisor is {said['hypervisor']!r}, not {SIGNATURES[accel]!r}")
    if accel == "kvm" and "kvm-clock" not in said["clocks"]:
        found.append(f"the clocks are {' '.join(said['clocks'])}, without kvm-clock")
    if said["cid"] != info["cid"]:
        found.append(f"the guest has CID {said['cid']}, its VM {info['cid']}")
    if not info["snapshot"] and (said["cid"] == USER_CID) != (vsock == "user"):
        found.append(f"CID {said['cid']} is not of {vsock}")
    if info["vsock"] != vsock:
        found.append(f"the device is {info['vsock']}, not {vsock}")
    return found


class Plugin:
    """Ask guests after boot and before they are stopped; report after each test."""

    def __init__(self) -> None:
        self._evidence: dict[Path, str] = {}  # by the VM's directory and start time
        self._wrapped: set[type] = set()
        self._problems: list[str] = []
        self.lines: list[str] = []
        self._new: list[str] = []

    def _wrap(self, kind: type) -> None:
        """Make commands of this kind, which boot a VM in the background or stop one, ask its guest."""
        if kind in self._wrapped:
            return
        self._wrapped.add(kind)
        run = kind.__call__

        def call(caisson: Any, *words: str, **options: Any) -> Any:
            if words[:1] == ("stop-vm",):  # it may have been booted by a separate process
                self._look(caisson.run_directory, os.environ["CAISSON_VSOCK"])
            done = run(caisson, *words, **options)
            if words[:1] == ("boot-vm",) and "--dry-run" not in words and done.returncode == 0:
                vsock = words[words.index("--vsock") + 1] if "--vsock" in words else os.environ["CAISSON_VSOCK"]
                self._look(caisson.run_directory, vsock)
            return done

        kind.__call__ = call  # type: ignore[method-assign]

    def _look(self, place: Path, vsock: str) -> None:
        """Ask the guests in a run directory that have not been asked yet."""
        for file in sorted(place.glob("*/vm.json")):
            info = json.loads(file.read_text())
            key = file.parent / str(info["started"])
            if key in self._evidence or info["state"] != "running":
                continue
            try:
                said = _in_a_thread(file.parent)
            except (client.AgentError, AssertionError) as error:
                self._problems.append(f"VM {info['name']} could not be asked: {error}")
                continue
            self._problems += judge(said, info, vsock)
            device = "/dev/vhost-vsock" if info["vsock"] == "vhost" else "our device"
            clock = "kvm-clock" if "kvm-clock" in said["clocks"] else said["clocks"][0]
            self._evidence[key] = f"{said['hypervisor']}, {clock}, CID {said['cid']} of {device}"
            self._new.append(self._evidence[key])

    def _of_the_session(self, item: pytest.Item) -> list[str]:
        """Return the evidence, recorded at boot, of VMs shared between tests."""
        vm = getattr(item, "funcargs", {}).get("vm")
        return [said for key, said in self._evidence.items() if vm and key.parent == vm.run_directory / "default"]

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef[Any]) -> Generator[None, Any, Any]:
        made = yield
        if fixturedef.argname in ("caisson", "own"):
            self._wrap(type(made))
        return made

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, Any, Any]:
        done = yield
        said = self._new or self._of_the_session(item)
        self._new = []
        problems, self._problems = self._problems, []
        if not said:
            problems.append("no guest was asked")
        self.lines.append(f"{item.name}: {'; '.join(said or ['-'])}")
        if problems:
            pytest.fail("; ".join(problems), pytrace=False)
        return done

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Show a failure at once: a run takes long, and may be cut short."""
        if report.failed:
            print(f"\n{report.longreprtext}", flush=True)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        terminalreporter.section("accelerator and vsock device of each test, as its guest has them")
        for line in self.lines:
            terminalreporter.write_line(line)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Plugin(), "caisson-evidence")
