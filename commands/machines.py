"""Find the VM for a command, or boot one, from an image that is built if needed."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from caisson import image as images
from caisson.agent import client
from caisson.agent.client.connection import call_sync
from caisson.agent.client.errors import UsageError
from caisson.agent.client.network import configure
from caisson.commands.running import await_agent, explain_exit
from caisson.image.programs import DEBIAN_KEYRING, TO_BOOT, TO_BUILD, require
from caisson.image.vm import VM, RunningVM, VMConfig, find_vm, get_vm
from caisson.image.vm.network import Publish
from caisson.image.vm.qemu import architecture_of

#: Run by a VM's supervisor after this machine was suspended: guests' clocks stood still meanwhile.
RESUME_COMMAND = (sys.executable, "-m", "caisson.agent.client.identity")


@contextlib.contextmanager
def find_or_boot_vm(
    name: str, report: Callable[[str], None], *, answering: bool = True, network: str = "", publish: Sequence[str] = ()
) -> Iterator[RunningVM]:
    """Find the VM of this name; without a name the running default one, or boot one for the duration of this block.

    Unless ``answering``, the caller waits for the agent of an already running VM.  Only a VM booted for the block can
    be given a network and published ports; otherwise raises UsageError.
    """
    if (network or publish) and (name or find_vm("default") is not None):
        raise UsageError(
            f"VM {name or 'default'!r}: is already running; give it a network when it boots: caisson boot-vm"
        )
    if name or find_vm("default") is not None:
        with explain_exit(get_vm(name or "default")) as vm:
            if answering:
                await_agent(vm)
            yield vm
    else:
        config = VMConfig(
            image=Path(), name=f"exec-{os.getpid()}", on_resume=RESUME_COMMAND,
            network=network or ("user" if publish else "none"), publish=tuple(map(Publish.parse, publish)),
        )  # fmt: skip
        config = config.but(image=image_directory("", report))
        with VM.start(config, ready=client.ReadinessProbe(), report=report) as vm, explain_exit(vm):
            if config.network != "none":
                call_sync(vm, lambda agent: configure(agent, vm.info["network"]))
            yield vm


def image_directory(path: str, report: Callable[[str], None], also: tuple[str, ...] = ()) -> Path:
    """Find the image to boot, in a directory or the default one, building it if needed; ``also`` are further required
    programs.

    Raises ImageError, which names all missing programs at once.
    """
    if path:
        image = images.Image.load(Path(path))
        require((architecture_of(image.manifest).program, *also), report)
        return image.directory
    build = images.Build(images.load(), report=report)
    tools = () if build.is_cached() else (*TO_BUILD, DEBIAN_KEYRING)
    require((*tools, *TO_BOOT, *also), report)
    return build.image().directory
