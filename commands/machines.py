"""Find the VM that a command is about, or boot one for it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from caisson import image as images
from caisson.agent import client
from caisson.agent.client.errors import AgentGone, ClientError, UsageError
from caisson.agent.client.guest import call_sync
from caisson.agent.client.network import configure
from caisson.image.programs import DEBIAN_KEYRING, TO_BOOT, TO_BUILD, need
from caisson.image.vm import VM, VMConfig, VMError, find_vm, get_vm
from caisson.image.vm.errors import VMEnded
from caisson.image.vm.network import Publish
from caisson.image.vm.qemu import architecture_of

#: Run by a VM's supervisor when this machine was suspended: guests' clocks stood still meanwhile.
RESUME_COMMAND = (sys.executable, "-m", "caisson.agent.client.identity")

#: Seconds for the agent of a running VM to answer, and after which to look whether the VM still runs.
AGENT_TIMEOUT = 60.0
CHECK_INTERVAL = 3.0

#: Seconds for a VM to end when its agent has gone.
EXIT_TIMEOUT = 2.0


@contextlib.contextmanager
def running_vm(name: str) -> Iterator[VM]:
    """Find the running VM of this name, whose agent answers; should it end within the block, that is said.

    Raises VMError.
    """
    with end_explained(get_vm(name)) as vm:
        _await_agent(vm)
        yield vm


def _await_agent(vm: VM) -> None:
    """Wait until the agent of a running VM answers.  Raises VMError."""
    deadline = time.monotonic() + AGENT_TIMEOUT
    while not client.is_serving(vm.agent_socket, timeout=CHECK_INTERVAL):
        if (reason := vm.exit_reason(timeout=0)) is not None:
            raise VMEnded(vm.name, reason)
        if time.monotonic() > deadline:
            raise VMError(f"VM {vm.name!r}: its agent does not answer; see {vm.directory / 'console.log'}")


@contextlib.contextmanager
def vm_for(
    name: str, report: Callable[[str], None], *, answering: bool = True, network: str = "", publish: Sequence[str] = ()
) -> Iterator[VM]:
    """Find the VM of this name; with no name the running default one, or else boot one for the time of this block.

    Unless ``answering``, the caller waits for the agent of a VM that runs already.  Only a VM of the block's own can be
    given a network, and ports of this machine that lead to it: raises UsageError.
    """
    if (network or publish) and (name or find_vm("default") is not None):
        raise UsageError(
            f"VM {name or 'default'!r}: is already running; give it a network when it boots: caisson boot-vm"
        )
    if name or find_vm("default") is not None:
        with end_explained(get_vm(name or "default")) as vm:
            if answering:
                _await_agent(vm)
            yield vm
    else:
        config = VMConfig(
            image=Path(), name=f"exec-{os.getpid()}", on_resume=RESUME_COMMAND,
            network=network or ("user" if publish else "none"), publish=tuple(map(Publish.parse, publish)),
        )  # fmt: skip
        config = dataclasses.replace(config, image=image_directory("", report))
        with VM.start(config, ready=client.ReadinessProbe(), report=report) as vm, end_explained(vm):
            if config.network != "none":
                call_sync(vm, lambda agent: configure(agent, vm.info["network"]))
            yield vm


@contextlib.contextmanager
def end_explained(vm: VM) -> Iterator[VM]:
    """Say why a VM has ended, in place of what became of a connection or a file of it.  Raises VMEnded then."""
    try:
        yield vm
    except VMEnded:
        raise
    except (AgentGone, VMError, ClientError, FileNotFoundError, ConnectionRefusedError) as error:
        lost = isinstance(error, AgentGone)
        reason = vm.exit_reason(timeout=EXIT_TIMEOUT if lost else 0)
        if reason is None:
            raise
        raise VMEnded(vm.name, reason) from error


def image_directory(path: str, report: Callable[[str], None], also: tuple[str, ...] = ()) -> Path:
    """Find the image to boot, in a directory or the default one, built if need be; ``also`` are programs needed then.

    Raises ImageError, which names all missing programs at once.
    """
    if path:
        image = images.Image.load(Path(path))
        need((architecture_of(image.manifest).program, *also), report)
        return image.directory
    build = images.Build(images.load(), report=report)
    tools = () if build.is_cached() else (*TO_BUILD, DEBIAN_KEYRING)
    need((*tools, *TO_BOOT, *also), report)
    return build.image().directory
