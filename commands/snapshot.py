"""Save VMs as snapshots."""

from __future__ import annotations

import os
import time
from pathlib import Path

from caisson import image as images
from caisson.commands.image import programs_to_build
from caisson.commands.machines import image_directory
from caisson.commands.streams import info
from caisson.image.programs import TO_BOOT, require
from caisson.image.vm import VM, VMConfig
from caisson.image.vm.pace import scaled
from caisson.image.vm.snapshot.snapshot import check_name, has_printed_ready

#: Minutes that an idle CPU takes to compile the kernel of the template `lean`.
COMPILE_MINUTES = 20.0

#: The agent's option to start and end a pod, so that clones start theirs sooner (agent/api/warmup.py).
WARM_UP = "agent.warm_up"


def save_snapshot(*, name: str, image: str, memory: int, cpus: int, append: str, accel: str, vsock: str) -> None:
    """Boot a guest and save it with its agent listening."""
    check_name(name)
    directory = image_directory(image, info) if image else lean_image()
    config = VMConfig(
        image=directory, name=f"save-{os.getpid()}", accel=accel, vsock=vsock, memory=memory, cpus=cpus,
        append=f"{WARM_UP} {append}".rstrip(), savable=True,
    )  # fmt: skip
    began = time.monotonic()
    with VM.start(config, ready=has_printed_ready, report=info) as vm:
        booted = time.monotonic() - began
        size = vm.save(name)
    saved = time.monotonic() - began - booted
    info(f"snapshot {name}: {size / 1e6:.0f} MB, booted in {booted:.1f} s, saved in {saved:.1f} s")


def lean_image() -> Path:
    """Build the image for snapshots: everything is built into its kernel, and its root does not take memory."""
    loaded = images.load(images.find("lean"), settings=["format=erofs"])
    require((*programs_to_build(loaded), *TO_BOOT), info)
    build = images.Build(loaded, report=info)
    if not all(step.cached for step in build.plan() if step.step == "kernel"):
        minutes = max(1, round(scaled(COMPILE_MINUTES) / len(os.sched_getaffinity(0))))
        info(f"compiles the kernel of the template `lean` first, once: Linux from source, some {minutes} minutes here")
    return build.image().directory
