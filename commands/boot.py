"""Boot virtual machines."""

from __future__ import annotations

import asyncio
import functools
import json
import shlex
import time
from collections.abc import Callable
from pathlib import Path

from caisson.agent import client
from caisson.agent.client.connection import call_sync
from caisson.agent.client.errors import UsageError
from caisson.agent.client.network import configure
from caisson.commands.machines import RESUME_COMMAND, image_directory
from caisson.commands.streams import check_writable, console_writer, info
from caisson.image.programs import TO_BOOT, require
from caisson.image.vm import VM, VMConfig
from caisson.image.vm import timeline as timelines
from caisson.image.vm.config import DryRun, parse_share
from caisson.image.vm.config import dry_run as dry_run_of
from caisson.image.vm.directory import VMDirectory
from caisson.image.vm.drawing import svg
from caisson.image.vm.network import Publish
from caisson.image.vm.snapshot.snapshot import Snapshot

#: Kernel parameters for measuring a boot.
TIMELINE_PARAMETERS = f"{timelines.PARAMETERS} agent.timeline"

#: Options determined by a snapshot.
SETTLED_BY_SNAPSHOT = (
    "image",
    "memory",
    "cpus",
    "max-memory",
    "max-cpus",
    "share",
    "network",
    "publish",
    "append",
    "timeline",
)


def boot_vm(
    *, name: str, detach: bool, image: str, snapshot: str, memory: int | None, cpus: int | None, max_memory: int | None,
    max_cpus: int | None, share: list[str], network: str, publish: list[str], append: str, accel: str, vsock: str,
    timeout: float, timeline: str, dry_run: bool, as_json: bool,
) -> None:  # fmt: skip
    """Boot a VM and wait for its agent; unless detached, show its console until it stops."""
    timeline_path = Path(timeline) if timeline else None
    if timeline_path and timeline_path.suffix not in (".svg", ".json"):
        raise UsageError(f"--timeline {timeline}: must end in .svg or .json")
    if timeline_path:
        check_writable("--timeline", timeline_path)
    if as_json and not dry_run:
        raise UsageError("--json: needs --dry-run; use `caisson list-vms --json` for running VMs")
    if not dry_run:
        VMDirectory.of(name).refuse_running()  # before an image is built for it
    ready: Callable[[Path], bool]
    if snapshot:
        given = (image, memory, cpus, max_memory, max_cpus, share, network, publish, append, timeline)
        clashing = [f"--{option}" for option, value in zip(SETTLED_BY_SNAPSHOT, given, strict=True) if value]
        if clashing:
            raise UsageError(
                f"--snapshot: cannot be combined with {', '.join(clashing)}; the snapshot determines these"
            )
        require(TO_BOOT, info)
        found = Snapshot.named(snapshot)
        config = VMConfig.clone(found, name=name, accel=accel, vsock=vsock, on_resume=RESUME_COMMAND)
        ready = functools.partial(client.is_personalized, hostname=name)
    else:
        shares = dict(parse_share(text) for text in share)
        parameters = f"{append} {TIMELINE_PARAMETERS}" if timeline_path else append
        config = VMConfig(
            image=Path(), name=name, accel=accel, vsock=vsock, memory=memory or 512,
            cpus=cpus or 1, append=parameters, max_memory=max_memory or 0, max_cpus=max_cpus or 0, shares=shares,
            network=network or ("user" if publish else "none"), publish=tuple(map(Publish.parse, publish)),
            firmware=bool(timeline_path), on_resume=RESUME_COMMAND,
        )  # fmt: skip
        config = config.but(image=image_directory(image, info))
        ready = client.ReadinessProbe()
    if dry_run:
        _show_dry_run(dry_run_of(config), as_json=as_json)
    else:
        _boot(config, ready, detach=detach, timeout=timeout, timeline_path=timeline_path)


def _boot(
    config: VMConfig, ready: Callable[[Path], bool], *, detach: bool, timeout: float, timeline_path: Path | None
) -> None:
    began = time.monotonic()
    firmware_times: list[float] = []

    def note_firmware(_: bytes) -> None:  # polled every two milliseconds: only when measuring a boot
        firmware_times.append(time.monotonic())

    write_console = console_writer()
    with VM.start(
        config, ready=ready, report=info, console=None if detach else write_console,
        firmware=note_firmware if timeline_path else None, timeout=timeout or None,
    ) as vm:  # fmt: skip
        answered = time.monotonic()
        if config.network != "none":
            call_sync(vm, lambda agent: configure(agent, vm.info["network"]))
        info(f"{config.name}: the agent answers after {answered - began:.1f} s; {vm.agent_socket}")
        if timeline_path:
            found = _timeline(vm, began, firmware_times, answered)
            timeline_path.write_text(found.json() if timeline_path.suffix == ".json" else svg(found))
            info(f"{timeline_path}: where the time went")
        if detach:
            vm.detach()
        else:
            vm.wait(write_console)


def _timeline(vm: VM, began: float, firmware_times: list[float], answered: float) -> timelines.Timeline:
    """Combine the boot times of this machine, the guest's kernel and its agent."""
    times = asyncio.run(client.boot_times(vm.agent_socket))
    document = vm.info
    firmware = (firmware_times[0], firmware_times[-1]) if firmware_times else None
    host = timelines.HostTimes(began, document["spawned"], firmware, answered)
    guest = timelines.GuestTimes(times.marks, times.imports, times.kernel_log, times.ahead, times.error)
    release, accel = vm.manifest["kernel"]["release"], document["accel"].upper()
    return timelines.timeline(f"{vm.manifest['name']}, Linux {release}, {accel}: from boot-vm to ready", host, guest)


def _show_dry_run(dry: DryRun, *, as_json: bool) -> None:
    info(dry.reasons)
    info(f"before QEMU, in another shell: {dry.beside}")
    print(json.dumps(list(dry.command), indent=2) if as_json else shlex.join(dry.command))
