"""A plugin for pytest: which accelerator and vsock device each test's VM had, by the guest's own evidence.

The guest says what its processor calls the hypervisor (CPUID leaf 0x40000000), which clocks its kernel found, and which
context id its vsock device gave it.  Each test is reported with what its VMs said; one whose VM is not what
$CAISSON_ACCEL and $CAISSON_VSOCK promise fails, and so does one that had a VM of which nothing is known.

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

#: What the leaf holds under KVM, and under QEMU's own emulation.
SIGNATURES = {"kvm": "KVMKVMKVM", "tcg": "TCGTCGTCGTCG"}

#: How often a guest is asked that does not answer.
ATTEMPTS = 5

#: A guest of our own vsock device has this context id, unless it is a clone; the others are drawn at random above it.
USER_CID = 3

#: Runs in the guest.  The bytes are: push rbx; mov r8, rdi; mov eax, 0x40000000; xor ecx, ecx; cpuid; and then what is
#: in ebx, ecx and edx is stored at the first argument.
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
    """Ask the guest of the VM in a directory; a slow one more than once, for as long as it runs.  Raises AgentError."""
    python = guest_root.python_of(json.loads((directory / "image.json").read_text()))
    for number in range(ATTEMPTS):
        try:
            async with client.Agent.connect(directory / "agent.sock") as agent:
                idle = [python, "-IS", "-c", "import signal; signal.pause()"]
                container = await guest_root.container(agent, f"evidence{number}", idle)
                done = await guest_root.run(container, python, "-IS", "-c", PROGRAM)
                await container.remove()
                await agent.destroy_sandbox()  # a test can begin with one of its own
                break
        except client.AgentGone:  # an attempt to connect may take so long, and no longer
            if number == ATTEMPTS - 1:
                raise
    assert done.status == 0, done.stderr.decode()
    return dict(json.loads(done.stdout))


def _in_a_thread(directory: Path) -> dict[str, Any]:
    """Ask as ``ask`` does, also where an event loop runs already."""
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, ask(directory)).result()


def judge(said: dict[str, Any], info: dict[str, Any], vsock: str) -> list[str]:
    """Return what of a guest's evidence is not as vm.json and the environment say, or of this vsock device."""
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
    """Asks guests when they have booted, and before they are stopped; reports after each test."""

    def __init__(self) -> None:
        self._evidence: dict[Path, str] = {}  # by the VM's directory, and when it was started
        self._wrapped: set[type] = set()
        self._problems: list[str] = []
        self.lines: list[str] = []
        self._new: list[str] = []

    def _wrap(self, kind: type) -> None:
        """Have each VM's guest asked that a command line of this kind boots in the background, or stops."""
        if kind in self._wrapped:
            return
        self._wrapped.add(kind)
        run = kind.__call__

        def call(caisson: Any, *words: str, **options: Any) -> Any:
            if words[:1] == ("stop-vm",):  # it can have been booted by a process of its own
                self._look(caisson.run_directory, os.environ["CAISSON_VSOCK"])
            done = run(caisson, *words, **options)
            if words[:1] == ("boot-vm",) and "--dry-run" not in words and done.returncode == 0:
                vsock = words[words.index("--vsock") + 1] if "--vsock" in words else os.environ["CAISSON_VSOCK"]
                self._look(caisson.run_directory, vsock)
            return done

        kind.__call__ = call  # type: ignore[method-assign]

    def _look(self, place: Path, vsock: str) -> None:
        """Ask the guests in a run directory that were not asked yet."""
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
        """What the VM said, when it was booted, that a test shares with others."""
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
        """Show a failure at once: a run takes long, and can be cut short."""
        if report.failed:
            print(f"\n{report.longreprtext}", flush=True)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        terminalreporter.section("accelerator and vsock device of each test, as its guest has them")
        for line in self.lines:
            terminalreporter.write_line(line)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Plugin(), "caisson-evidence")
