"""Replace the shim's VMs with agents on this host, each with its own mounts and network.

The shim, its ttrpc server, its streams and its mounts are real; only the VM is left out, so that each of containerd's
methods is tested within a second.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from caisson.agent.pods.machines import MachineError, NoPort
from caisson.agent.shim.bundle import ProcessId
from caisson.proto.contract import GUEST_SHARED
from tests.support.poll import wait_until
from tests.support.source import ROOT
from tests.support.unique import unique

#: What a test passes to the shim's process: the directory for agents, nsexec, and the number of disks that a machine
#: takes, as loop devices; without it none is plugged in.
PLACE, NSEXEC, DISKS = "CAISSON_TEST_PLACE", "CAISSON_TEST_NSEXEC", "CAISSON_TEST_DISKS"

#: The cgroup version that has controllers here.
CGROUP = "v2" if Path("/sys/fs/cgroup/cgroup.controllers").exists() else "v1"

APART = (
    "unshare", "--mount", "--net", "--propagation", "slave", "sh", "-c",
    'mkdir -p /run/kata-containers && mount -t tmpfs tmpfs /run/kata-containers && exec "$@"', "sh",
)  # fmt: skip

#: The agent sees the share where a guest mounts it; as a mount with this tag already exists, it does not mount it.
SHARE = f"mkdir -p {GUEST_SHARED} && mount --rbind DIRECTORY {GUEST_SHARED} && mount --make-rslave {GUEST_SHARED}"


class NativeMachine:
    """An agent in place of a VM (caisson.agent.pods.machines.PodMachine)."""

    def __init__(self, place: Path, name: str) -> None:
        self._place = place
        self.is_clone = False
        self.agent_socket = place / "agent.sock"
        place.mkdir(parents=True)
        with (place / "log").open("wb") as log:
            process = subprocess.Popen(
                [*APART, sys.executable, "-m", "caisson.agent", "--listen", f"unix:{self.agent_socket}",
                 "--nsexec", os.environ[NSEXEC], "--state", str(place / "state"), "--log", "debug",
                 "--cgroup-parent", unique(f"caisson-{name}"), "--cgroup", CGROUP],
                cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, start_new_session=True,
            )  # fmt: skip
        self.pid = process.pid
        (place / "pid").write_text(f"{self.pid} {ProcessId.of(self.pid).start_time}")
        assert process.stdout is not None
        if b"ready" not in process.stdout.readline():
            process.wait()
            stop(place)
            raise MachineError((place / "log").read_text())

    def share(self, directory: Path) -> None:
        script = SHARE.replace("DIRECTORY", str(directory))
        subprocess.run(["nsenter", f"--mount=/proc/{self.pid}/ns/mnt", "sh", "-c", script], check=True)

    @property
    def block_roots(self) -> bool:
        return DISKS in os.environ

    def add_disk(self, file: Path, name: str, *, writable: bool, following: int) -> str:
        disks = self._place / "disks"
        disks.mkdir(exist_ok=True)
        if len(list(disks.iterdir())) + following >= int(os.environ[DISKS]):
            raise NoPort("all ports are in use")
        mode = [] if writable else ["--read-only"]
        words = ["losetup", "--find", "--show", *mode, str(file)]
        device = subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()
        (disks / name).write_text(device)
        return device

    def remove_disk(self, name: str) -> bool:
        disk = self._place / "disks" / name
        subprocess.run(["losetup", "--detach", disk.read_text()], check=True)
        disk.unlink()
        return True

    def end_share(self, tag: str) -> None:
        """The agent shares this host's mounts: what is unmounted here is unmounted there."""

    def share_of_namespace(self, directory: str, tag: str, mount_namespace: int) -> None:
        raise MachineError("an agent on this host has the mounts of this host")

    def add_interface(self, tap: int, mac: str) -> None:
        raise MachineError("an agent on this host has no devices to plug in")

    def stop(self) -> None:
        stop(self._place)


class NativeMachines:
    """Creates agents (caisson.agent.pods.machines.Machines)."""

    pids = ()

    def start(self, name: str, *, memory: int, cpus: int, share: tuple[str, Path] | None = None) -> NativeMachine:
        machine = NativeMachine(Path(os.environ[PLACE]) / name, name)
        if share is not None:
            machine.share(share[1])
        return machine

    def stop(self, name: str) -> None:
        stop(Path(os.environ[PLACE]) / name)

    def agent_socket(self, name: str) -> Path:
        return Path(os.environ[PLACE]) / name / "agent.sock"


def agent_of(place: Path) -> ProcessId:
    """Return the agent running in a directory.  Raises OSError."""
    pid, start_time = (place / "pid").read_text().split()
    return ProcessId(int(pid), int(start_time))


def stop(place: Path) -> None:
    """Stop an agent; it kills its containers."""
    try:
        agent = agent_of(place)
    except FileNotFoundError:
        return
    if agent.alive:
        os.kill(agent.pid, signal.SIGTERM)
        wait_until(lambda: not agent.alive, "the agent's end")
    for disk in place.glob("disks/*"):  # a VM's disks are closed with it
        subprocess.run(["losetup", "--detach", disk.read_text()], check=True)
        disk.unlink()
    (place / "pid").unlink(missing_ok=True)
